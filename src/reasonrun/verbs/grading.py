"""``grade``: a verdict for every rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

from reasonrun.contracts import Grader
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.records import Score, digest
from reasonrun.samples import Extent, GradedSet, RolloutSet
from reasonrun.sets import Rows
from reasonrun.settings import semantic
from reasonrun.verbs.context import Context, PlannedStep

CHUNK = 512


def grade(ctx: Context, name: str, rollouts: RolloutSet, grader: Grader) -> GradedSet:
    """Run or replay one grading step; the scores are in the rollouts' order."""
    if ctx.planned is not None:
        zero = Extent.of(0)
        ctx.planned.append(
            PlannedStep(
                step=name, verb="grade", unit="completions", units=rollouts.extent, tokens=zero, disk_bytes=zero
            )
        )
    fingerprint = {
        "verb": "grade",
        "grader": grader.id,
        "settings": semantic(grader.settings),
        "rollouts": rollouts.digest,
        "references": digest([problem.reference for problem in rollouts.problems]),
        "inputs": [rollouts.step],
    }
    step = ctx.open_step(name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(name, "grade"):
            step = _grade(ctx, step, rollouts, grader)
    ctx.record(step, "grade", new=new)
    scores = Rows.load(Score, step.table_paths("rows"), ctx.cache_dir)
    return GradedSet(rollouts=rollouts, scores=scores, step=name, extent=rollouts.extent)


def _grade(ctx: Context, step: OpenStep, rollouts: RolloutSet, grader: Grader) -> Committed:
    total = len(rollouts)
    wal = step.wal()
    pending = wal.missing(total)
    ctx.progress.begin(step.name, total, total - len(pending))
    ordinals = iter(pending)
    with closing(grader.grade_many(_items(ctx, rollouts, pending))) as verdicts:
        while chunk := list(islice(verdicts, CHUNK)):
            wal.append([(int(next(ordinals)), score.model_dump(mode="json")) for score in chunk])
            ctx.progress.advance(step.name, len(chunk))
            ctx.check_stop()
    grader.close()
    wal.flush()
    counts: Counter[str] = Counter()
    step.seal_table("rows", Score, _counted(wal, total, counts))
    num_correct, num_ungraded = counts.pop("#correct", 0), counts.pop("#ungraded", 0)
    result: dict[str, Any] = {
        "num_rollouts": total,
        "num_correct": num_correct,
        "num_ungraded": num_ungraded,
        "reasons": dict(sorted(counts.items())),
        **({} if grader is ctx.grader else {"grader": grader.id}),
    }
    committed = step.commit(result)
    what = "correct" if grader is ctx.grader else "read"
    ctx.progress.end(step.name, f"{num_correct} of {total} {what}")
    return committed


def _items(ctx: Context, rollouts: RolloutSet, pending: Any) -> Iterator[tuple[Any, str, bool]]:
    for ordinal in pending:
        rollout = rollouts.rows[int(ordinal)]
        yield ctx.problems_by_id[rollout.problem_id], rollout.text, rollout.truncated


def _counted(wal: Any, total: int, counts: Counter[str]) -> Iterator[Score]:
    for ordinal in range(total):
        score = Score.model_validate(wal.read(ordinal))
        counts[score.reason] += 1
        counts["#correct"] += score.correct
        counts["#ungraded"] += score.value is None
        yield score
