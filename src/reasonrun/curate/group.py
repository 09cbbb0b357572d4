"""What a curation function sees: one problem at a time, with its rows from every set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from reasonrun.contracts import versioned
from reasonrun.curate.steps import Steps
from reasonrun.records import Chosen, Graded, LeftOut, Prefix, Problem, Rollout, Segment, SFTExample

Curation = Callable[..., Iterator[Chosen | LeftOut]]
F = TypeVar("F", bound=Curation)


def _absent(*_: object) -> NoReturn:
    raise NotImplementedError("this group was made without that")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One problem, and what the task and the policy's tokenizer know about it.

    ``prompt(style)`` renders the task's messages in that style for the policy: a segment without loss. A hinted
    rollout is stored against the bare prompt this way, never by cutting ids. ``gold()`` is the task's own answer
    without a rationale, closed by the end-of-sequence token; ``direct_answer()`` is its text. ``answer(style, text)``
    are the segments of an answer in a style, its opening without loss, closed by the same token. ``steps(rollout, how)``
    cuts a completion into steps (``labels``, ``lines``, or ``task`` for the task's own), or says why it cannot.
    ``first_error(text)``, ``solution()`` and ``gold_score()`` are the task's, for tasks that have them.
    ``written_steps(text, how)`` are the ids of the steps of a text that somebody else wrote, without their labels, the
    last one closed by the end-of-sequence token.
    ``texts(text, how)`` are those steps as text. ``encode`` and ``decode`` are the policy's tokenizer, special tokens left
    out. ``next_turn(rollout, said)`` are the ids of the prompt that follows a rollout and the user's next message.
    ``context_length`` is the model's, in tokens. A test that makes a group by hand may leave out what its function does
    not ask for.
    """

    problem: Problem
    prompt: Callable[[str], Segment]
    gold: Callable[[], Segment]
    direct_answer: Callable[[], str] = _absent
    answer: Callable[[str, str], tuple[Segment, ...]] = _absent
    steps: Callable[[Rollout, str], Steps | str] = _absent
    written_steps: Callable[[str, str], list[tuple[int, ...]] | str] = _absent
    texts: Callable[[str, str], list[str] | str] = _absent
    encode: Callable[[str], tuple[int, ...]] = _absent
    decode: Callable[[Sequence[int]], str] = _absent
    next_turn: Callable[[Rollout, str], tuple[int, ...]] = _absent
    first_error: Callable[[str], int | str] = _absent
    gold_score: Callable[[], float | None] = _absent
    solution: Callable[[], str] = _absent
    context_length: int = 1 << 30


def curation(version: int) -> Callable[[F], F]:
    """Mark a curation function with its version; a change of behaviour bumps it."""
    return versioned(version)


def imitate(prompt: Segment, row: Graded, *, source: str = "self", weight: float = 1.0) -> SFTExample:
    """The rollout's own tokens after ``prompt``: its ids as sampled, end of sequence included only if it came. What was
    put in the model's mouth carries no loss."""
    return SFTExample(
        problem_id=row.rollout.problem_id,
        rollout_ids=(row.rollout.id,),
        segments=(prompt, *row.rollout.segments),
        weight=weight,
        source=source,
    )


def first_tokens(row: Graded, num_tokens: int, *, num_steps: int) -> Prefix:
    """The first ``num_tokens`` tokens of a rollout's completion, which hold ``num_steps`` whole steps."""
    segments, room = [], num_tokens
    for segment in row.rollout.segments:
        if room > 0:
            segments.append(segment.model_copy(update={"token_ids": segment.token_ids[:room], "loss": False}))
        room -= len(segment.token_ids)
    return Prefix(
        problem_id=row.rollout.problem_id,
        rollout_ids=(row.rollout.id,),
        messages=row.rollout.messages,
        prompt_ids=row.rollout.prompt_ids,
        segments=tuple(segments),
        num_steps=num_steps,
    )


def fits(group: Group, row: Graded, num_tokens: int, room: int) -> bool:
    """Whether the context holds the first ``num_tokens`` of a completion and ``room`` more."""
    return len(row.rollout.prompt_ids) + num_tokens + room <= group.context_length


def evidence(*sets: Sequence[Graded]) -> Iterator[LeftOut]:
    """Rows that were sampled to find something out, and give no example."""
    for rows in sets:
        for row in rows:
            yield LeftOut(rollout_id=row.rollout.id, reason="evidence")
