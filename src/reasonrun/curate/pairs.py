"""Preference pairs around the first wrong step of a wrong solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from reasonrun.curate.duels import Duel, Turn, duels, refused
from reasonrun.curate.group import Group, curation, evidence, first_tokens, fits
from reasonrun.records import Example, Graded, LeftOut, PreferenceExample, Prefix, Segment, SFTExample

Form = Literal["step", "response", "teacher", "sft"]
Check = Literal["none", "continuations", "program"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """A step that somebody else wrote in the place of a wrong one, and the rollouts that it is from."""

    ids: tuple[int, ...]
    rollout_ids: tuple[str, ...] = ()


Correction = Callable[[Turn, int], Corrected | str]
"""Corrects a wrong step, by its number; or says why it cannot."""


@dataclass(kw_only=True, slots=True)
class Pairing:
    """What turns the duels of one problem into examples.

    ``correction`` writes the winning step of the form ``teacher``; ``rates`` are the shares of right continuations after a
    step, by the rollout that it is from, for the check ``continuations``.
    """

    group: Group
    steps: str
    cap: int
    form: Form
    correction: Correction
    rates: dict[str | None, float]
    check: Check = "none"
    min_gain: float = 0.0
    num_taken: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)

    def example(self, duel: Duel) -> Example | str:
        """The example of a duel, or why it gives none."""
        key = (duel.loser.before, duel.loser.ids)
        taken = self.num_taken.get(key, 0)
        reason = self._why_not(duel)
        if reason is None and taken and (self.form == "teacher" or taken == self.cap):
            reason = "over_cap"
        if reason is not None:
            return reason
        example = _example(self.group, duel, self.correction, self.form)
        if not isinstance(example, str):
            self.num_taken[key] = taken + 1
        return example

    def _why_not(self, duel: Duel) -> str | None:
        if self.check == "program":
            char = self.group.first_error(duel.winner.row.rollout.text)
            found = self.group.steps(duel.winner.row.rollout, self.steps)
            wrong = not isinstance(char, str) and not isinstance(found, str) and found.holding(char) <= duel.number
            return "winner_wrong" if wrong else None
        if self.check == "continuations":
            gain = self._gain(duel)
            return "check_ungraded" if gain is None else None if gain > self.min_gain else "not_better"
        return None

    def _gain(self, duel: Duel) -> float | None:
        """By how much the winning step raises the share of right continuations; that of a last step is its verdict."""
        last = (1.0, 0.0) if duel.winner.is_last else (None, None)
        won = self.rates.get(duel.winner.row.rollout.id, last[0])
        lost = self.rates.get(duel.first_loser.row.rollout.id, last[1])
        return None if won is None or lost is None else won - lost


@curation(version=2)
def error_pairs(
    group: Group,
    tried: list[Graded],
    rectified: list[Graded],
    *checked: list[Graded],
    steps: str,
    cap: int,
    form: Form,
    check: Check = "none",
    min_gain: float = 0.0,
) -> Iterator[Example | LeftOut]:
    """Right continuations of an error's prefix against the error itself (Lai et al. 2024, arXiv 2406.18629, §3.2).

    The same (error, right continuation) rows give every form, so that arms differ in nothing else:

    - ``step``: the first step of the continuation against the wrong step, after the prefix. No end of sequence unless
      the step is the last one of its solution.
    - ``response``: the whole right solution against the whole wrong one, after the prompt.
    - ``teacher``: the step of the task's solution against the wrong step, where the task's program says that it is the
      first wrong one: else the solution need not go through the same steps. One pair for each wrong step.
    - ``sft``: the first step of the continuation alone, to imitate after the prefix.

    Equal steps after equal prefixes of a problem give one pair, whatever rollouts they are from.

    Args:
        group: the problem.
        tried: its solutions; the wrong ones that were located are the parents of ``rectified``.
        rectified: continuations of their prefixes.
        checked: continuations of the winning and of the wrong steps, for the check of that name.
        steps: how completions are cut: labels, lines or task.
        cap: most pairs of one wrong step after one prefix; 0 is no cap.
        form: what to make of them.
        check: a right answer can follow a wrong step. ``program`` refuses a winner in which the task's program finds an
            error up to this step; ``continuations`` one whose share of right continuations does not exceed that of the
            wrong step by ``min_gain``.
        min_gain: see ``check``.
    """

    def solved(loser: Turn, number: int) -> Corrected | str:
        return _in_solution(group, loser, number, steps)

    pairing = Pairing(
        group=group,
        steps=steps,
        cap=cap,
        form=form,
        check=check,
        min_gain=min_gain,
        correction=solved,
        rates=success_rates(checked),
    )
    yield from pairs_of_errors(pairing, tried, rectified)
    yield from evidence(*checked)


def pairs_of_errors(
    pairing: Pairing, tried: Sequence[Graded], rectified: Sequence[Graded]
) -> Iterator[Example | LeftOut]:
    """The examples of all duels, and why rows give none."""
    paired: set[str] = set()
    unpaired: dict[str, str] = {}
    for outcome in duels(pairing.group, tried, rectified, pairing.steps):
        if isinstance(outcome, LeftOut):
            yield outcome
            continue
        error, row = outcome.loser.row.rollout.id, outcome.winner.row.rollout.id
        example = pairing.example(outcome)
        if isinstance(example, str):
            unpaired.setdefault(error, example)
            yield LeftOut(rollout_id=row, reason=example)
            continue
        paired.add(error)
        yield example
    for error, reason in unpaired.items():
        if error not in paired:
            yield LeftOut(rollout_id=error, reason=f"no_pair: {reason}")


@curation(version=2)
def step_ends(
    group: Group, tried: list[Graded], rectified: list[Graded], *, steps: str, room: int
) -> Iterator[Prefix | LeftOut]:
    """Prefixes up to the end of every winning step and of every wrong one that has a winner, each once and unless it is
    its solution's last. ``room`` are the tokens that a continuation may take."""
    losers: set[str] = set()
    skipped: dict[str, str] = {}
    for outcome in duels(group, tried, rectified, steps):
        if isinstance(outcome, LeftOut):
            yield outcome
            continue
        own = outcome.loser.row.rollout.id
        if outcome.first_loser is not outcome.loser:
            skipped[own] = "duplicate"
        sides = [outcome.winner] if own in losers or own in skipped else [outcome.winner, outcome.loser]
        losers.add(own)
        for turn in sides:
            yield _step_end(group, turn, outcome.number, room)
    yield from (LeftOut(rollout_id=row, reason=reason) for row, reason in skipped.items())


def _step_end(group: Group, turn: Turn, number: int, room: int) -> Prefix | LeftOut:
    if turn.is_last:
        return LeftOut(rollout_id=turn.row.rollout.id, reason="last_step")
    if not fits(group, turn.row, turn.end, room):
        return LeftOut(rollout_id=turn.row.rollout.id, reason="prefix_too_long")
    return first_tokens(turn.row, turn.end, num_steps=number)


def success_rates(sets: Sequence[Sequence[Graded]]) -> dict[str | None, float]:
    """Share of right rows by parent; what was not graded is left out."""
    verdicts: dict[str | None, list[bool]] = {}
    for row in (row for rows in sets for row in rows):
        if row.score.value is not None:
            verdicts.setdefault(row.rollout.parent_id, []).append(row.correct)
    return {parent: sum(right) / len(right) for parent, right in verdicts.items()}


def _in_solution(group: Group, loser: Turn, number: int, steps: str) -> Corrected | str:
    """The step of the task's own solution."""
    char, found = group.first_error(loser.row.rollout.text), group.steps(loser.row.rollout, steps)
    if isinstance(char, str) or isinstance(found, str) or found.holding(char) != number:
        return "teacher_has_another_course"
    written = group.written_steps(group.solution(), steps)
    if isinstance(written, str) or number > len(written):
        return "teacher_has_no_such_step"
    ids = written[number - 1]
    return refused(ids, number == len(written), loser) or Corrected(ids=ids)


def _example(group: Group, duel: Duel, correction: Correction, form: Form) -> Example | str:
    loser, winner, number = duel.loser, duel.winner, duel.number
    error, row = loser.row.rollout, winner.row.rollout
    prefix = error.prompt_ids + loser.before
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
