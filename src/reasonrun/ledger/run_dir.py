"""A run directory, held by one process at a time: identity, attempts, durable steps, the final result."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from reasonrun.errors import RecipeError, RunConflict, Stopped
from reasonrun.ledger import attempts
from reasonrun.ledger.catalogue import (
    RUN_NAME,
    StepState,
    check_is_ours,
    closure,
    finished_content,
    identity_digest,
    named_steps,
    run_identity,
    step_states,
    stored_fingerprint,
)
from reasonrun.ledger.files import Files, encode_json
from reasonrun.ledger.fingerprints import as_json, conflict
from reasonrun.ledger.lock import LOCK_NAME, RunLock
from reasonrun.ledger.quarantine import Quarantine
from reasonrun.ledger.seals import FORMAT, OK_NAME, Seal, read_seal, write_seal
from reasonrun.ledger.steps import (
    STEP_NAME,
    Committed,
    OpenStep,
    check_step_name,
    own_entries,
    redo_hint,
    tidy,
)
from reasonrun.process_facts import ProcessFacts
from reasonrun.records import digest


class RunDir:
    """An opened run directory. Use ``RunDir.open``; it is a context manager that lets go of the directory.

    Attributes:
        path: the directory.
        identity: the JSON that ``run.json`` has kept since the run was created.
        finished: what ``finish`` was given, when the run is finished and intact, else None.
        attempt: this process's attempt; None for a finished run, which is opened without writing anything.
        earlier_attempts: the ``attempt.json`` of earlier attempts, oldest first.
        ended_orphans: earlier attempts' processes that had to be ended.
        reached: names of the steps asked for in this attempt.
    """

    def __init__(self, path: Path, files: Files, identity: dict[str, Any], finished: Any) -> None:
        self.path, self.files, self.identity, self.finished = path, files, identity, finished
        self.attempt: attempts.Attempt | None = None
        self.earlier_attempts = attempts.attempt_records(path)
        self.ended_orphans: list[ProcessFacts] = []
        self.reached: set[str] = set()
        self._lock: RunLock | None = None
        self._open_steps: dict[str, OpenStep] = {}
        self._quarantine = Quarantine(path, files)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        identity: Mapping[str, Any],
        command: str,
        files: Files | None = None,
        attempt: Mapping[str, Any] | None = None,
        reopen: bool = False,
    ) -> RunDir:
        """Create or reopen a run directory for this process alone.

        Before anything is written, processes that earlier attempts left behind are ended. ``identity`` is stored when
        the run is new; for an older run the caller compares it with the attribute of that name.

        Args:
            path: the directory.
            identity: what the run is, as JSON: the resolved recipe and what else names it.
            command: the command line, shown to whoever finds the directory locked.
            files: does every file operation.
            attempt: what else ``attempt.json`` should say: versions, code digests.
            reopen: take the directory even when the run is finished (to redo a step, or to go further).

        Raises:
            RunConflict: another process holds it, or the folder holds something else.
            RunFailed: ``run.json`` is damaged.
            EnvironmentProblem: the folder cannot be written.
        """
        path, files = Path(path), files or Files()
        finished = finished_content(path, files)
        if finished is not None and not reopen:
            return cls(path, files, run_identity(path), finished["result"])
        check_is_ours(path)
        files.mkdir(path)
        ended: list[ProcessFacts] = []
        lock = RunLock.acquire(path / LOCK_NAME, command, files, lambda: ended.extend(attempts.end_orphans(path)))
        try:
            ended += attempts.end_orphans(path)
            description = {"command": command, "ended_orphans": [orphan.to_json() for orphan in ended]}
            run = cls._opened(path, files, lock, as_json(identity), {**description, **(attempt or {})})
            run.ended_orphans = ended
            return run
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(
        cls, path: Path, files: Files, lock: RunLock, identity: dict[str, Any], description: Mapping[str, Any]
    ) -> RunDir:
        attempts.settle_names(path, files)
        if not (path / RUN_NAME).exists():
            files.mkdir(path / "steps")
            files.point("run.mid_create")
            _write_identity(path, identity, files)
        finished = finished_content(path, files)
        run = cls(path, files, run_identity(path), None if finished is None else finished["result"])
        run._lock = lock
        run.attempt = attempts.Attempt.start(path, files, as_json(description))
        return run

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_orderly = kind is None or issubclass(kind, Stopped | KeyboardInterrupt)
        self.close(flush=is_orderly)

    def close(self, *, flush: bool = True) -> None:
        """Close open steps and let the next process in. Without ``flush`` nothing more is written."""
        try:
            for step in self._open_steps.values():
                step.close() if flush else step.abandon()
        finally:
            self._open_steps.clear()
            if self.attempt is not None:
                self.attempt.close()
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    @property
    def attempt_dir(self) -> Path:
        """Folder of this process's attempt. Raises ValueError when the directory is not held."""
        return self._held_attempt().path

    def record_worker(self, pid: int, pgid: int) -> None:
        """Remember a process that this attempt started, so that the next attempt ends it if this one dies."""
        self._held_attempt().record_worker(pid, pgid)

    def step(self, name: str, fingerprint: Mapping[str, Any]) -> Committed | OpenStep:
        """The step of this name: its committed result, or the step to be filled and committed.

        Args:
            name: such as ``round-002/sample-hinted``.
            fingerprint: JSON of what the step is a function of; ``inputs`` lists the steps whose results it reads.

        Raises:
            RunConflict: the run has a step of this name with another fingerprint; the message lists the differences.
            RunFailed: what is committed is damaged.
        """
        check_step_name(name)
        self._held_attempt()
        wanted, folder = as_json(fingerprint), self.path / "steps" / name
        self.reached.add(name)
        seal = read_seal(folder, hint=redo_hint(name))
        if seal is not None and seal.content["fingerprint"] == digest(wanted):
            committed = Committed(name, folder, seal, self.files)
            committed.verify()
            tidy(folder, self.files)
            self._open_steps.pop(name, None)
            return committed
        stored = stored_fingerprint(self.path, name)
        if seal is not None or (stored is not None and digest(stored) != digest(wanted)):
            raise conflict(name, stored, wanted)
        if name in self._open_steps:
            raise ValueError(f"step {name} is open already")
        if stored is None:
            data = encode_json({"name": name, "fingerprint": wanted}, indent=1, sort_keys=True) + b"\n"
            self.files.write_atomic(folder / STEP_NAME, data, "step")
        self._open_steps[name] = OpenStep(name, self.path, digest(wanted), self.files, self._quarantine)
        return self._open_steps[name]

    def committed(self, name: str) -> Committed | None:
        """What is committed under ``name``, whatever its fingerprint; None when nothing is."""
        folder = self.path / "steps" / name
        seal = read_seal(folder, hint=redo_hint(name))
        return None if seal is None else Committed(name, folder, seal, self.files)

    def steps(self) -> dict[str, StepState]:
        """Every step in the directory, by name."""
        return step_states(self.path)

    def unreached(self) -> list[str]:
        """Steps, committed or begun, that this attempt has not asked for."""
        return [name for name in self.steps() if name not in self.reached]

    def redo(self, name: str) -> list[str]:
        """Move a step and every step that depends on its result to quarantine.

        Returns:
            The names of the steps that moved, dependents first; without ``name`` where its files are gone.

        Raises:
            RecipeError: the run has no such step.
        """
        self._held_attempt()
        names = named_steps(self.path)
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names[:10]
            raise RecipeError(
                f"The run {self.path} has no step {name!r}.", hint=f"its steps: {', '.join(near) or 'none'}"
            )
        return self.set_aside([name])

    def set_aside(self, steps: Iterable[str], files: Iterable[Path] = ()) -> list[str]:
        """Move steps, with every step that depends on their results, and files that are no step's to quarantine.

        Returns:
            The names of the steps that moved, dependents first; those given may be gone already.
        """
        self._held_attempt()
        present = self.steps()
        order = [step for step in closure(self.path, steps) if step in present]
        folder = self._quarantine.new_folder()
        self._unfinish(folder)
        for step in order:
            self._open_steps.pop(step, None)
            self.reached.discard(step)
            self._quarantine.set_aside(own_entries(self.path / "steps" / step), folder)
        self._quarantine.set_aside([path for path in files if path.exists()], folder)
        return order

    def prune(self, names: Iterable[str]) -> None:
        """Delete steps that the method no longer reaches. Raises RunConflict for one that it has reached."""
        self._held_attempt()
        chosen = sorted(names)
        for name in chosen:
            check_step_name(name)
            if name in self.reached:
                raise RunConflict(
                    f"Step {name} is in use and cannot be pruned.", hint=f"make it again with --redo {name}"
                )
        for name in [step for step in closure(self.path, chosen) if step in chosen]:  # never an input before its reader
            for path in own_entries(self.path / "steps" / name):
                self.files.remove(path)
                self.files.sync_folder(path.parent)  # the seal comes first and must not outlive what it vouches for

    def amend(self, identity: Mapping[str, Any]) -> None:
        """Replace the stored identity: for a change that the caller allows, such as more rounds.

        The run is then no longer finished, and its old ``run.json`` is kept in quarantine.
        """
        self._held_attempt()
        folder = self._quarantine.new_folder()
        self._unfinish(folder)
        self.files.write_atomic(folder / RUN_NAME, self.files.read(self.path / RUN_NAME), "json")
        self.identity = as_json(identity)
        _write_identity(self.path, self.identity, self.files)

    def write_projection(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace a file of JSON lines that can be computed from committed steps, such as ``metrics.jsonl``."""
        self._held_attempt()
        data = b"".join(encode_json(as_json(row)) + b"\n" for row in rows)
        path = self.path / name
        if not path.is_file() or path.read_bytes() != data:
            self.files.write_atomic(path, data, "projection")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Declare the run done. Raises ValueError when a step that was asked for is not committed."""
        self._held_attempt()
        digests = {}
        for name in sorted(self.reached):
            committed = self.committed(name)
            if committed is None:
                raise ValueError(f"step {name} was begun and is not committed")
            digests[name] = committed.digest
        write_seal(self.path, Seal({}, {"result": as_json(result), "steps": digests}), self.files, "finish")
        self.finished = as_json(result)

    def _held_attempt(self) -> attempts.Attempt:
        if self._lock is None or self.attempt is None:
            raise ValueError(f"{self.path} is not held by this process: it is closed, or finished and not reopened")
        return self.attempt

    def _unfinish(self, folder: Path) -> None:
        if (self.path / OK_NAME).exists():
            self._quarantine.set_aside([self.path / OK_NAME], folder)
        self.finished = None


def _write_identity(path: Path, identity: Mapping[str, Any], files: Files) -> None:
    value = {"format": FORMAT, "digest": identity_digest(identity), "identity": identity}
    data = encode_json(value, indent=1) + b"\n"
    files.write_atomic(path / RUN_NAME, data, "run")
