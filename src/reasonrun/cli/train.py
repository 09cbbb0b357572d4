"""``reasonrun train``."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from reasonrun.cli.main import echo, print_json
from reasonrun.cli.progress import BarProgress, PlainProgress, SilentProgress
from reasonrun.cli.submitting import submitted_run
from reasonrun.errors import Finding
from reasonrun.ledger.catalogue import read_lines
from reasonrun.planning import Assumptions, compare, format_comparison, plan
from reasonrun.recipe import load
from reasonrun.report.rounds import format_result, format_table, round_table
from reasonrun.report.run_record import attempt_notes
from reasonrun.report.spending import format_spending, spending
from reasonrun.running import Outcome, RunOptions, run, run_directory
from reasonrun.workers.signals import StopFlag


def train_command(
    recipe: str,
    overrides: list[str],
    directory: Path | None,
    *,
    redo: str | None,
    prune: bool,
    accept_code: bool,
    as_json: bool,
) -> None:
    """Run or continue, then print where the result is and the table of rounds."""
    resolved = load(recipe, overrides)
    where = run_directory(resolved, directory)
    arguments = ["train", recipe, *overrides, *(["--run", str(directory)] if directory else [])]
    flags = [*(["--prune"] if prune else []), *(["--accept-code"] if accept_code else [])]
    once = ["--redo", redo] if redo else []
    if submitted_run(resolved, where, [*arguments, *flags], once=once, as_json=as_json):
        return
    command = " ".join(["reasonrun", *arguments])
    console = Console(stderr=True)
    with StopFlag(command) as stop:
        options = RunOptions(
            directory=where,
            command=command,
            redo=redo,
            prune=prune,
            accept_code=accept_code,
            interrupted=stop,
        )
        if console.is_terminal and not as_json:
            with BarProgress(console) as bars:
                outcome = run(resolved, options, bars)
        else:
            outcome = run(resolved, options, PlainProgress(console))
    if as_json:
        print_json({"directory": str(outcome.directory), "result": outcome.result})
    else:
        show(outcome)
    if not outcome.already_finished and not as_json:
        rows = read_lines(outcome.directory / "metrics.jsonl")
        for line in format_comparison(compare(plan(resolved, Assumptions(), SilentProgress()), rows)):
            echo(line)
    if outcome.result.get("findings"):
        raise typer.Exit(Finding.exit_code)


def show(outcome: Outcome) -> None:
    """The end of a run as a person reads it."""
    directory = outcome.directory
    if outcome.already_finished:
        echo(f"{directory} is finished; nothing to do")
    rows = read_lines(directory / "metrics.jsonl")
    echo("")
    for line in format_table(round_table(rows, attempt_notes(directory))):
        echo(line)
    echo("")
    for line in format_result(outcome.result):
        echo(line)
    for finding in outcome.result.get("findings", ()):
        echo(f"finding: {finding}")
    for line in format_spending(spending(directory, rows)):
        echo(line)
    last = outcome.result["last"]["step"]
    model = directory / "steps" / last / "model" if last != "base" else "the base model"
    echo(f"model: {model}")
    echo(f"run:   {directory} (metrics.jsonl, steps/)")
