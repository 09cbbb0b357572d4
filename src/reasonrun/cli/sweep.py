"""``reasonrun sweep``."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from reasonrun.cli.main import echo, print_json
from reasonrun.cli.progress import BarProgress, PlainProgress
from reasonrun.cli.submitting import own_arguments, submitted
from reasonrun.errors import RecipeError
from reasonrun.report.sweeps import format_markdown, format_text, sweep_table
from reasonrun.sweeping import (
    SUMMARIES,
    SweepOptions,
    SweepRun,
    expand,
    run_sweep,
    sweep_directory,
    sweep_exit_code,
)
from reasonrun.workers.signals import StopFlag


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """The arguments of ``reasonrun sweep``."""

    recipes: str | None
    overrides: tuple[str, ...]
    out: Path | None
    table_only: bool
    as_markdown: bool
    as_json: bool


def sweep_command(request: SweepRequest) -> int:
    """Make or continue the runs of a sweep and print their table.

    Returns:
        The exit code: 0, 5 when some ended in findings, 1 when some failed.
    """
    if request.recipes is None and not (request.table_only and request.out):
        raise RecipeError(
            "sweep: no recipe is named",
            hint="give a recipe and overrides such as seed=0,1,2; or --out DIR --table to print what is there",
        )
    runs = expand(request.recipes, request.overrides) if request.recipes else []
    out = request.out or sweep_directory(runs)
    if not request.table_only and submitted(runs[0].recipe, out, own_arguments(), as_json=request.as_json):
        return 0
    if request.table_only:
        summaries = read_summaries(out)
    else:
        summaries = _make(request, runs, out)
    exit_code = 0 if request.table_only else sweep_exit_code(summaries)
    table = sweep_table(summaries)
    if request.as_json:
        document = {"directory": str(out), "exit_code": exit_code, "runs": summaries, **table.to_json()}
        print_json(document)
        return exit_code
    for line in format_markdown(table) if request.as_markdown else format_text(table):
        echo(line)
    return exit_code


def _make(request: SweepRequest, runs: list[SweepRun], out: Path) -> list[dict[str, Any]]:
    command = shlex.join(["reasonrun", *sys.argv[1:]])
    console = Console(stderr=True)
    with StopFlag(command) as stop:
        options = SweepOptions(out=out, command=command, interrupted=stop)
        is_shown = console.is_terminal and not request.as_json
        with BarProgress(console) if is_shown else nullcontext(PlainProgress(console)) as progress:
            progress.say(f"{len(runs)} runs in {out}")
            return list(run_sweep(runs, options, progress))


def read_summaries(out: Path) -> list[dict[str, Any]]:
    """The summaries of the runs that have ended. Raises RecipeError when there are none."""
    paths = sorted((out / SUMMARIES).glob("*.json"))
    if not paths:
        raise RecipeError(
            f"{out / SUMMARIES} holds no summaries", hint="name the sweep's folder with --out, or run without --table"
        )
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
