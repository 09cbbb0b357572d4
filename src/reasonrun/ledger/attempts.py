"""Attempts: one numbered folder for each time that a process works on a run, and the processes it started.

Clock, host, pids and arguments live here and nowhere else in a run directory.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reasonrun.ledger.files import AppendFile, Files, decode_json, encode_json
from reasonrun.ledger.processes import WorkerProcess, end_processes
from reasonrun.ledger.quarantine import next_number
from reasonrun.process_facts import ProcessFacts, start_time

ATTEMPT_NAME = "attempt.json"
WORKERS_NAME = "workers.jsonl"


class Attempt:
    """This process's folder ``attempts/<number>/``; workers write under it, nothing in it is ever read as a result."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path, self._files = path, files
        self._workers: AppendFile | None = None

    @property
    def number(self) -> int:
        return int(self.path.name)

    @classmethod
    def start(cls, run_path: Path, files: Files, description: Mapping[str, Any]) -> Attempt:
        """Take the next number and record who is at work.

        Args:
            run_path: the run directory.
            files: does the writing.
            description: what the caller wants remembered (command, versions, code digests), as JSON.
        """
        attempts = run_path / "attempts"
        path = attempts / str(next_number(attempts))
        record = {
            "attempt": int(path.name),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "host": socket.gethostname(),
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "argv": sys.argv,
            **description,
        }
        files.write_atomic(path / ATTEMPT_NAME, encode_json(record, indent=1, sort_keys=True) + b"\n", "attempt")
        return cls(path, files)

    def record_worker(self, pid: int, pgid: int) -> None:
        """Remember a process that this attempt started, so that the next one can end it. ``pgid`` is its group."""
        if self._workers is None:
            self._workers = self._files.append(self.path / WORKERS_NAME, "worker")
        self._workers.write(encode_json(WorkerProcess.of(pid, pgid).to_json()) + b"\n")

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def attempt_records(run_path: Path) -> list[dict[str, Any]]:
    """What earlier attempts recorded about themselves, oldest first; unreadable ones are left out."""
    records = []
    for folder in _folders(run_path):
        with suppress(OSError, ValueError):
            records.append(decode_json((folder / ATTEMPT_NAME).read_bytes()))
    return records


def end_orphans(run_path: Path) -> list[ProcessFacts]:
    """End what earlier attempts started and left running; see ``end_processes``. Returns what was alive."""
    return end_processes(worker for folder in _folders(run_path) for worker in _workers(folder / WORKERS_NAME))


def settle_names(run_path: Path, files: Files) -> None:
    """Flush the folders of a run. Must precede any use of what is found there.

    An attempt that was killed between a rename and the flush of its folder left a name that is visible and not on disk.
    Whoever built on it would lose it, and all that came after, when power fails.
    """
    steps = [Path(folder) for folder, _, _ in os.walk(run_path / "steps")]
    for folder in [run_path.parent, run_path, *steps]:
        if os.access(folder, os.R_OK):  # the parent may be closed to us where the run's folder was given
            files.sync_folder(folder)


def _workers(path: Path) -> Iterator[WorkerProcess]:
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, KeyError, TypeError):  # the last line may be torn
            yield WorkerProcess.from_json(decode_json(line))


def _folders(run_path: Path) -> list[Path]:
    attempts = run_path / "attempts"
    folders = [path for path in attempts.iterdir() if path.name.isdigit()] if attempts.is_dir() else []
    return sorted(folders, key=lambda path: int(path.name))
