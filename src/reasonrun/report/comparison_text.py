"""A comparison as a person or a program reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from reasonrun.report.comparison import Cost, PartComparison, RunComparison
from reasonrun.report.printable import printable
from reasonrun.report.run_record import RunRecord

_COSTS = {
    "num_generated_tokens": "tokens generated in rounds",
    "num_evaluation_tokens": "tokens generated in evaluations",
    "num_trained_tokens": "tokens trained on",
    "num_optimizer_steps": "optimizer steps",
    "seconds": "seconds",
}
_LEGEND = (
    "difference: points, with a paired 95 % interval over items, each evaluation for itself;",
    "up/down: items right more often and less often, with one sample wrong->right and right->wrong;",
    "not distinguishable: the interval holds 0, or McNemar's exact p is not below 0.05;",
    "needs: items that would tell such a difference with 80 % power, two-sided 5 %",
)


def describe_comparison(baseline: RunRecord, other: RunRecord, comparison: RunComparison) -> list[str]:
    """A pair as lines: fields that differ, scores of what both measured, what one of them lacks."""
    lines = [f"{baseline.path} -> {other.path}", "", "recipe"]
    lines += [f"  {change.path}: {_value(change.old)} -> {_value(change.new)}" for change in comparison.recipe]
    lines += [] if comparison.recipe else ["  no difference"]
    header = ["scores", "items", "share right", "difference", "up/down", "McNemar p", "verdict"]
    lines += ["", *_LEGEND]
    lines += _aligned([header, *(_row(part) for part in comparison.parts)])
    lines += [
        f"only {run.path} ({run.state}) has: {', '.join(names)}"
        for run, names in ((baseline, comparison.only_baseline), (other, comparison.only_other))
        if names
    ]
    return lines


def _value(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value))


def _row(part: PartComparison) -> list[str]:
    change = part.difference
    samples = f" x {part.num_samples}" if part.num_samples > 1 else ""
    return [
        f"{part.name} {part.part}",
        f"{part.num_items}{samples}",
        f"{part.baseline:.1%} -> {part.other:.1%}",
        f"{100 * change.difference:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
        f"{part.num_improved}/{part.num_worsened}",
        "-" if part.mcnemar_p is None else f"{part.mcnemar_p:.3g}",
        verdict(part),
    ]


def verdict(part: PartComparison) -> str:
    """What the interval says, in words."""
    if part.is_distinguishable:
        return "better" if part.difference.difference > 0 else "worse"
    if part.is_zero:
        same = part.num_improved == part.num_worsened == 0
        return "not distinguishable: the same on every item" if same else "not distinguishable: the difference is 0"
    if part.items_needed is None:
        return "not distinguishable: one item has no spread"
    return f"not distinguishable; needs about {part.items_needed:,} items"


def describe_costs(runs: Sequence[RunRecord], costs: Sequence[Cost]) -> list[str]:
    """A table of what each run took."""
    table = [["cost", *(f"{run.path} ({run.state})" for run in runs)]]
    values = [asdict(cost) for cost in costs]
    for key, label in _COSTS.items():
        table.append([label, *(f"{value[key]:,.1f}" if key == "seconds" else f"{value[key]:,}" for value in values)])
    return _aligned(table)


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def comparison_document(
    runs: Sequence[RunRecord], costs: Sequence[Cost], comparisons: Sequence[RunComparison]
) -> dict[str, Any]:
    """The same as one JSON value; ``comparisons`` are of every run after the first with the first."""
    return {
        "baseline": str(runs[0].path),
        "runs": [
            {"directory": str(run.path), "state": run.state, "cost": asdict(cost)}
            for run, cost in zip(runs, costs, strict=True)
        ],
        "comparisons": [
            {
                "run": str(run.path),
                "recipe": [asdict(change) for change in comparison.recipe],
                "evaluations": [_part_document(part) for part in comparison.parts],
                "only_in_baseline": list(comparison.only_baseline),
                "only_in_run": list(comparison.only_other),
            }
            for run, comparison in zip(runs[1:], comparisons, strict=True)
        ],
    }


def _part_document(part: PartComparison) -> dict[str, Any]:
    value = asdict(part)
    change = value.pop("difference")
    return {**value, **change, "distinguishable": part.is_distinguishable, "verdict": verdict(part)}
