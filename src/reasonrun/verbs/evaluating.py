"""``evaluate``: greedy and sampled accuracy on problems that are never trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reasonrun.ledger.steps import OpenStep
from reasonrun.metrics import summarise
from reasonrun.records import Checkpoint, Sampling
from reasonrun.samples import GradedSet, ProblemSet
from reasonrun.verbs.context import Context


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A committed measurement. ``metrics`` holds the tables ``greedy`` and ``sampled``, as asked for."""

    policy: Checkpoint
    split: str
    step: str
    metrics: dict[str, Any]

    @property
    def headline(self) -> float:
        """The number that checkpoints are compared by: greedy accuracy, or sampled when greedy is off."""
        table = self.metrics.get("greedy") or self.metrics["sampled"]
        return float(table["accuracy"])


Part = Callable[[str, int, Sampling], GradedSet]
"""Samples and grades one part of an evaluation: (name, completions per problem, sampling)."""


def evaluate(
    ctx: Context, name: str, policy: Checkpoint, problems: ProblemSet, split: str, part: Part, max_new_tokens: int
) -> Evaluation:
    """Run or replay an evaluation. Its seed names neither round nor arm, so that differences are paired."""
    settings = ctx.recipe.evaluate
    graded: dict[str, GradedSet] = {}
    if settings.greedy:
        graded["greedy"] = part("greedy", 1, Sampling(temperature=0.0, max_new_tokens=max_new_tokens))
    if settings.num_samples:
        sampling = Sampling(temperature=settings.temperature, max_new_tokens=max_new_tokens)
        graded["sampled"] = part("sampled", settings.num_samples, sampling)
    fingerprint = {
        "verb": "evaluate",
        "policy": policy.weights,
        "split": split,
        "parts": {key: rows.digest for key, rows in graded.items()},
        "inputs": [rows.step for rows in graded.values()],
    }
    step = ctx.open_step(name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(name, "evaluate"):
            tables = {key: table_of(rows) for key, rows in graded.items()}
            step = step.commit({"split": split, "num_problems": len(problems), **tables})
    ctx.record(step, "evaluate", new=new)
    evaluation = Evaluation(policy=policy, split=split, step=name, metrics=step.result)
    if new:
        ctx.progress.end(name, describe(evaluation))
    return evaluation


def table_of(graded: GradedSet) -> dict[str, Any]:
    """Accuracy, pass@k, maj@k and shares of what went wrong (``metrics.summarise``)."""
    return summarise([graded.of_problem(problem.id) for problem in graded.problems])


def describe(evaluation: Evaluation) -> str:
    """One line: accuracy and interval of each part."""
    parts = []
    for key in ("greedy", "sampled"):
        table = evaluation.metrics.get(key)
        if table:
            low, high = table["interval"]
            parts.append(f"{key} {table['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
    return f"{evaluation.split}: " + ", ".join(parts)
