"""``reasonrun repair``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reasonrun.cli.main import echo, print_json
from reasonrun.errors import RunFailed
from reasonrun.ledger.catalogue import run_identity
from reasonrun.ledger.damage import Damage
from reasonrun.ledger.repairing import Repair, apply_repair, plan_repair
from reasonrun.ledger.run_dir import RunDir
from reasonrun.report.run_record import check_is_run
from reasonrun.report.verification import find


def repair_command(run: Path, *, do_it: bool, as_json: bool) -> int:
    """Say what would be moved, or move it under the run's lock. The exit code: 1 where damage is left, else 0.

    Raises:
        RunConflict: another process works on the run.
    """
    check_is_run(run, or_its_remains=True)
    findings = find(run, deep=True)
    repair, num_lost = plan_repair(run, findings), 0
    is_readable = not any(damage.path == "run.json" for damage in repair.left)
    if do_it and not is_readable:
        left = next(damage for damage in repair.left if damage.path == "run.json")
        raise RunFailed(f"{run / left.path} {left.what}, so nothing was moved.", hint=left.way_out(str(run)))
    if do_it and not repair.is_empty:
        with RunDir.open(run, identity=run_identity(run), command=f"reasonrun repair {run}", reopen=True) as held:
            findings = find(run, deep=True)  # nobody changes anything any more
            repair = plan_repair(run, findings)
            num_lost = apply_repair(held, repair)
    if as_json:
        print_json(_document(run, repair, findings, is_done=do_it, num_lost=num_lost))
    else:
        for line in _describe(run, repair, is_done=do_it, num_lost=num_lost):
            echo(line)
    return 1 if repair.left else 0


def _document(run: Path, repair: Repair, findings: list[Any], *, is_done: bool, num_lost: int) -> dict[str, Any]:
    damages = [finding.document(str(run)) for finding in findings if isinstance(finding, Damage)]
    return {"run": str(run), "done": is_done, **repair.document(), "num_lines_given_up": num_lost, "damages": damages}


def _describe(run: Path, repair: Repair, *, is_done: bool, num_lost: int) -> list[str]:
    if repair.is_empty and not repair.left:
        return [f"{run}: nothing to repair"]
    lines = [f"to quarantine: step {step}" for step in repair.steps]
    lines += [f"to quarantine: {file}" for file in repair.files]
    lines += [
        f"log of step {step}: {what}; the rows that verify stay, the whole log is kept in quarantine"
        for step, what in repair.logs
    ]
    if repair.caches:
        lines.append(f"removed: {len(repair.caches)} files of caches in derived, which are built again")
    lines += [f"left as it is: {damage.path} {damage.what}; {damage.way_out(str(run))}" for damage in repair.left]
    if repair.is_empty:
        return [*lines, f"{run}: nothing can be repaired by moving files"]
    if not is_done:
        return [*lines, f"{run}: nothing was touched; --yes does this"]
    given_up = f", {num_lost} lines of logs given up" if num_lost else ""
    return [*lines, f"{run}: done{given_up}; the same train command makes again what is missing"]
