"""Preference pairs around the first wrong step of a wrong solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from reasonrun.curate.group import Group, curation, first_tokens
from reasonrun.records import Example, Graded, LeftOut, PreferenceExample, Prefix, Segment, SFTExample

Form = Literal["step", "response", "teacher", "sft"]


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
    def is_whole(self) -> bool:
        """Whether the step ended by itself: another one follows, or the completion did."""
        return not (self.is_last and self.row.rollout.truncated)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """A step that somebody else wrote in the place of a wrong one, and the rollouts that it is from."""

    ids: tuple[int, ...]
    rollout_ids: tuple[str, ...] = ()


Correction = Callable[[Turn, int], Corrected | str]
"""Corrects a wrong step, by its number; or says why it cannot."""


def _turn(group: Group, row: Graded, start: int, steps: str) -> tuple[Turn, int] | str:
    """The step of ``row`` whose text begins after ``start`` tokens, and its number; or why there is none."""
    found = group.steps(row.rollout, steps)
    if isinstance(found, str):
        return found
    number = found.beginning_at(start)
    if number is None:
        return "step_not_found"
    turn = Turn(row=row, start=start, end=found.end(number), is_last=number == len(found))
    return (turn, number) if turn.is_whole else "step_cut_off"


@curation(version=1)
def error_pairs(
    group: Group,
    tried: list[Graded],
    rectified: list[Graded],
    *checked: list[Graded],
    steps: str,
    cap: int,
    form: Form,
    min_gain: float = 0.0,
) -> Iterator[Example | LeftOut]:
    """Right continuations of an error's prefix against the error itself (Lai et al. 2024, arXiv 2406.18629, §3.2).

    The same (error, right continuation) rows give every form, so that arms differ in nothing else:

    - ``step``: the first step of the continuation against the wrong step, after the prefix. No end of sequence unless
      the step is the last one of its solution.
    - ``response``: the whole right solution against the whole wrong one, after the prompt.
    - ``teacher``: the step of the task's solution against the wrong step; one pair for each error that has a right
      continuation.
    - ``sft``: the first step of the continuation alone, to imitate after the prefix.

    Args:
        group: the problem.
        tried: its solutions; the wrong ones that were located are the parents of ``rectified``.
        rectified: continuations of their prefixes.
        checked: continuations of the winning and of the wrong steps, when they were asked for; a winner is kept if its
            share of right ones exceeds that of the wrong step by ``min_gain``.
        steps: how completions are cut: labels, lines or task.
        cap: most pairs of one error; 0 is no cap.
        form: what to make of them.
        min_gain: see ``checked``.
    """

    def solved(loser: Turn, number: int) -> Corrected | str:
        return _in_solution(group, loser, number, steps)

    yield from pairs_of_errors(group, tried, rectified, checked, solved, steps, cap, form, min_gain)


def pairs_of_errors(
    group: Group,
    tried: Sequence[Graded],
    rectified: Sequence[Graded],
    checked: Sequence[Sequence[Graded]],
    correction: Correction,
    steps: str,
    cap: int,
    form: Form,
    min_gain: float,
) -> Iterator[Example | LeftOut]:
    """``error_pairs``, with the form ``teacher`` from ``correction``."""
    children: dict[str | None, list[Graded]] = {}
    for row in rectified:
        children.setdefault(row.rollout.parent_id, []).append(row)
    rates = success_rates([row for rows in checked for row in rows])
    for row in tried:
        if row.rollout.id in children:
            yield from _pairs(group, row, children[row.rollout.id], rates, correction, steps, cap, form, min_gain)
        else:
            yield LeftOut(rollout_id=row.rollout.id, reason="correct" if row.correct else "not_located")
    for rows in checked:
        for row in rows:
            yield LeftOut(rollout_id=row.rollout.id, reason="evidence")


@curation(version=1)
def step_ends(group: Group, tried: list[Graded], rectified: list[Graded], *, steps: str) -> Iterator[Prefix | LeftOut]:
    """Prefixes up to the end of every winning step and of every wrong one that is not its solution's last."""
    located = {row.rollout.parent_id: row.rollout.num_given_tokens for row in rectified}
    for row in (*tried, *rectified):
        is_error = row.rollout.id in located
        if not is_error and not (row.correct and row.rollout.parent_id in located):
            yield LeftOut(rollout_id=row.rollout.id, reason="no_step_to_check")
            continue
        start = located[row.rollout.id if is_error else row.rollout.parent_id]
        found = _turn(group, row, start, steps)
        if isinstance(found, str) or found[0].is_last:
            yield LeftOut(rollout_id=row.rollout.id, reason=found if isinstance(found, str) else "last_step")
            continue
        turn, number = found
        yield first_tokens(row, turn.end, num_steps=number)


def success_rates(rows: Sequence[Graded]) -> dict[str | None, float]:
    """Share of right rows by parent; what was not graded is left out."""
    verdicts: dict[str | None, list[bool]] = {}
    for row in rows:
        if row.score.value is not None:
            verdicts.setdefault(row.rollout.parent_id, []).append(row.correct)
    return {parent: sum(right) / len(right) for parent, right in verdicts.items()}


def _pairs(
    group: Group,
    error: Graded,
    continuations: Sequence[Graded],
    rates: dict[str | None, float],
    correction: Correction,
    steps: str,
    cap: int,
    form: Form,
    min_gain: float,
) -> Iterator[Example | LeftOut]:
    """The pairs of one error."""
    wrong = _turn(group, error, continuations[0].rollout.num_given_tokens, steps)
    if isinstance(wrong, str):
        yield from (LeftOut(rollout_id=row.rollout.id, reason=wrong) for row in (error, *continuations))
        return
    loser, number = wrong
    taken: set[tuple[int, ...]] = set()
    for row in continuations:
        winner = _winner(group, row, loser, number, steps)
        if isinstance(winner, Turn) and winner.ids in taken:
            winner = "duplicate"
        elif isinstance(winner, Turn) and _gain(rates, winner, loser) < min_gain:
            winner = "not_better"
        elif isinstance(winner, Turn) and taken and (form == "teacher" or len(taken) == cap):
            winner = "over_cap"
        if isinstance(winner, str):
            yield LeftOut(rollout_id=row.rollout.id, reason=winner)
            continue
        example = _example(group, winner, loser, number, correction, form)
        if isinstance(example, str):
            yield LeftOut(rollout_id=row.rollout.id, reason=example)
            continue
        taken.add(winner.ids)
        yield example
    if not taken:
        yield LeftOut(rollout_id=error.rollout.id, reason="not_rectified")


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


def _gain(rates: dict[str | None, float], winner: Turn, loser: Turn) -> float:
    """By how much the winning step raises the share of right continuations; a last step's share is its own verdict."""
    return rates.get(winner.row.rollout.id, 1.0) - rates.get(loser.row.rollout.id, 0.0)


def _in_solution(group: Group, loser: Turn, number: int, steps: str) -> Corrected | str:
    """The step of the task's own solution."""
    written = group.written_steps(group.solution(), steps)
    if isinstance(written, str) or number > len(written):
        return "teacher_has_no_such_step"
    ids = written[number - 1]
    return refused(ids, number == len(written), loser) or Corrected(ids=ids)


def _example(group: Group, winner: Turn, loser: Turn, number: int, correction: Correction, form: Form) -> Example | str:
    error, row = loser.row.rollout, winner.row.rollout
    prefix = error.prompt_ids + error.completion_ids[: loser.start]
    if form == "sft":
        given = Segment(token_ids=prefix, src="prompt", loss=False)
        learnt = Segment(token_ids=winner.ids, src="model", loss=True, step=number)
        return SFTExample(
            problem_id=group.problem.id, rollout_ids=(row.id, error.id), segments=(given, learnt), source="self"
        )
    chosen, rejected, source = winner.ids, loser.ids, "self"
    others: tuple[str, ...] = ()
    if form == "response":
        opening = error.num_given_tokens
        prefix = error.prompt_ids + error.completion_ids[:opening]
        chosen, rejected = row.completion_ids[opening:], error.completion_ids[opening:]
    if form == "teacher":
        corrected = correction(loser, number)
        if isinstance(corrected, str):
            return corrected
        chosen, source, others = corrected.ids, "teacher", corrected.rollout_ids
    return PreferenceExample(
        problem_id=group.problem.id,
        rollout_ids=(row.id, error.id, *others),
        prefix_ids=prefix,
        chosen_ids=chosen,
        rejected_ids=rejected,
        source=source,
    )
