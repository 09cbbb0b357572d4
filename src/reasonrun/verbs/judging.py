"""``judge``: a model's verdicts on rollouts, one score for each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from reasonrun.agreement import entropy_bits
from reasonrun.grading.judgement import HIGHEST, LOWEST, Decision, JudgementGrader
from reasonrun.ledger.steps import OpenStep
from reasonrun.records import Graded, Rollout, Score
from reasonrun.samples import Extent, GradedSet, RolloutSet
from reasonrun.sets import Rows
from reasonrun.verbs.context import Context, PlannedStep


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdicts:
    """What a judge wrote about rollouts, read. ``swapped``: it was asked with the two responses exchanged."""

    read: GradedSet
    swapped: bool = False

    def rows(self) -> Iterator[Graded]:
        """One by one, by problem."""
        for problem in self.read.problems:
            yield from self.read.of_problem(problem.id)


def judge(ctx: Context, name: str, rollouts: RolloutSet, verdicts: Sequence[Verdicts], decision: Decision) -> GradedSet:
    """Run or replay the step that folds a judge's verdicts to one score for each rollout."""
    zero = Extent.of(0)
    if ctx.planned is not None:
        ctx.planned.append(
            PlannedStep(
                step=name, verb="judge", unit="completions", units=rollouts.extent, tokens=zero, disk_bytes=zero
            )
        )
    fingerprint = {
        "verb": "judge",
        "decision": decision,
        "rollouts": rollouts.digest,
        "verdicts": [[part.read.digest, part.swapped] for part in verdicts],
        "inputs": [rollouts.step, *(part.read.step for part in verdicts)],
    }
    step = ctx.open_step(name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(name, "judge"):
            given = _by_rollout(verdicts)
            scores = [_fold(rollout, given[rollout.id], decision) for rollout in rollouts]
            step.seal_table("rows", Score, iter(scores))
            step = step.commit(_summary(scores, verdicts, decision))
            unread = step.result["num_unread"]
            ctx.progress.end(name, f"{len(scores)} judged, {unread} of {step.result['num_verdicts']} verdicts unread")
    ctx.record(step, "judge", new=new)
    rows = Rows.load(Score, step.table_paths("rows"), ctx.cache_dir)
    return GradedSet(rollouts=rollouts, scores=rows, step=name, extent=rollouts.extent)


def _by_rollout(verdicts: Sequence[Verdicts]) -> dict[str, list[tuple[Score, float | None]]]:
    """The verdicts on each rollout, with their values; those of exchanged responses speak of the other one."""
    found: dict[str, list[tuple[Score, float | None]]] = defaultdict(list)
    for part in verdicts:
        for row in part.rows():
            value = row.score.value
            seen = 1.0 - value if part.swapped and value is not None else value
            found[row.rollout.parent_id or ""].append((row.score, seen))
    return found


def _fold(rollout: Rollout, given: Sequence[tuple[Score, float | None]], decision: Decision) -> Score:
    """The mean of the verdicts that could be read; None without one."""
    values = [value for _, value in given if value is not None]
    if not values:
        reasons = Counter(score.reason for score, _ in given).most_common(1)
        return Score(value=None, reason=reasons[0][0] if reasons else "not_asked", grader=JudgementGrader.id)
    value = mean(values)
    shown = LOWEST + (HIGHEST - LOWEST) * value if decision == "score" else value
    return Score(value=value, answer=f"{shown:.4g}", reason="judged", grader=JudgementGrader.id)


def _summary(scores: Sequence[Score], verdicts: Sequence[Verdicts], decision: Decision) -> dict[str, Any]:
    """Counts, and how the single verdicts spread: a judge that always says the same shows in the entropy."""
    rows = [(row, part.swapped) for part in verdicts for row in part.rows()]
    said = Counter(row.score.answer for row, _ in rows if row.score.answer is not None)
    reasons = Counter(row.score.reason for row, _ in rows if row.score.answer is None)
    lengths = [len(row.rollout.completion_ids) for row, _ in rows if row.rollout.completion_ids]
    return {
        "num_rollouts": len(scores),
        "num_verdicts": len(rows),
        "num_unread": reasons.total(),
        "unread": dict(sorted(reasons.items())),
        "num_ungraded": sum(score.value is None for score in scores),
        "mean_score": _mean([score.value for score in scores if score.value is not None]),
        "histogram": dict(sorted(said.items())),
        "entropy_bits": entropy_bits(said.values()),
        "mean_num_tokens": _mean(lengths),
        **({"first_share": said["A"] / said.total()} if decision == "choice" and said else {}),
    }


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None
