"""``preflight``: a small sample of the base, before anything is spent on it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from reasonrun.ledger.steps import OpenStep
from reasonrun.samples import GradedSet
from reasonrun.verbs.context import Context
from reasonrun.verbs.evaluating import table_of

PREFLIGHT_PROBLEMS = 32
PREFLIGHT_SAMPLES = 8


def look(ctx: Context, name: str, graded: GradedSet) -> dict[str, Any]:
    """Run or replay the step that sums the sample up: ``metrics.summarise``; ``zero_variance_share``, the share of problems
    whose samples are all right or all wrong; and the counts of the scores' ``reasons``."""
    step = ctx.open_step(
        name, {"verb": "preflight", "graded": graded.digest, "inputs": [graded.step, graded.rollouts.step]}
    )
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        correct = [[row.correct for row in graded.of_problem(problem.id)] for problem in graded.problems]
        same = float(np.mean([len(set(verdicts)) == 1 for verdicts in correct]))
        reasons = Counter(graded.scores.column("reason"))
        step = step.commit({**table_of(graded), "zero_variance_share": same, "reasons": dict(sorted(reasons.items()))})
    ctx.record(step, "preflight", new=new)
    result: dict[str, Any] = step.result
    if new:
        ctx.progress.end(name, describe(result))
    return result


def describe(table: dict[str, Any]) -> str:
    """The sample in one line."""
    low, high = table["interval"]
    best = max((key for key in table if key.startswith("pass@")), key=lambda key: int(key[5:]))
    parts = [f"base solves {table['accuracy']:.1%} [{low:.1%}, {high:.1%}]", f"{best} {table[best]:.1%}"]
    parts += [f"{share} {table[f'{share}_share']:.1%}" for share in ("truncated", "no_answer", "unparseable")]
    return ", ".join([*parts, f"zero variance {table['zero_variance_share']:.1%}"]).replace("no_answer", "no answer")
