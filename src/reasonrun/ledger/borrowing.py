"""Steps that another run has made already: a run takes them over instead of making them again.

Name and fingerprint alone do not decide. Rows are named by what was asked, not by what was answered, so a step is taken
only if every step that it reads, near or far, holds the same bytes in both runs; and what no fingerprint holds (engine,
arithmetic, code, versions) must have been the same in every attempt of the other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from reasonrun.errors import RunFailed
from reasonrun.ledger.attempts import attempt_records
from reasonrun.ledger.catalogue import step_inputs
from reasonrun.ledger.files import Files
from reasonrun.ledger.seals import read_seal
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.records import digest

CONDITIONS = "conditions"
"""Key of ``attempt.json``: what steps depend on besides their fingerprints, a digest for each verb."""
OTHER_VERBS = "other"


class Donors:
    """Runs to borrow from.

    Args:
        run_path: the run that borrows.
        paths: the other runs, in the order in which they are asked. Folders that hold no run lend nothing.
        conditions: this run's own, as in its ``attempt.json``.
        files: does every file operation.
    """

    def __init__(self, run_path: Path, paths: Iterable[Path], conditions: Mapping[str, str], files: Files) -> None:
        self._run_path, self._conditions, self._files = run_path, conditions, files
        others = [path for path in paths if path.resolve() != run_path.resolve()]
        self._attempts = {path: attempt_records(path) for path in others}

    def lend(
        self,
        step: OpenStep,
        fingerprint: Mapping[str, Any],
        take: Callable[[Path], None],
        refuse: Callable[[str], None],
    ) -> Committed | None:
        """Commit ``step`` with what another run made; None when no run has it, and the step is to be made.

        Args:
            step: an open step of this run.
            fingerprint: its own.
            take: gets the other run before anything is taken from it.
            refuse: gets the reason when a step is passed over because it is damaged.
        """
        for path in self._under_same_conditions(str(fingerprint.get("verb"))):
            try:
                other = self._equal_step(path, step.name, fingerprint)
                if other is None:
                    continue
                take(path)
                step.borrow(other)
            except RunFailed as error:
                refuse(f"not taken from {path}: {error.message}")
                continue
            self._files.point("borrow.before_commit")
            return step.commit(other.result)
        return None

    def _equal_step(self, path: Path, name: str, fingerprint: Mapping[str, Any]) -> Committed | None:
        other = _committed(path, name, self._files)
        if other is None or other.fingerprint_digest != digest(fingerprint):
            return None
        return other if self._reads_the_same(path, fingerprint.get("inputs", [])) else None

    def _under_same_conditions(self, verb: str) -> list[Path]:
        """A digest that an attempt did not record equals nothing: older runs lend nothing."""
        wanted = _condition(self._conditions, verb)
        theirs = {
            path: {_condition(attempt.get(CONDITIONS, {}), verb) for attempt in attempts}
            for path, attempts in self._attempts.items()
        }
        return [path for path, found in theirs.items() if wanted is not None and found == {wanted}]

    def _reads_the_same(self, path: Path, inputs: Iterable[str]) -> bool:
        waiting, seen = list(inputs), set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            own, other = (_committed(run, name, self._files) for run in (self._run_path, path))
            if own is None or other is None or own.digest != other.digest:
                return False
            waiting += step_inputs(self._run_path, name)
        return True


def _condition(conditions: Mapping[str, str], verb: str) -> str | None:
    return conditions.get(verb, conditions.get(OTHER_VERBS))


def _committed(run_path: Path, name: str, files: Files) -> Committed | None:
    folder = run_path / "steps" / name
    seal = read_seal(folder)
    return None if seal is None else Committed(name, folder, seal, files)
