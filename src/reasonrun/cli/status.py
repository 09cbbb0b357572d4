"""``reasonrun status``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reasonrun.cli.main import echo, print_json
from reasonrun.ledger.catalogue import read_lines, step_states
from reasonrun.report.rounds import format_result, format_table, round_table, seconds_by_step
from reasonrun.report.run_record import attempt_notes, check_is_run
from reasonrun.report.spending import Spending, format_spending, spending, spending_document


def status_command(run: Path | None, *, as_json: bool) -> None:
    """One run in detail, or a line for each run under ``runs/``. Reads only; never takes the lock."""
    if run is not None:
        state = read_run(run)
        if as_json:
            print_json(state)
            return
        for line in describe(run, state):
            echo(line)
        return
    runs = sorted(path.parent for path in Path("runs").glob("*/run.json"))
    states = {str(path): read_run(path) for path in runs}
    if as_json:
        print_json(states)
    elif not states:
        echo("no runs under ./runs; start one with: reasonrun train star_arith")
    for path, state in {} if as_json else states.items() if states else ():
        echo(f"{path}  {state['state']}  {state['num_steps']} steps committed")


def read_run(run: Path) -> dict[str, Any]:
    """What the files of a run say. Raises RecipeError when the folder is no run."""
    check_is_run(run)
    committed = {name for name, state in step_states(run).items() if state == "committed"}
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["step"] in committed]  # others were set aside since
    notes = attempt_notes(run)
    done = run / "_OK.json"
    return {
        "state": "finished" if done.exists() else "unfinished",
        "num_attempts": len(list(run.glob("attempts/*"))),
        "num_steps": len(committed),
        "steps": rows,
        "seconds": seconds_by_step(notes),
        "notes": notes,
        "endpoints": spending_document(spending(run, rows)),
        "result": json.loads(done.read_text())["content"]["result"] if done.exists() else None,
    }


def describe(run: Path, state: dict[str, Any]) -> list[str]:
    """A run as text: its state, its rounds, its result."""
    lines = [f"{run}: {state['state']}, {state['num_steps']} steps committed, {state['num_attempts']} attempts", ""]
    lines += format_table(round_table(state["steps"], state["notes"]))
    if state["endpoints"]:
        lines += ["", *format_spending([Spending(**line) for line in state["endpoints"]])]
    if state["result"] and "test" in state["result"]:
        lines += ["", *format_result(state["result"])]
        lines += [f"finding: {finding}" for finding in state["result"].get("findings", ())]
    return lines
