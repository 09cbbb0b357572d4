"""Two runs side by side: what differs in their recipes, and what that did to every item of the evaluations they share.

Runs are compared in pairs, each with the first. Nothing is averaged over seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonrun.errors import RecipeError
from reasonrun.metrics import ROUNDING, Difference, items_needed, mcnemar_exact, paired_bootstrap
from reasonrun.report.evaluations import EvaluationPart, evaluation_steps, part_steps, read_part
from reasonrun.report.rounds import seconds_by_step
from reasonrun.report.run_record import RunRecord, attempt_notes
from reasonrun.report.spending import spending, total

ABSENT = "(absent)"
SIGNIFICANCE = 0.05
_EXAMPLES = 3  # problems named when sets are unequal


@dataclass(frozen=True, kw_only=True)
class RecipeDifference:
    """A field that two recipes set differently; ``ABSENT`` where one does not know it."""

    path: str
    old: Any
    new: Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the committed steps of a run took. Seconds are summed over all attempts; tokens of a step count once."""

    num_generated_tokens: int
    num_evaluation_tokens: int
    num_trained_tokens: int
    num_optimizer_steps: int
    seconds: float
    num_endpoint_prompt_tokens: int
    num_endpoint_completion_tokens: int  # which are among those generated
    endpoint_usd: float | None  # where prices of all endpoints are known


@dataclass(frozen=True, kw_only=True)
class PartComparison:
    """One part of one evaluation in two runs.

    Attributes:
        name: the evaluation.
        part: ``greedy`` or ``sampled``, or a further attempt: ``greedy turn 2``.
        split: of the problems.
        num_items: problems in both.
        num_samples: completions per problem.
        baseline: mean share of right completions in the first run.
        other: the same in the second.
        difference: ``other - baseline`` with its paired 95 % interval over problems.
        num_improved: problems with a larger share in the second run; with one sample, wrong -> right.
        num_worsened: problems with a smaller share; with one sample, right -> wrong.
        mcnemar_p: exact p-value of the flips, where every problem has one sample.
        items_needed: about how many problems would tell this difference; None when it is 0.
    """

    name: str
    part: str
    split: str
    num_items: int
    num_samples: int
    baseline: float
    other: float
    difference: Difference
    num_improved: int
    num_worsened: int
    mcnemar_p: float | None
    items_needed: int | None

    @property
    def is_zero(self) -> bool:
        return abs(self.difference.difference) < ROUNDING

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval leaves 0 out and the exact test, where there is one, agrees.

        A percentile bootstrap is too sure of a handful of flips: four wrong -> right and none back is +10 [+2.5, +20]
        of 40 items, and p = 0.125.
        """
        is_off_zero = self.difference.low > ROUNDING or self.difference.high < -ROUNDING
        return is_off_zero and (self.mcnemar_p is None or self.mcnemar_p < SIGNIFICANCE)


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """A run beside the baseline. ``only_baseline`` and ``only_other`` name the parts that one of them lacks."""

    recipe: tuple[RecipeDifference, ...]
    parts: tuple[PartComparison, ...]
    only_baseline: tuple[str, ...]
    only_other: tuple[str, ...]


def compare_runs(baseline: RunRecord, other: RunRecord) -> RunComparison:
    """Compare two runs on every evaluation that both have.

    Raises:
        RecipeError: they have none in common, or one on unequal problems or with unequal settings.
        RunFailed: a committed table is damaged.
    """
    old, new = _part_names(baseline), _part_names(other)
    common = [key for key in old if key in new]
    if not common:
        raise RecipeError(
            f"{baseline.path} ({baseline.state}) and {other.path} ({other.state}) have no evaluation in common",
            hint=f"the first has {_listed(old)}; the second has {_listed(new)}",
        )
    parts: list[PartComparison] = []
    unequal: dict[str, list[str]] = {}  # by reason, the parts that it holds for
    for name, part in common:
        a = read_part(baseline, name, old[name, part], part)
        b = read_part(other, name, new[name, part], part)
        found = mismatches(a, b)
        for reason in found:
            unequal.setdefault(reason, []).append(f"{name} {part}")
        if not found:
            parts.append(compare_parts(a, b))
    if unequal:
        reasons = "\n  ".join(f"{reason} ({', '.join(where)})" for reason, where in unequal.items())
        raise RecipeError(
            f"{baseline.path} and {other.path} were not evaluated alike, so their scores cannot be paired:\n  {reasons}",
            hint="run one of them again with the task.* and evaluate.* fields of the other",
        )
    return RunComparison(
        recipe=tuple(recipe_differences(baseline.recipe, other.recipe)),
        parts=tuple(parts),
        only_baseline=tuple(" ".join(key) for key in old if key not in new),
        only_other=tuple(" ".join(key) for key in new if key not in old),
    )


def _part_names(run: RunRecord) -> dict[tuple[str, str], str]:
    """The evaluation step of every part, by (name, part); tests first, since they are what a run ends with."""
    steps = evaluation_steps(run)
    order = ["test base", "test last", "test best"]
    names = sorted(steps, key=lambda name: order.index(name) if name in order else len(order))
    return {(name, part): steps[name] for name in names for part in part_steps(run, steps[name])}


def _listed(parts: Mapping[tuple[str, str], str]) -> str:
    return ", ".join(" ".join(key) for key in parts) or "none"


def compare_parts(a: EvaluationPart, b: EvaluationPart) -> PartComparison:
    """The same items in two runs; they must be the same, see ``mismatches``."""
    shares_a = [item.share for item in a.items.values()]
    shares_b = [b.items[problem_id].share for problem_id in a.items]
    pairs = list(zip(shares_a, shares_b, strict=True))
    num_improved, num_worsened = sum(y > x for x, y in pairs), sum(y < x for x, y in pairs)
    is_single = all(item.num_samples == 1 for item in a.items.values())
    return PartComparison(
        name=a.name,
        part=a.part,
        split=a.split,
        num_items=len(pairs),
        num_samples=a.settings["num_samples"],
        baseline=sum(shares_a) / len(pairs),
        other=sum(shares_b) / len(pairs),
        difference=paired_bootstrap(shares_a, shares_b),
        num_improved=num_improved,
        num_worsened=num_worsened,
        mcnemar_p=mcnemar_exact(num_worsened, num_improved) if is_single else None,
        items_needed=items_needed(shares_a, shares_b),
    )


def mismatches(a: EvaluationPart, b: EvaluationPart) -> list[str]:
    """Why scores of two evaluations cannot be paired, one line a reason; empty when they can."""
    keys = sorted({"split", *a.settings, *b.settings})
    settings_a, settings_b = {"split": a.split, **a.settings}, {"split": b.split, **b.settings}
    lines = [
        f"{key} is {settings_a.get(key, ABSENT)} and {settings_b.get(key, ABSENT)}"
        for key in keys
        if settings_a.get(key, ABSENT) != settings_b.get(key, ABSENT)
    ]
    common = [problem_id for problem_id in a.items if problem_id in b.items]
    other_reference = [i for i in common if a.items[i].reference != b.items[i].reference]
    other_prompt = [i for i in common if a.items[i].prompt != b.items[i].prompt]
    for what, ids in (
        ("problems only in the first", [i for i in a.items if i not in b.items]),
        ("problems only in the second", [i for i in b.items if i not in a.items]),
        ("problems with another reference", other_reference),
        ("problems asked with another prompt", other_prompt),
    ):
        if ids:
            more = ", …" if len(ids) > _EXAMPLES else ""
            lines.append(f"{len(ids)} {what}: {', '.join(ids[:_EXAMPLES])}{more}")
    return lines


def recipe_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[RecipeDifference]:
    """Fields of two resolved recipes that differ, by dotted path.

    Where another plug-in was chosen, fields that only one of the two has say nothing and are left out.
    """
    return list(_differences(old, new, ""))


def _differences(old: Any, new: Any, path: str) -> Iterator[RecipeDifference]:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        if old != new:
            yield RecipeDifference(path=path, old=old, new=new)
        return
    is_other_plugin = old.get("name", ABSENT) != new.get("name", ABSENT)
    for key in sorted({*old, *new}):
        if is_other_plugin and key != "name" and (key not in old or key not in new):
            continue
        yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else key)


def cost(run: RunRecord) -> Cost:
    """What the committed steps of a run took."""
    evaluations = {step.name for step in run.sample_steps() if step.is_evaluation}
    tokens = {row["step"]: row["num_completion_tokens"] for row in run.rows if "num_completion_tokens" in row}
    trainings: Sequence[Mapping[str, Any]] = [row for row in run.rows if row["verb"] == "train"]
    seconds, listed = seconds_by_step(attempt_notes(run.path)), {row["step"] for row in run.rows}
    asked = total([line for line in spending(run.path, run.rows) if line.step])
    return Cost(
        num_endpoint_prompt_tokens=asked.num_prompt_tokens,
        num_endpoint_completion_tokens=asked.num_completion_tokens,
        endpoint_usd=asked.usd if asked.model else None,
        num_generated_tokens=sum(count for step, count in tokens.items() if step not in evaluations),
        num_evaluation_tokens=sum(count for step, count in tokens.items() if step in evaluations),
        num_trained_tokens=sum(row["num_tokens"] for row in trainings),
        num_optimizer_steps=sum(row["num_steps"] for row in trainings),
        seconds=round(sum(spent for step, spent in seconds.items() if step in listed), 3),
    )
