"""``evaluate``: greedy and sampled accuracy on problems that are never trained on, and what asking again changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from reasonrun import judging
from reasonrun.correction import correction_section, overall
from reasonrun.ledger.steps import OpenStep
from reasonrun.metrics import summarise
from reasonrun.records import Checkpoint, Graded, Problem, Sampling
from reasonrun.samples import GradedSet, ProblemSet, RolloutSet
from reasonrun.verbs.context import Context


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A committed measurement. ``metrics`` holds the tables ``greedy`` and ``sampled`` of the first attempts, as asked
    for; with several attempts in a row also ``correction``: of each of these parts a ``correction_section``; and the task's
    own tables (``Task.tables``) of each part."""

    policy: Checkpoint
    split: str
    step: str
    metrics: dict[str, Any]

    @property
    def headline(self) -> float:
        """The number that checkpoints are compared by: accuracy of the last attempt, greedy, or sampled when greedy is
        off. Of a judge of pairs it is the share of pairs that it judges right: a lone side has no gold to be accurate
        about."""
        if self.headline_of_pairs is not None:
            return self.headline_of_pairs
        return float(self._correction["attempts"][-1]["accuracy"] if self._correction else self._table["accuracy"])

    @property
    def is_measured(self) -> bool:
        """Whether the headline tells good from bad: without gold decisions it is what could be read."""
        section = self.metrics.get("judging", {}).get(self._part)
        return self.headline_of_pairs is not None or judging.measured(section) == "accuracy"

    @property
    def headline_of_pairs(self) -> float | None:
        """The share of pairs that are judged right; None where there are no pairs."""
        return _pairs_accuracy(self.metrics, self._part)

    @property
    def overall(self) -> dict[str, Any]:
        """What became of the first attempts by the last; empty where there is one attempt."""
        return overall(self._correction) if self._correction else {}

    @property
    def rank(self) -> tuple[float, float]:
        """What checkpoints are selected by: the headline, then what the last attempt gains on the first (0 for one)."""
        return self.headline, float(overall(self._correction)["delta"]) if self._correction else 0.0

    @property
    def _part(self) -> str:
        return "greedy" if "greedy" in self.metrics else "sampled"

    @property
    def _table(self) -> Mapping[str, Any]:
        table: Mapping[str, Any] = self.metrics[self._part]
        return table

    @property
    def _correction(self) -> Mapping[str, Any]:
        section: Mapping[str, Any] = self.metrics.get("correction", {}).get(self._part, {})
        return section


class Part(Protocol):
    """Samples and grades one part of an evaluation, or the next attempt of one."""

    def __call__(self, kind: str, n: int, sampling: Sampling, before: RolloutSet | None = None) -> GradedSet:
        """``n`` completions per problem, or per rollout of ``before`` as its next turn."""
        ...


def evaluate(
    ctx: Context, name: str, policy: Checkpoint, problems: ProblemSet, split: str, part: Part, max_new_tokens: int
) -> Evaluation:
    """Run or replay an evaluation. Its seed names neither round nor arm, so that differences are paired."""
    settings = ctx.recipe.evaluate
    parts: dict[str, dict[str, GradedSet]] = {}
    if settings.greedy:
        sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
        parts["greedy"] = _attempts(part, "greedy", 1, sampling, settings.turns)
    if settings.num_samples:
        sampling = Sampling(
            temperature=settings.temperature, max_new_tokens=max_new_tokens, logprobs=ctx.task.reads_logps
        )
        parts["sampled"] = _attempts(part, "sampled", settings.num_samples, sampling, settings.turns)
    graded = {key: rows for attempts in parts.values() for key, rows in attempts.items()}
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
            tables: dict[str, Any] = {key: table_of(attempts[key]) for key, attempts in parts.items()}
            for key, attempts in parts.items():
                for title, table in ctx.task.tables(_groups(attempts[key])).items():
                    tables.setdefault(title, {})[key] = table
            if settings.turns > 1:
                tables["correction"] = {key: _correction_of(attempts) for key, attempts in parts.items()}
            step = step.commit({"split": split, "num_problems": len(problems), **tables})
    ctx.record(step, "evaluate", new=new)
    evaluation = Evaluation(policy=policy, split=split, step=name, metrics=step.result)
    if new:
        ctx.progress.end(name, describe(evaluation))
    return evaluation


def _attempts(part: Part, name: str, n: int, sampling: Sampling, turns: int) -> dict[str, GradedSet]:
    """The attempts of one part by name, in order."""
    latest = part(name, n, sampling)
    attempts = {name: latest}
    for turn in range(2, turns + 1):
        latest = attempts[f"{name}-turn-{turn}"] = part(f"{name}-turn-{turn}", 1, sampling, latest.rollouts)
    return attempts


def _correction_of(attempts: Mapping[str, GradedSet]) -> dict[str, Any]:
    return correction_section([_rows(graded) for graded in attempts.values()])


def _rows(graded: GradedSet) -> list[Graded]:
    return [row for problem in graded.problems for row in graded.of_problem(problem.id)]


def _groups(graded: GradedSet) -> list[tuple[Problem, list[Graded]]]:
    return [(problem, graded.of_problem(problem.id)) for problem in graded.problems]


def table_of(graded: GradedSet) -> dict[str, Any]:
    """Accuracy, pass@k, maj@k and shares of what went wrong (``metrics.summarise``)."""
    return summarise([graded.of_problem(problem.id) for problem in graded.problems])


def describe(evaluation: Evaluation) -> str:
    """One line: accuracy and interval of each part, what the last attempt of several makes of it, and the accuracy on pairs
    where there are pairs."""
    parts = []
    for key in ("greedy", "sampled"):
        table = evaluation.metrics.get(key)
        if table:
            low, high = table["interval"]
            further = _attempted(evaluation.metrics, key) + _paired(evaluation.metrics, key)
            what = judging.measured(evaluation.metrics.get("judging", {}).get(key)).removeprefix("accuracy")
            parts.append(f"{key}{f' {what}' if what else ''} {table['accuracy']:.1%} [{low:.1%}, {high:.1%}]{further}")
    return f"{evaluation.split}: " + ", ".join(parts)


def _attempted(metrics: Mapping[str, Any], part: str) -> str:
    if "correction" not in metrics:
        return ""
    change = overall(metrics["correction"][part])
    return f", attempt {change['to']} {change['accuracy_last']:.1%} ({100 * change['delta']:+.1f})"


def _pairs_accuracy(metrics: Mapping[str, Any], part: str) -> float | None:
    section = metrics.get("judging", {}).get(part)
    return judging.headline(section) if section else None


def _paired(metrics: Mapping[str, Any], part: str) -> str:
    accuracy = _pairs_accuracy(metrics, part)
    return "" if accuracy is None else f", pairs right {accuracy:.1%}"
