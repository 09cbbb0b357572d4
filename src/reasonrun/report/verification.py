"""Everything that is wrong with a run directory at once, as text and as a document. Takes no lock, changes no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.ledger.catalogue import step_states
from reasonrun.ledger.damage import PROMISES, Damage, Finding, Note
from reasonrun.ledger.files import Files
from reasonrun.ledger.lock import LOCK_NAME, Owner, holder
from reasonrun.ledger.verifying import verify_ledger
from reasonrun.report.joins import Join, settled
from reasonrun.report.record_checks import check_inputs, check_metrics, check_weights, committed_steps


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was looked at and what was found.

    Attributes:
        path: the run directory.
        deep: whether every byte and every row was looked at.
        num_steps: committed steps.
        num_begun: steps that were begun and are not committed.
        is_finished: whether the run says that it is.
        findings: damage, and notes about what a stop leaves behind.
        worked_on_by: the live process that holds the run, if one does.
    """

    path: Path
    deep: bool
    num_steps: int
    num_begun: int
    is_finished: bool
    findings: tuple[Finding, ...]
    worked_on_by: Owner | None

    @property
    def damages(self) -> list[Damage]:
        return [finding for finding in self.findings if isinstance(finding, Damage)]

    @property
    def notes(self) -> list[Note]:
        return [finding for finding in self.findings if isinstance(finding, Note)]


def verify_run(path: Path, *, deep: bool) -> Verification:
    """Look at a run, finished or not.

    Where a live process works on it, what looks damaged is looked at again, so that a file caught between two operations
    is not called so.
    """
    owner = holder(path / LOCK_NAME)
    findings = find(path, deep=deep)
    if owner is not None and any(isinstance(finding, Damage) for finding in findings):
        again = set(find(path, deep=deep))
        findings = [finding for finding in findings if finding in again]
    states = list(step_states(path).values())
    return Verification(
        path=path,
        deep=deep,
        num_steps=states.count("committed"),
        num_begun=states.count("begun"),
        is_finished=(path / "_OK.json").exists(),
        findings=tuple(findings),
        worked_on_by=owner,
    )


def find(path: Path, *, deep: bool) -> list[Finding]:
    """Every finding, each once."""
    found: list[Finding | Join] = list(verify_ledger(path, Files(), deep=deep))
    steps = committed_steps(path)
    found += check_metrics(path, steps)
    found += check_inputs(steps)
    found += check_weights(path, steps)
    if deep:
        from reasonrun.report.row_checks import check_rows  # numpy and pyarrow

        # Of a step whose files are damaged nothing more is said; what concerns it as a whole leaves its rows readable.
        damages = [one for one in found if isinstance(one, Damage)]
        inside = {damage.step for damage in damages if damage.path.startswith(f"steps/{damage.step}/")}
        found += check_rows(path, steps, inside)
    return settled(dict.fromkeys(found))


def verification_document(verification: Verification) -> dict[str, Any]:
    """As plain data."""
    owner = verification.worked_on_by
    return {
        "run": str(verification.path),
        "deep": verification.deep,
        "state": "finished" if verification.is_finished else "unfinished",
        "num_steps": verification.num_steps,
        "num_begun": verification.num_begun,
        "worked_on_by": None if owner is None else {"pid": owner.pid, "host": owner.host, "command": owner.command},
        "ok": not verification.damages,
        "damages": [damage.document(str(verification.path)) for damage in verification.damages],
        "notes": [{"path": note.path, "what": note.what} for note in verification.notes],
    }


def describe_verification(verification: Verification) -> list[str]:
    """As text: what is damaged, then notes, then the sum."""
    lines: list[str] = []
    for damage in verification.damages:
        lines += [
            f"damaged: {damage.path} {damage.what}",
            f"  promise: {damage.promise}, {PROMISES[damage.promise]}",
            f"  to do:   {damage.way_out(str(verification.path))}",
        ]
    lines += [f"note: {note.path} {note.what}" for note in verification.notes]
    if verification.worked_on_by is not None:
        owner = verification.worked_on_by
        lines.append(f"note: process {owner.pid} is working on this run: {owner.command}")
    return [*lines, _sum(verification)]


def _sum(verification: Verification) -> str:
    state = "finished" if verification.is_finished else "unfinished"
    steps = f"{verification.num_steps} steps committed, {verification.num_begun} begun"
    looked = "every file and row" if verification.deep else "sizes, seals and records; --deep reads every file and row"
    num_damaged = len(verification.damages)
    what = f"{num_damaged} damaged" if num_damaged else "nothing is damaged"
    return f"{verification.path}: {state}, {steps}: {what} ({looked})"
