"""One writer per run directory: an ``flock`` that dies with its owner, and a record that says who the owner is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from reasonrun.errors import EnvironmentProblem, RunConflict
from reasonrun.ledger.files import Files, decode_json, encode_json
from reasonrun.process_facts import is_alive, start_time

LOCK_NAME = "lock"

_RECORD_WAIT_SECONDS = 1.0  # between locking and writing its record an owner is anonymous
_DYING_WAIT_SECONDS = 5.0  # a killed process keeps its locks until the kernel has cleaned up
_POLL_SECONDS = 0.05
_KERNEL_LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Owner:
    """Who holds, or last held, a run directory. ``started`` and ``since`` are seconds since the epoch."""

    pid: int
    started: float
    host: str
    command: str
    since: float

    @classmethod
    def this_process(cls, command: str) -> Owner:
        now = time.time()
        return cls(os.getpid(), start_time(os.getpid()) or now, socket.gethostname(), command, now)

    @property
    def is_dead(self) -> bool:
        """Known to be dead: its pid on this host is free or belongs to a process that started at another time."""
        return self.host == socket.gethostname() and not is_alive(self.pid, self.started)


def read_owner(lock_path: Path) -> Owner | None:
    """The record in a lock file; None when there is none or it is being written."""
    try:
        value = decode_json(lock_path.read_bytes())
        return Owner(int(value["pid"]), float(value["started"]), value["host"], value["command"], float(value["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def holder(lock_path: Path) -> Owner | None:
    """The live process of this machine that holds the lock, found without trying to take it; None when there is none.

    A process that has let go of the lock and lives on, such as a sweep, does not count where the kernel lists locks.
    """
    owner = read_owner(lock_path)
    if owner is None or owner.host != socket.gethostname() or owner.is_dead:
        return None
    try:
        listed = [line.split() for line in _KERNEL_LOCKS.read_text().splitlines()]
    except OSError:
        listed = []
    if not listed:
        return None if owner.pid == os.getpid() else owner
    inode = str(lock_path.stat().st_ino)
    # number: FLOCK ADVISORY WRITE pid major:minor:inode start end
    held = any(
        fields[1] == "FLOCK" and fields[4] == str(owner.pid) and fields[5].split(":")[-1] == inode
        for fields in listed
        if len(fields) >= 6
    )
    return owner if held else None


class RunLock:
    """The lock on one run directory, held by this process until ``release`` or its death, however it dies."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor, self._pid = path, descriptor, os.getpid()
        _held.add(self)

    @classmethod
    def acquire(
        cls, path: Path, command: str, files: Files, end_orphans: Callable[[], object] = lambda: None
    ) -> RunLock:
        """Lock ``path`` for this process.

        Args:
            path: the lock file, made when missing.
            command: shown to whoever finds the directory locked.
            files: turns operating-system errors into messages.
            end_orphans: called once when the lock's recorded owner is dead while something still holds the lock.

        Raises:
            RunConflict: a live process holds it.
            EnvironmentProblem: the file system cannot lock.
        """
        with files.explaining(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _try_lock(descriptor, path):
                _wait_for_dead_owner(descriptor, path, end_orphans)
            record = encode_json(asdict(Owner.this_process(command)))
            with files.explaining(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, record, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def release(self) -> None:
        """Let the next process in. Calling it twice does no harm."""
        if self._pid == os.getpid() and self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # even if a child that was just forked still has it open
            self._forget()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child shares the lock with its parent and would keep it alive after the parent's death."""
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_in_child)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise EnvironmentProblem(
            f"The file system of {path.parent} cannot lock files, so two runs could write into one directory.",
            hint="put the run on another file system with --run DIR",
        ) from error
    return True


def _wait_for_dead_owner(descriptor: int, path: Path, end_orphans: Callable[[], object]) -> None:
    """Return with the lock when its owner turns out to be dead; raise RunConflict when it lives."""
    begun = time.monotonic()
    orphans_ended = False
    while True:
        owner, waited = read_owner(path), time.monotonic() - begun
        if owner is not None and not owner.is_dead:
            raise _conflict(path, owner)
        if waited > (_RECORD_WAIT_SECONDS if owner is None else _DYING_WAIT_SECONDS):
            raise _conflict(path, owner)
        if owner is not None and not orphans_ended:
            end_orphans()
            orphans_ended = True
        time.sleep(_POLL_SECONDS)
        if _try_lock(descriptor, path):
            return


def _conflict(path: Path, owner: Owner | None) -> RunConflict:
    if owner is None:
        return RunConflict(
            f"The run directory {path.parent} is in use by another process.",
            hint="wait until it ends, or use another directory with --run NEW",
        )
    if owner.is_dead:
        return RunConflict(
            f"The run directory {path.parent} is locked by a process that process {owner.pid} (now dead) had started.",
            hint=f"end what still holds it (fuser -k {path}), then run the same command again",
        )
    since = datetime.fromtimestamp(owner.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return RunConflict(
        f"The run directory {path.parent} is in use by process {owner.pid} on {owner.host} since {since}: "
        f"{owner.command}",
        hint=f"wait for it, stop it with `kill {owner.pid}` and run the same command again, or use --run NEW",
    )
