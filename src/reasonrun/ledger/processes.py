"""Processes that outlive the supervisor which started them: telling them apart from reused pids, and ending them."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from reasonrun.errors import RunConflict
from reasonrun.process_facts import START_TOLERANCE_SECONDS, ProcessFacts, is_alive, start_time

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class WorkerProcess:
    """A process that an attempt started; ``pgid`` equals ``pid`` when it leads a process group of its own."""

    pid: int
    pgid: int
    started: float
    host: str

    @classmethod
    def of(cls, pid: int, pgid: int) -> WorkerProcess:
        """Describe a live process. One that is gone already gets the present time, which matches nothing later."""
        return cls(pid=pid, pgid=pgid, started=start_time(pid) or time.time(), host=socket.gethostname())

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> WorkerProcess:
        """Raises KeyError, TypeError or ValueError when a field is missing or wrong."""
        return cls(int(value["pid"]), int(value["pgid"]), float(value["started"]), str(value["host"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def end_processes(
    workers: Iterable[WorkerProcess], *, grace_seconds: float = 2.0, patience_seconds: float = 10.0
) -> list[ProcessFacts]:
    """End process groups that earlier attempts left behind and wait until they are gone.

    Groups get SIGTERM, after ``grace_seconds`` SIGKILL. Workers of other hosts and reused pids are left alone.

    Returns:
        What was found alive, by pid.

    Raises:
        RunConflict: a process did not go within ``patience_seconds`` after SIGKILL.
    """
    here = socket.gethostname()
    candidates = [worker for worker in workers if worker.host == here]
    found = _living(candidates)
    if not found:
        return []
    orphans = [facts for pid in sorted(found) if (facts := ProcessFacts.of(pid))]
    _signal(found, signal.SIGTERM)
    left = _wait(lambda: _living(candidates), grace_seconds)
    if left:
        _signal(left, signal.SIGKILL)
        left = _wait(lambda: _living(candidates), patience_seconds)
    if left:
        lines = "".join(f"\n  {orphan}" for orphan in orphans if orphan.pid in left)
        raise RunConflict(
            f"Processes of an earlier attempt could not be ended and may still write into the run:{lines}",
            hint=f"end them (kill -9 {' '.join(map(str, sorted(left)))}), then run the same command again",
        )
    return orphans


def _wait(find: Callable[[], set[int]], seconds: float) -> set[int]:
    deadline = time.monotonic() + seconds
    left = find()
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = find()
    return left


def _living(workers: list[WorkerProcess]) -> set[int]:
    """Pids of all live members of the recorded groups."""
    suspects = [worker for worker in workers if _may_live(worker)]
    if not suspects:
        return set()
    groups = _groups()
    living: set[int] = set()
    for worker in suspects:
        living |= _members(worker, groups)
    return living - {os.getpid()}


def _may_live(worker: WorkerProcess) -> bool:
    """Cheap first look: a group can be signalled only while it has members."""
    if worker.pgid != worker.pid:
        return psutil.pid_exists(worker.pid)
    try:
        os.killpg(worker.pgid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _groups() -> dict[int, list[tuple[int, float]]]:
    """Live processes as (pid, start time), by process group."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            started = start_time(pid)
            if started is not None:
                groups.setdefault(os.getpgid(pid), []).append((pid, started))
    return groups


def _members(worker: WorkerProcess, groups: dict[int, list[tuple[int, float]]]) -> set[int]:
    """What belongs to one recorded worker.

    A group whose leader has died keeps its number as long as it has members, so members without a leader count, unless
    a newer process has taken the leader's pid.
    """
    if worker.pgid != worker.pid:
        return _family(worker) if is_alive(worker.pid, worker.started) else set()
    members = groups.get(worker.pgid, [])
    if worker.pgid == os.getpgrp() or (psutil.pid_exists(worker.pid) and not _same_start(worker)):
        return set()
    return {pid for pid, started in members if started >= worker.started - START_TOLERANCE_SECONDS}


def _same_start(worker: WorkerProcess) -> bool:
    """Like ``is_alive``, but a zombie still holds its pid."""
    with suppress(psutil.NoSuchProcess):
        return abs(psutil.Process(worker.pid).create_time() - worker.started) <= START_TOLERANCE_SECONDS
    return True


def _family(worker: WorkerProcess) -> set[int]:
    with suppress(psutil.NoSuchProcess):
        return {worker.pid, *(child.pid for child in psutil.Process(worker.pid).children(recursive=True))}
    return set()


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
