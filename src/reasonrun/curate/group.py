"""What a curation function sees: one problem at a time, with its rows from every set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from reasonrun.records import Example, Graded, LeftOut, Problem, Segment, SFTExample

F = TypeVar("F", bound=Callable[..., Iterator[Example | LeftOut]])


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One problem.

    ``prompt(style)`` renders the task's messages in that style for the policy: a segment without loss. A hinted
    rollout is stored against the bare prompt this way, never by cutting ids. ``gold()`` is the task's own answer
    without a rationale, closed by the end-of-sequence token.
    """

    problem: Problem
    prompt: Callable[[str], Segment]
    gold: Callable[[], Segment]


def curation(version: int) -> Callable[[F], F]:
    """Mark a curation function with its version; a change of behaviour bumps it."""

    def mark(function: F) -> F:
        function.version = version  # type: ignore[attr-defined]
        return function

    return mark


def imitate(prompt: Segment, row: Graded, *, source: str = "self", weight: float = 1.0) -> SFTExample:
    """The rollout's own tokens after ``prompt``: its ids as sampled, end of sequence included only if it came."""
    segments = tuple(segment.model_copy(update={"loss": True}) for segment in row.rollout.segments)
    return SFTExample(
        problem_id=row.rollout.problem_id,
        rollout_ids=(row.rollout.id,),
        segments=(prompt, *segments),
        weight=weight,
        source=source,
    )
