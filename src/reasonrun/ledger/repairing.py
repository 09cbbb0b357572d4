"""Repair moves, and never guesses: what is damaged, and all that was made from it, goes to quarantine to be made again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.ledger.catalogue import closure, step_states
from reasonrun.ledger.damage import Damage, Finding, Note
from reasonrun.ledger.quarantine import Quarantine
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.steps import wal_name

_CACHE = re.compile(r"[0-9a-f]{32}\.(arrow|json)(\.\d+\.tmp)?|.*\.tmp")


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What repairing does to a run directory.

    Attributes:
        steps: steps that go to quarantine, dependents first; the next attempt makes them again.
        logs: logs of unfinished steps of which the rows that verify are kept, by step; the whole log is set aside before.
        files: files and folders that go to quarantine, relative to the run directory.
        caches: files under ``derived/`` that are removed.
        left: damage that only a backup helps.
    """

    steps: tuple[str, ...]
    logs: tuple[tuple[str, str], ...]  # (step, what is wrong)
    files: tuple[str, ...]
    caches: tuple[str, ...]
    left: tuple[Damage, ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.steps or self.logs or self.files or self.caches)

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "steps_to_quarantine": list(self.steps),
            "logs_to_cut": [{"step": step, "what": what} for step, what in self.logs],
            "files_to_quarantine": list(self.files),
            "caches_to_remove": list(self.caches),
            "left": [damage.path for damage in self.left],
        }


def plan_repair(path: Path, findings: Iterable[Finding]) -> Repair:
    """What there is to do about what was found in the run directory ``path``. Touches nothing."""
    found = list(findings)
    damages = [finding for finding in found if isinstance(finding, Damage)]
    damaged = [damage.step for damage in damages if damage.remedy == "redo"]
    stale = [note.step for note in found if isinstance(note, Note) and note.stale and note.step]
    present = step_states(path)
    steps = [step for step in closure(path, [*damaged, *stale]) if step in present]
    moved = tuple(f"steps/{step}/" for step in steps)
    logs = {damage.step: damage.what for damage in damages if damage.remedy == "log" and damage.step not in steps}
    files = [finding.path for finding in found if _is_to_move(finding) and not finding.path.startswith(moved)]
    caches = [damage.path for damage in damages if damage.remedy == "cache"]
    if steps:  # they may have been built from what is damaged
        derived = path / "derived"
        names = sorted(entry.name for entry in derived.glob("*") if _CACHE.fullmatch(entry.name))
        caches += [f"derived/{name}" for name in names]
    gone = [file for file in files if not (path / _whole(file)).exists()]
    if (damaged and not steps) or gone:  # there is nothing to move: the run has to be taken up again all the same
        files.append("_OK.json")
    return Repair(
        steps=tuple(steps),
        logs=tuple(logs.items()),
        files=tuple(file for file in dict.fromkeys(map(_whole, files)) if (path / file).exists()),
        caches=tuple(dict.fromkeys(caches)),
        left=tuple(damage for damage in damages if damage.remedy == "restore"),
    )


def _is_to_move(finding: Finding) -> bool:
    return finding.stale and not finding.step if isinstance(finding, Note) else finding.remedy == "aside"


def _whole(file: str) -> str:
    """An attempt without its record is no attempt, so its folder goes as a whole."""
    return str(Path(file).parent) if re.fullmatch(r"attempts/\d+/attempt\.json", file) else file


def apply_repair(run: RunDir, repair: Repair) -> int:
    """Do it, in an order in which a kill at any moment leaves a run that can be repaired again.

    Args:
        run: held by this process.
        repair: made while it was held.

    Returns:
        The number of lines of logs that were given up.
    """
    num_lost = sum(keep_good_rows(run, step) for step, _ in repair.logs)
    if repair.steps or repair.files:
        run.set_aside(repair.steps, [run.path / file for file in repair.files])
    for cache in repair.caches:
        run.files.remove(run.path / cache)
    return num_lost


def keep_good_rows(run: RunDir, step: str) -> int:
    """Keep the rows of an unfinished step's log that verify; the whole log is set aside before.

    Args:
        run: held by this process.
        step: begun and not committed.

    Returns:
        The number of lines given up.

    Raises:
        ValueError: the run is not held.
    """
    from reasonrun.ledger import wal  # numpy is slow to import

    _ = run.attempt_dir
    folder = Quarantine(run.path, run.files).new_folder() / "steps" / step
    log = run.path / "steps" / step / wal_name("rows")  # for another one its step is begun again
    return wal.repair(log, run.files, lambda aside: folder / aside)
