"""``reasonrun eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from reasonrun import plugins
from reasonrun.cli.main import echo, print_json
from reasonrun.cli.progress import PlainProgress
from reasonrun.cli.submitting import own_arguments, submitted_run
from reasonrun.errors import Finding, RecipeError
from reasonrun.judging import measured
from reasonrun.recipe import load
from reasonrun.running import RunOptions, run, run_directory
from reasonrun.workers.signals import StopFlag


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """The flags of ``reasonrun eval``."""

    task: str
    overrides: tuple[str, ...]
    model: str
    k: int
    turns: int
    split: str
    num_problems: int
    style: str
    engine: str
    directory: Path | None
    data: str = ""

    def recipe_overrides(self) -> list[str]:
        """The flags as overrides of the recipe ``eval``; what the user wrote last wins.

        Raises:
            RecipeError: a file is given for a task that reads none.
        """
        return [
            f"task.name={self.task}",
            f"engine={self.engine}",
            *model_overrides(self.model),
            f"method.split={self.split}",
            f"evaluate.num_samples={self.k}",
            f"evaluate.num_problems={self.num_problems}",
            f"evaluate.style={self.style}",
            # one turn is no override: the directory's name holds all of them, and older runs must go on
            *([f"evaluate.turns={self.turns}"] if self.turns != 1 else []),
            *data_overrides(self.task, self.data),
            *self.overrides,
        ]


def model_overrides(model: str) -> list[str]:
    """``tiny``, ``smollm2``, ``hub:owner/name`` or a folder."""
    if model in ("tiny", "smollm2"):
        return [f"model={model}"]
    kind, value = ("hub", model[4:]) if model.startswith("hub:") else ("path", str(Path(model).resolve()))
    return ["model.name=null", f"model.{kind}={value}"]


def data_overrides(task: str, data: str) -> list[str]:
    """The file to measure on as the task's setting ``data``."""
    if not data:
        return []
    if "data" not in plugins.find("tasks", task).Settings.model_fields:
        raise RecipeError(
            f"--data {data}: the task {task} has no setting `data`, it does not measure on a file of yours",
            hint="leave --data out, or take a task that reads items from one file, such as judge",
        )
    return [f"task.data={data}"]


def eval_command(request: EvalRequest, *, as_json: bool) -> None:
    """Measure, keep every item, print the table. The same command continues an interrupted evaluation."""
    recipe = load("eval", request.recipe_overrides())
    directory = run_directory(recipe, request.directory)
    if submitted_run(recipe, directory, own_arguments(), as_json=as_json):
        return
    with StopFlag("reasonrun eval") as stop:
        options = RunOptions(
            directory=directory,
            command="reasonrun eval",
            interrupted=stop,
        )
        outcome = run(recipe, options, PlainProgress(Console(stderr=True)))
    findings = outcome.result.get("findings", ())
    if as_json:
        print_json({"directory": str(directory), "result": outcome.result})
        _leave_with(findings)
        return
    echo(
        f"{request.task} {request.split}: {outcome.result['num_problems']} problems, style {request.style},"
        f" {getattr(recipe.task, 'num_shots', 0) if request.style == 'few_shot' else 0} demonstrations,"
        f" model {request.model} ({outcome.result['policy']['weights'][:12]})"
    )
    for line in format_metrics(outcome.result):
        echo(line)
    echo(f"items: {directory}/steps/evaluate/")
    for finding in findings:
        echo(f"finding: {finding}")
    _leave_with(findings)


def _leave_with(findings: Sequence[str]) -> None:
    if findings:
        raise typer.Exit(Finding.exit_code)


def format_metrics(result: dict[str, Any]) -> list[str]:
    """Each part of an evaluation with its intervals."""
    lines = []
    for part in ("greedy", "sampled"):
        if part not in result:
            continue
        table = result[part]
        low, high = table["interval"]
        section = result.get("correction", {}).get(part)
        which = " (first attempt)" if section else ""
        judging = result.get("judging", {}).get(part)
        lines.append(f"{part:8s} {measured(judging)} {table['accuracy']:.1%} [{low:.1%}, {high:.1%}]{which}")
        lines.append(
            f"{'':8s} truncated {table['truncated_share']:.1%}, unparseable {table['unparseable_share']:.1%},"
            f" ungraded {table['ungraded_share']:.1%}"
        )
        many = {name: value for name, value in table.items() if name.startswith(("pass@", "maj@"))}
        if table["num_samples"] > table["num_problems"]:
            lines.append(f"{'':8s} " + ", ".join(f"{name} {value:.1%}" for name, value in many.items()))
        lines += [f"{'':8s} {line}" for line in _correction_lines(section)] if section else []
        lines += [f"{'':8s} {line}" for line in _judging_lines(judging)] if judging else []
    return lines


def _correction_lines(section: dict[str, Any]) -> list[str]:
    """The further attempts, then what became of the rows from one attempt to another."""
    lines = []
    for number, attempt in enumerate(section["attempts"][1:], start=2):
        low, high = attempt["interval"]
        tokens = "" if attempt["mean_num_tokens"] is None else f", {attempt['mean_num_tokens']:.1f} tokens"
        lines.append(
            f"attempt {number}: {attempt['accuracy']:.1%} [{low:.1%}, {high:.1%}], truncated"
            f" {attempt['truncated_share']:.1%}, unparseable {attempt['unparseable_share']:.1%}{tokens}"
        )
    for change in section["changes"]:
        low, high = change["delta_interval"]
        p = "" if change["mcnemar_p"] is None else f", McNemar p {change['mcnemar_p']:.3g}"
        lines += [
            f"{change['from']} -> {change['to']}: delta {100 * change['delta']:+.1f} points"
            f" [{100 * low:+.1f}, {100 * high:+.1f}] (SE {100 * change['delta_se']:.1f}){p}",
            f"        wrong to right {change['incorrect_to_correct']:.1%}, right to wrong"
            f" {change['correct_to_incorrect']:.1%} of all;"
            f" {_percent(change['incorrect_to_correct_given_incorrect'])} of wrong,"
            f" {_percent(change['correct_to_incorrect_given_correct'])} of right",
            f"        answer changed {change['changed_share']:.1%}"
            f" ({_percent(change['changed_share_given_incorrect'])} of wrong), same text"
            f" {change['identical_text_share']:.1%}, edit ratio {change['edit_ratio']:.2f}",
        ]
    return lines


def _judging_lines(section: dict[str, Any]) -> list[str]:
    """How a judge's decisions agree with gold, how they spread, then several draws together and pairs."""
    lines = []
    if section["exact"]["value"] is not None:
        near = f", within 1 {_share(section['within_1'])}" if "within_1" in section else ""
        error = section.get("mean_error")
        lines.append(
            f"exact {_share(section['exact'])}{near}" + ("" if error is None else f", mean error {error:+.2f}")
        )
        if "pearson" in section:
            names = ("Pearson", "Spearman", "Kendall")
            lines.append(", ".join(f"{name} {_number(section[name.lower()])}" for name in names))
    lines.append(f"given {_spread(section, '')}")
    if section["gold_entropy_bits"] is not None:
        error = section.get("calibration_error")
        lines.append(
            f"gold  {_spread(section, 'gold_')}" + ("" if error is None else f", calibration error {error:.2f}")
        )
    reasons = ", ".join(f"{reason} {count}" for reason, count in section["unread_reasons"].items())
    tokens = "" if section["mean_num_tokens"] is None else f"{section['mean_num_tokens']:.1f} tokens, "
    lines.append(
        f"unread {section['unread_share']:.1%}{f' ({reasons})' if reasons else ''},"
        f" {tokens}{section['mean_num_chars']:.0f} characters"
    )
    lines += _draws_lines(section["draws"]) if "draws" in section else []
    return lines + (_pairs_lines(section["pairs"]) if "pairs" in section else [])


def _spread(section: dict[str, Any], which: str) -> str:
    counts = " ".join(f"{name}:{count}" for name, count in section[f"{which}histogram"].items())
    bits = section[f"{which}entropy_bits"]
    return counts + ("" if bits is None else f", entropy {bits:.2f} bits")


def _draws_lines(draws: dict[str, Any]) -> list[str]:
    pearson = (
        "" if draws.get("self_consistency_pearson") is None else f" (Pearson {draws['self_consistency_pearson']:.3f})"
    )
    together = [f"self-consistency {_share(draws['self_consistency'])}{pearson}"]
    if "mean_within_1" in draws:
        pearson = "" if draws["mean_pearson"] is None else f" (Pearson {draws['mean_pearson']:.3f})"
        together.append(f"mean score within 1 {_share(draws['mean_within_1'])}{pearson}")
    lines = [f"{draws['num_draws']} draws: agreement {_share(draws['agreement'])}"]
    if draws["oracle"]["value"] is not None:
        lines += [
            f"        {', '.join(together)}",
            f"        best of n {_share(draws['best_of_n'])}, oracle {_share(draws['oracle'])}",
        ]
    return lines


def _pairs_lines(pairs: dict[str, Any]) -> list[str]:
    left_out = f" ({pairs['num_incomplete']} incomplete)" if pairs["num_incomplete"] else ""
    lines = [f"{pairs['num_pairs']} pairs{left_out}: {_pair_table(pairs)}"]
    for name, table in pairs.get("by_category", {}).items():
        lines.append(f"        {name} ({table['num_pairs']}): {_pair_table(table)}")
    if "category_mean" in pairs:
        lines.append(f"        mean of categories {pairs['category_mean']:.1%}")
    return lines


def _pair_table(table: dict[str, Any]) -> str:
    if "tie_share" in table:
        which = f"ties {_percent(table['tie_share'])}"
    else:
        bias = table["position_bias"]
        low, high = bias["interval"] or (0.0, 0.0)
        points = f"{100 * bias['value']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]" if bias["interval"] else "-"
        which = (
            f"both orders {_share(table['accuracy_both'])}, consistent {_share(table['consistent_share'])},"
            f" for A {points}"
        )
    return f"accuracy {_share(table['accuracy'])}, {which}, unread {_percent(table['unread_share'])}"


def _share(measured: dict[str, Any]) -> str:
    if measured["value"] is None:
        return "-"
    low, high = measured["interval"]
    return f"{measured['value']:.1%} [{low:.1%}, {high:.1%}]"


def _number(measured: dict[str, Any]) -> str:
    if measured["value"] is None:
        return "-"
    low, high = measured["interval"] or (None, None)
    return f"{measured['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
