"""``plan``: rehearse the very same method on a handful of problems and scale the counts to the real sets."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reasonrun.engines.scripted import Scripted
from reasonrun.errors import Finding
from reasonrun.hosts import further_models, scripted_host
from reasonrun.lab import Lab
from reasonrun.ledger.files import Files
from reasonrun.ledger.run_dir import RunDir
from reasonrun.models import resolve
from reasonrun.preflight import preflight
from reasonrun.recipe import ResolvedRecipe
from reasonrun.records import Problem
from reasonrun.rendering import Renderer
from reasonrun.running import conclude
from reasonrun.samples import Extent
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.verbs.context import Context, PlannedStep, Progress

REHEARSED_PROBLEMS = 16


class Assumptions(SettingsBase):
    """What a plan cannot know. Every value is shown, and ``--assume key=value`` changes it."""

    accuracy: float = setting(0.4, Effect.OPERATIONAL, "Share of right answers of the base model.", ge=0, le=1)
    gain: float = setting(0.05, Effect.OPERATIONAL, "Rise of that share with every training step.", ge=0, le=1)
    parse_rate: float = setting(0.98, Effect.OPERATIONAL, "Share of completions with a readable answer.", ge=0, le=1)
    tokens_per_completion: float = setting(
        0.0, Effect.OPERATIONAL, "Mean completion length; 0 takes the length of the task's own solutions.", ge=0
    )
    generated_per_second: float = setting(8000.0, Effect.OPERATIONAL, "Generation speed in tokens per second.", gt=0)
    trained_per_second: float = setting(12000.0, Effect.OPERATIONAL, "Training speed in tokens per second.", gt=0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps in order with their extents in the real run."""

    steps: list[PlannedStep]
    assumptions: Assumptions
    finding: str | None  # set when the rehearsal ended in one

    def seconds(self, step: PlannedStep) -> tuple[float, float]:
        """Expected and worst-case seconds of a step under the assumptions."""
        generating = self.assumptions.generated_per_second
        speed = {"sample": generating, "train": self.assumptions.trained_per_second}.get(step.verb)
        if not speed:
            return 0.0, 0.0
        return (
            step.tokens.expected / speed + step.generated.expected / generating,
            step.tokens.worst / speed + step.generated.worst / generating,
        )

    def to_json(self) -> dict[str, Any]:
        """Everything the table shows, as plain data."""
        return {
            "assumptions": self.assumptions.model_dump(),
            "finding": self.finding,
            "steps": [
                {
                    "step": step.step,
                    "verb": step.verb,
                    "unit": step.unit,
                    "units": _extent(step.units),
                    "tokens": _extent(step.tokens),
                    "seconds": [round(value, 1) for value in self.seconds(step)],
                    "disk_bytes": _extent(step.disk_bytes),
                }
                for step in self.steps
            ],
            "total": {
                "tokens_generated": round(sum(_generated(s).expected for s in self.steps)),
                "tokens_trained": round(sum(s.tokens.expected for s in self.steps if s.verb == "train")),
                "seconds": [round(sum(self.seconds(s)[i] for s in self.steps), 1) for i in (0, 1)],
                "peak_disk_bytes": round(sum(s.disk_bytes.worst for s in self.steps)),
            },
        }


def _generated(step: PlannedStep) -> Extent:
    """Tokens that a step samples, while it trains or as all it does."""
    return step.tokens if step.verb == "sample" else step.generated


def _extent(extent: Extent) -> dict[str, float | bool]:
    return {"expected": round(extent.expected), "worst": round(extent.worst), "exact": extent.exact}


def plan(recipe: ResolvedRecipe, assumptions: Assumptions, progress: Progress) -> Plan:
    """Rehearse ``recipe`` without a model, in a folder that is thrown away.

    Raises:
        ReasonrunError: whatever the method would meet with any model: two steps of one name, a style the task lacks.
    """
    task = recipe.classes["task"](recipe.task)
    base = resolve(recipe.model)
    renderer = Renderer.load(Path(base.path))
    problems: dict[str, Problem] = {}
    script = Scripted.Settings(
        accuracy=assumptions.accuracy,
        gain=assumptions.gain,
        spread=0.0,  # problems of one difficulty: the assumed accuracy is then the one that is rehearsed
        unanswered=1 - assumptions.parse_rate,
        truncated=0.0,
    )
    planned: list[PlannedStep] = []
    finding = None
    with (
        tempfile.TemporaryDirectory(prefix="reasonrun-plan-") as folder,
        RunDir.open(
            Path(folder) / "run",
            identity={"recipe": recipe.resolved},
            command="plan",
            files=Files(durable=False),
        ) as run_dir,
    ):
        context = Context(
            run_dir=run_dir,
            recipe=recipe,
            task=task,
            grader=task.grader(),
            renderer=renderer,
            base=base,
            models=further_models(recipe),
            host=scripted_host(script, task, problems, renderer),
            progress=progress,
            check_stop=lambda: None,
            planned=planned,
            max_problems=REHEARSED_PROBLEMS,
            tokens_per_completion=assumptions.tokens_per_completion,
            problems_by_id=problems,
        )
        lab = Lab(context)
        method = recipe.classes["method"](recipe.method)
        try:
            method.before(lab)
            preflight(lab, method, "off" if recipe.preflight == "off" else "report")  # what is assumed refuses nothing
            conclude(lab, method.run(lab))
        except Finding as stop:
            finding = str(stop)
    return Plan(steps=planned, assumptions=assumptions, finding=finding)


def format_plan(plan: Plan) -> list[str]:
    """The plan as aligned text lines; ``~`` marks what depends on data."""
    header = ["step", "units", "tokens", "worst", "seconds", "worst"]
    body = [header]
    for step in plan.steps:
        mark = "" if step.units.exact else "~"
        expected, worst = plan.seconds(step)
        body.append(
            [
                step.step,
                f"{mark}{step.units.expected:,.0f} {step.unit}",
                f"{step.tokens.expected:,.0f}" if step.tokens.worst else "-",
                f"{step.tokens.worst:,.0f}" if step.tokens.worst else "-",
                f"{expected:,.1f}" if step.tokens.worst else "-",
                f"{worst:,.1f}" if step.tokens.worst else "-",
            ]
        )
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    total = plan.to_json()["total"]
    lines.append("")
    lines.append(
        f"expected {total['tokens_generated']:,} generated and {total['tokens_trained']:,} trained tokens,"
        f" {total['seconds'][0]:,.0f} s (worst {total['seconds'][1]:,.0f} s),"
        f" {total['peak_disk_bytes'] / 1e6:,.0f} MB of disk; ~ depends on data"
    )
    lines.append("assumed: " + ", ".join(f"{k}={v:g}" for k, v in plan.assumptions.model_dump().items()))
    if plan.finding:
        lines.append(f"the rehearsal ended in a finding: {plan.finding}")
    return lines


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A plan beside the run that followed. Steps that the plan could count exactly must have that count."""

    as_planned: int
    other_size: dict[str, tuple[int, int]]  # exact in the plan, and yet another size in the run: planned, actual
    not_planned: list[str]
    not_run: list[str]
    tokens: dict[str, tuple[int, int, int]]  # by verb: expected, worst, actual

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


_ACTUAL_UNITS = {
    "sample": "num_rollouts",
    "grade": "num_rollouts",
    "judge": "num_rollouts",
    "train": "num_steps",
    "merge": "num_models",
    "curate": "num_rows",
    "cut": "num_rows",
    "logprobs": "num_pairs",
}


def compare(plan: Plan, rows: Sequence[dict[str, Any]]) -> Comparison:
    """``plan`` beside the lines of a finished run's ``metrics.jsonl``."""
    actual = {row["step"]: row for row in rows if row["verb"] in _ACTUAL_UNITS}
    planned = {step.step: step for step in plan.steps}
    other_size = {}
    for name in planned.keys() & actual.keys():
        units, row = planned[name].units, actual[name]
        done = int(row[_ACTUAL_UNITS[row["verb"]]])
        if units.exact and done != round(units.expected):
            other_size[name] = (round(units.expected), done)
    sampled = [_generated(step) for step in plan.steps]
    return Comparison(
        as_planned=len(planned.keys() & actual.keys()) - len(other_size),
        other_size=dict(sorted(other_size.items())),
        not_planned=sorted(actual.keys() - planned.keys()),
        not_run=sorted(
            name for name, step in planned.items() if name not in actual and (step.units.exact or step.units.expected)
        ),
        tokens={
            "generated": (
                round(sum(tokens.expected for tokens in sampled)),
                round(sum(tokens.worst for tokens in sampled)),
                sum(int(row.get("num_completion_tokens", 0)) for row in actual.values()),
            )
        },
    )


def format_comparison(comparison: Comparison) -> list[str]:
    """The comparison as text lines."""
    expected, worst, actual = comparison.tokens["generated"]
    lines = [
        f"plan:  {comparison.as_planned} steps as planned; {actual:,} tokens generated, {expected:,} expected,"
        f" at most {worst:,}"
    ]
    for name, (planned, done) in comparison.other_size.items():
        lines.append(f"       {name}: planned {planned:,}, was {done:,}")
    for label, names in (("not planned", comparison.not_planned), ("planned, not run", comparison.not_run)):
        if names:
            lines.append(f"       {label}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    return lines
