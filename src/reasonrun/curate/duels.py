"""Wrong steps against the steps that right continuations have in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reasonrun.curate.group import Group
from reasonrun.records import Graded, LeftOut


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A completion around the step in question: tokens before the step's text and up to its end."""

    row: Graded
    start: int
    end: int
    is_last: bool

    @property
    def ids(self) -> tuple[int, ...]:
        return self.row.rollout.completion_ids[self.start : self.end]

    @property
    def before(self) -> tuple[int, ...]:
        """The completion up to the step's text."""
        return self.row.rollout.completion_ids[: self.start]

    @property
    def is_whole(self) -> bool:
        """Whether the step ended by itself: another one follows, or the completion did."""
        return not (self.is_last and self.row.rollout.truncated)


@dataclass(frozen=True, kw_only=True, slots=True)
class Duel:
    """A wrong step, by its number, and a step of a right continuation in its place.

    ``first_loser`` is the same wrong step after the same prefix where the problem's rows have it first.
    """

    loser: Turn
    first_loser: Turn
    number: int
    winner: Turn


def duels(group: Group, tried: Sequence[Graded], rectified: Sequence[Graded], steps: str) -> Iterator[Duel | LeftOut]:
    """Every wrong step against every distinct step of its right continuations; why other rows are in none.

    A wrong row that is in some duel is left out by none of these outcomes.
    """
    children: dict[str | None, list[Graded]] = {}
    for row in rectified:
        children.setdefault(row.rollout.parent_id, []).append(row)
    first_losers: dict[tuple[tuple[int, ...], tuple[int, ...]], Turn] = {}
    seen: set[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = set()
    for error in tried:
        continuations = children.get(error.rollout.id, [])
        if not continuations:
            yield LeftOut(rollout_id=error.rollout.id, reason=_why_unlocated(error))
            continue
        wrong = _turn(group, error, continuations[0].rollout.num_given_tokens, steps)
        if isinstance(wrong, str):
            yield from (LeftOut(rollout_id=row.rollout.id, reason=wrong) for row in (error, *continuations))
            continue
        loser, number = wrong
        key = (loser.before, loser.ids)
        first = first_losers.setdefault(key, loser)
        num_duels = num_duplicates = 0
        for row in continuations:
            winner = _winner(group, row, loser, number, steps)
            if isinstance(winner, Turn) and (*key, winner.ids) in seen:
                num_duplicates += 1
                winner = "duplicate"
            if isinstance(winner, str):
                yield LeftOut(rollout_id=row.rollout.id, reason=winner)
                continue
            seen.add((*key, winner.ids))
            num_duels += 1
            yield Duel(loser=loser, first_loser=first, number=number, winner=winner)
        if not num_duels:
            yield LeftOut(rollout_id=error.rollout.id, reason="duplicate" if num_duplicates else "not_rectified")


def _why_unlocated(row: Graded) -> str:
    if row.score.value is None:
        return f"ungraded: {row.score.reason}"
    return "correct" if row.correct else "not_located"


def _turn(group: Group, row: Graded, start: int, steps: str) -> tuple[Turn, int] | str:
    """The step of ``row`` whose text begins after ``start`` tokens, and its number; or why there is none."""
    found = group.steps(row.rollout, steps)
    if isinstance(found, str):
        return found
    number = found.beginning_at(start)
    if number is None:
        return "step_not_found"
    turn = Turn(row=row, start=start, end=found.end(number), is_last=number == len(found))
    if not turn.is_whole:
        return "step_cut_off"
    return (turn, number) if group.decode(turn.ids).strip() else "empty_step"


def _winner(group: Group, row: Graded, loser: Turn, number: int, steps: str) -> Turn | str:
    if not row.correct:
        return f"ungraded: {row.score.reason}" if row.score.value is None else row.score.reason
    found = _turn(group, row, loser.start, steps)
    if isinstance(found, str):
        return found
    winner, winning_number = found
    if winning_number != number:
        return "other_step"
    return refused(winner.ids, winner.is_last, loser) or winner


def refused(ids: tuple[int, ...], is_last: bool, loser: Turn) -> str | None:
    """Why a step cannot stand against the loser: a pair must not teach length or format instead of reasoning."""
    if ids == loser.ids:
        return "same_as_rejected"
    return None if is_last == loser.is_last else "other_terminality"
