"""Rollouts of a run with their verdicts: which steps, which rows, and what a filter that leaves nothing could have said.

Tables are read in parts, and only rows that are shown become records, so that memory does not grow with the run.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.errors import RecipeError
from reasonrun.ledger.catalogue import step_states
from reasonrun.records import Problem, Rollout, Score, Segment
from reasonrun.report.run_record import RunRecord, SampleStep, Scored
from reasonrun.sets import Rows

Mask = npt.NDArray[np.bool_]

NOT_GRADED = "not graded"
_ROUND = re.compile(r"round-(\d+)/")
_MANY = 8  # names that an error lists at most


@dataclass(frozen=True, kw_only=True)
class RolloutFilters:
    """Which rollouts to show; None leaves everything in.

    Attributes:
        round: number of the round.
        step: name of a step that sampled or graded, or the beginning of such names.
        verdict: ``correct``; ``incorrect`` for every other score; ``ungraded``; else the reason of a score.
        min_tokens: fewest tokens of the completion.
        max_tokens: most tokens of the completion.
        problem: id of a problem, or its beginning.
        evaluation: take the rollouts of evaluations too.
        limit: the most rollouts to show.
    """

    round: int | None = None
    step: str | None = None
    verdict: str | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    problem: str | None = None
    evaluation: bool = False
    limit: int = 10


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """One rollout with the scores of every step that graded it; ``problem`` is None when no split holds it."""

    step: str
    rollout: Rollout
    scores: tuple[tuple[str, Score], ...]  # (grade step, score)
    problem: Problem | None

    @property
    def round(self) -> int | None:
        return round_of(self.step)

    @property
    def num_tokens(self) -> int:
        return num_sampled_tokens(self.rollout.segments)


@dataclass(kw_only=True)
class RolloutPage:
    """The first rollouts that pass, and counts over all of them.

    Attributes:
        shown: at most ``limit`` rollouts, in the order of the run.
        steps: the ``sample`` steps that were read.
        num_rollouts: rollouts of those steps.
        num_left: rollouts left after each filter in turn, by the filter's name.
        num_matching: rollouts that pass all filters.
        verdicts: verdicts of the rollouts that pass, by reason; as many a rollout as it has graders.
        verdicts_before: the same before the filters of verdict and length.
        tokens_before: shortest and longest completion before the filter of length, where there is one.
        num_evaluations_left_out: ``sample`` steps of evaluations that were not read.
        problem: the problem that was asked for, if one was.
    """

    shown: list[ScoredRollout] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    num_rollouts: int = 0
    num_left: dict[str, int] = field(default_factory=dict)
    num_matching: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    verdicts_before: Counter[str] = field(default_factory=Counter)
    tokens_before: tuple[int, int] | None = None
    num_evaluations_left_out: int = 0
    problem: Problem | None = None


def read_rollouts(run: RunRecord, filters: RolloutFilters) -> RolloutPage:
    """The rollouts that pass the filters.

    Raises:
        RecipeError: no such step, round or problem, or a beginning that several problems share.
        RunFailed: a committed table is damaged.
    """
    problem_id = None if filters.problem is None else find_problem(run, filters.problem)
    steps, num_left_out = choose_steps(run, filters)
    page = RolloutPage(steps=[step.name for step in steps], num_evaluations_left_out=num_left_out)
    if problem_id is not None:
        page.problem = run.problems([problem_id])[problem_id]
    found: list[tuple[SampleStep, Rollout, tuple[Score, ...]]] = []
    for step in steps:
        for part in run.scored_parts(step.name, step.grade_steps):
            mask = _filtered(part, problem_id, filters, page)
            rows = np.flatnonzero(mask)[: filters.limit - len(found)]
            if len(rows):
                scores = zip(*(of_grader.take(rows) for of_grader in part[1]), strict=True) if part[1] else ()
                found += zip([step] * len(rows), part[0].take(rows), scores or [()] * len(rows), strict=True)
    problems = run.problems(rollout.problem_id for _, rollout, _ in found)
    page.shown = [
        ScoredRollout(
            step=step.name,
            rollout=rollout,
            scores=tuple(zip(step.grade_steps, scores, strict=True)),
            problem=problems.get(rollout.problem_id),
        )
        for step, rollout, scores in found
    ]
    return page


def _filtered(part: Scored, problem_id: str | None, filters: RolloutFilters, page: RolloutPage) -> Mask:
    """Which rows of a part pass; counts them into ``page``."""
    rollouts, scores = part
    mask = np.ones(len(rollouts), dtype=np.bool_)
    page.num_rollouts += len(rollouts)
    if problem_id is not None:
        mask &= np.array([found == problem_id for found in rollouts.column("problem_id")], dtype=np.bool_)
        _count(page, "--problem", mask)
    columns = [(of_grader.column("value"), of_grader.column("reason")) for of_grader in scores]
    page.verdicts_before.update(_reasons(columns, mask))
    if filters.verdict is not None:
        mask &= _has_verdict(columns, filters.verdict, len(rollouts))
        _count(page, f"--verdict {filters.verdict}", mask)
    if filters.min_tokens is not None or filters.max_tokens is not None:
        mask = _has_length(rollouts, mask, filters, page)
    page.num_matching += int(mask.sum())
    page.verdicts.update(_reasons(columns, mask))
    return mask


def _count(page: RolloutPage, name: str, mask: Mask) -> None:
    page.num_left[name] = page.num_left.get(name, 0) + int(mask.sum())


def _reasons(columns: Sequence[tuple[list[float | None], list[str]]], mask: Mask) -> Counter[str]:
    if not columns:
        return Counter({NOT_GRADED: int(mask.sum())} if mask.any() else {})
    rows = np.flatnonzero(mask).tolist()
    return Counter(reasons[row] for _, reasons in columns for row in rows)


def _has_verdict(columns: Sequence[tuple[list[float | None], list[str]]], verdict: str, num_rows: int) -> Mask:
    """Rows to which at least one grader gave the verdict."""
    passes = np.full(num_rows, not columns and verdict in ("ungraded", NOT_GRADED), dtype=np.bool_)
    for values, reasons in columns:
        if verdict == "ungraded":
            chosen = [value is None for value in values]
        elif verdict in ("correct", "incorrect"):
            chosen = [value is not None and (value >= 1.0) == (verdict == "correct") for value in values]
        else:
            chosen = [reason == verdict for reason in reasons]
        passes |= np.array(chosen, dtype=np.bool_)
    return passes


def _has_length(rollouts: Rows[Rollout], mask: Mask, filters: RolloutFilters, page: RolloutPage) -> Mask:
    rows = np.flatnonzero(mask)
    segments = rollouts.take(rows).column("segments") if len(rows) else []
    lengths = np.array([num_sampled_tokens(row) for row in segments], dtype=np.int64)
    if len(lengths):
        low, high = page.tokens_before or (int(lengths[0]), int(lengths[0]))
        page.tokens_before = min(low, int(lengths.min())), max(high, int(lengths.max()))
    passes = mask.copy()
    if filters.min_tokens is not None:
        passes[rows] &= lengths >= filters.min_tokens
        _count(page, f"--min-tokens {filters.min_tokens}", passes)
    if filters.max_tokens is not None:
        passes[rows] &= lengths <= filters.max_tokens
        _count(page, f"--max-tokens {filters.max_tokens}", passes)
    return passes


def num_sampled_tokens(segments: Sequence[Segment]) -> int:
    """Tokens that the policy wrote; a beginning that was given to it carries no loss and does not count."""
    return sum(len(segment.token_ids) for segment in segments if segment.loss)


def round_of(step: str) -> int | None:
    """The number of the round that a step belongs to; None outside of rounds."""
    match = _ROUND.match(step)
    return int(match[1]) if match else None


def choose_steps(run: RunRecord, filters: RolloutFilters) -> tuple[list[SampleStep], int]:
    """The ``sample`` steps to read, and how many steps of evaluations are left out.

    An evaluation is read when it is asked for, or when everything that ``--step`` names belongs to evaluations.

    Raises:
        RecipeError: no step of that name or round has rollouts.
    """
    steps = run.sample_steps()
    if filters.step is not None:
        steps = _named(run, steps, filters.step)
    if filters.round is not None:
        rounds = sorted({number for step in steps if (number := round_of(step.name)) is not None})
        if filters.round not in rounds:
            where = f" among the steps that --step {filters.step} names" if filters.step else ""
            known = f"rounds with rollouts: {', '.join(map(str, rounds))}" if rounds else "no round has rollouts yet"
            raise RecipeError(f"{run.path} has no rollouts of round {filters.round}{where}", hint=known)
        steps = [step for step in steps if round_of(step.name) == filters.round]
    is_named = filters.step is not None and all(step.is_evaluation for step in steps)
    if filters.evaluation or is_named:
        return steps, 0
    kept = [step for step in steps if not step.is_evaluation]
    return kept, len(steps) - len(kept)


def _named(run: RunRecord, steps: list[SampleStep], name: str) -> list[SampleStep]:
    """Steps of exactly that name (their own or a grader's), else those whose names begin with it."""
    exact = [step for step in steps if name in (step.name, *step.grade_steps)]
    found = exact or [step for step in steps if any(n.startswith(name) for n in (step.name, *step.grade_steps))]
    if found:
        return found
    known = list(dict.fromkeys(n for step in steps for n in (step.name, *step.grade_steps)))
    hint = _alternatives(name, known, "steps with rollouts") if known else "no committed step has rollouts yet"
    verbs: dict[str, Any] = {row["step"]: row["verb"] for row in run.rows}
    if name in verbs:
        raise RecipeError(f"{name} is a {verbs[name]} step of {run.path}: it has no rollouts", hint=hint)
    if step_states(run.path).get(name) == "begun":
        raise RecipeError(f"step {name} of {run.path} is not finished: its rollouts are not committed", hint=hint)
    raise RecipeError(f"{run.path} has no step {name}", hint=hint)


def _alternatives(word: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return f"nearest: {', '.join(near)}"
    more = f" and {len(known) - _MANY} more" if len(known) > _MANY else ""
    return f"{what}: {', '.join(known[:_MANY])}{more}"


def find_problem(run: RunRecord, beginning: str) -> str:
    """The id that begins so. Raises RecipeError when none does, or several do."""
    found: set[str] = set()
    examples: list[str] = []
    for part in run.problem_parts():
        ids = part.column("id")
        found.update(problem_id for problem_id in ids if problem_id.startswith(beginning))
        examples += ids[: 3 - len(examples)]
    if beginning in found or len(found) == 1:
        return beginning if beginning in found else found.pop()
    if found:
        several = ", ".join(sorted(found)[:_MANY])
        raise RecipeError(
            f"{len(found)} problems of {run.path} have ids that begin with {beginning}", hint=f"such as {several}"
        )
    hint = f"ids look like {', '.join(examples)}" if examples else "its problems are not committed yet"
    raise RecipeError(f"{run.path} has no problem {beginning}", hint=hint)
