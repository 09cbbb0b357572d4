"""One worker process as the supervisor sees it: start, talk, notice its end, end it with all that it started."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable

import psutil

from reasonrun.errors import RunFailed
from reasonrun.records import Checkpoint
from reasonrun.workers import protocol
from reasonrun.workers.spawning import NODE_LOST, WorkerSpec, spawn

_READ_BYTES = 1 << 20
_TAIL_BYTES, _TAIL_LINES = 8192, 40
_KILL_SECONDS = 10.0
_DUMP_SECONDS = 2.0
# Longest stretch between two looks at a worker that counts as waiting for it: a supervisor that was itself busy,
# or suspended, has not been watching.
_WATCHED_SECONDS = 1.0
_live_groups: set[int] = set()


class WorkerProcess:
    """A started worker. ``call`` is the request in flight, ``waited_seconds`` the watched time without progress."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.greeted = self.ready = self.ended = False
        self.call: protocol.ToWorker | None = None
        self.loaded: Checkpoint | None = None
        self.exit_code: int | None = None  # 128 + n after signal n; known once ``crash`` was asked
        self.waited_seconds = 0.0
        self._looked = time.monotonic()
        self.num_done = 0
        self._received = bytearray()
        self._unsent = bytearray()
        self._process, self._log_start = spawn(spec)
        self.pid = self._process.pid
        _live_groups.add(self.pid)
        assert self._process.stdin is not None and self._process.stdout is not None
        self.write_fd, self.read_fd = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.write_fd, False)
        os.set_blocking(self.read_fd, False)
        try:
            spec.record_worker(self.pid, self.pid)
        except BaseException:
            self.end()
            raise
        self.send(spec.setup)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    @property
    def has_exited(self) -> bool:
        return self._exit_code() is not None

    def send(self, message: protocol.ToWorker) -> None:
        """Queue a message and write what the pipe takes; never blocks. A call becomes the one in flight."""
        if not isinstance(message, protocol.Setup | protocol.Exit):
            self.call = message
            self.waited_seconds = 0.0
        self._unsent += protocol.encode(message)
        self.flush()

    def flush(self) -> None:
        """Write queued bytes until the pipe is full or the worker gone."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self.write_fd, self._unsent)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()

    def receive(self) -> list[protocol.FromWorker]:
        """All complete messages that have arrived; sets ``ended`` when there will be no more. Never blocks."""
        now = time.monotonic()
        self.waited_seconds += min(now - self._looked, _WATCHED_SECONDS)
        self._looked = now
        exited = self._exit_code() is not None  # before reading: what it wrote last must not be missed
        num_before = len(self._received)
        at_end = self._read()
        self.ended = self.ended or exited or at_end
        if self._received.find(b"\n", num_before) < 0:
            return []  # a long message arrives in many pieces; split it once
        *lines, rest = self._received.split(b"\n")
        self._received = rest
        messages = []
        for line in lines:
            if not self.greeted and not line.startswith(b'{"kind":"hello"'):
                continue  # an interpreter's start-up file may print before the worker owns its pipes
            message = protocol.decode_from_worker(bytes(line))
            self._note(message)
            messages.append(message)
        return messages

    def _read(self) -> bool:
        try:
            while chunk := os.read(self.read_fd, _READ_BYTES):
                self._received += chunk
        except BlockingIOError:
            return False
        return True

    def _note(self, message: protocol.FromWorker) -> None:
        if isinstance(message, protocol.Heartbeat):
            if message.num_done != self.num_done:
                self.num_done, self.waited_seconds = message.num_done, 0.0
            return
        self.waited_seconds = 0.0
        match message:
            case protocol.Hello():
                self.greeted = True
            case protocol.Ready():
                self.ready = True
            case protocol.Loaded():
                assert isinstance(self.call, protocol.Load)
                self.loaded, self.call = self.call.checkpoint, None
            case protocol.Slept():
                self.loaded = self.call = None
            case protocol.Generated() | protocol.Scored() | protocol.Trained():
                self.call = None

    def _ended_from_outside(self) -> bool:
        """Whether somebody killed the guard, or the carrier to another machine. The kernel takes the largest process when
        memory runs out, and that is the one which works; its end is an exit status of the guard."""
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return info is not None and info.si_code != os.CLD_EXITED

    def _exit_code(self) -> int | None:
        if self._process.returncode is not None:
            return self._process.returncode
        # Left unreaped, so that its number cannot become another group's before the group is ended.
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status

    def _await_exit_code(self) -> int | None:
        # The pipe ends with the working process, a moment before the guard that passes its exit code on.
        deadline = time.monotonic() + _WATCHED_SECONDS
        while (code := self._exit_code()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return code

    def dump_stacks(self) -> None:
        """Have the worker write the stacks of all its threads to its log, as evidence of where it hangs."""
        size_before = self._log_size()
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + _DUMP_SECONDS
        while self._log_size() == size_before and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # the growth was seen at its first byte

    def _log_size(self) -> int:
        return self.spec.log_path.stat().st_size

    def end(self) -> None:
        """Kill the process group and wait until nothing of it runs. Raises RunFailed when the kernel cannot."""
        if self._process.returncode is None:
            _kill_group(self.pid)
            try:
                self._process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                raise RunFailed(
                    f"worker {self.spec.name} (process {self.pid}) does not end, not even by SIGKILL",
                    hint="it waits inside the kernel, often for a device or a network disk; look at dmesg",
                ) from None
            _wait_until_gone(self.pid)
        _live_groups.discard(self.pid)
        self.ended = True
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def crash(self, reason: str | None = None) -> protocol.WorkerCrash:
        """End the worker and say why it ended: ``reason``, or what its exit status tells."""
        hint = ""
        self.exit_code = self._await_exit_code() if reason is None else None
        from_outside = reason is None and self._ended_from_outside()
        if self.exit_code == 128 + signal.SIGKILL and not from_outside:
            hint = (
                "if nobody killed it, the kernel did because memory ran out (dmesg tells): "
                "lower the engine's batch size, the trainer's micro_batch_size or launcher.num_workers"
            )
        self.end()
        lost = bool(self.spec.through) and self.exit_code == NODE_LOST
        reason = "lost its node" if lost else reason or _describe_exit(self.exit_code)
        return protocol.WorkerCrash(
            self.spec.name,
            reason,
            log_path=self.spec.log_path,
            log_tail=self.log_tail(),
            hint=hint,
            from_outside=from_outside or lost,
            displaced=lost,
        )

    def log_tail(self) -> str:
        """The last lines of the log that this process wrote."""
        with self.spec.log_path.open("rb") as log:
            log.seek(max(self._log_start, self._log_size() - _TAIL_BYTES))
            return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:])


def exchange(workers: Iterable[WorkerProcess], timeout_seconds: float) -> None:
    """Wait until a worker has written something or ended, or can take queued bytes; write those."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.read_fd, selectors.EVENT_READ, worker)
            if worker.has_unsent:
                selector.register(worker.write_fd, selectors.EVENT_WRITE, worker)
        for key, events in selector.select(timeout_seconds):
            if events & selectors.EVENT_WRITE:
                key.data.flush()


def kill_all() -> None:
    """Send SIGKILL to every worker's process group, without waiting; safe in a signal handler."""
    for pgid in list(_live_groups):
        _kill_group(pgid)


def _kill_group(pgid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, signal.SIGKILL)


def _wait_until_gone(pgid: int) -> None:
    deadline = time.monotonic() + _KILL_SECONDS
    while _group_runs(pgid) and time.monotonic() < deadline:
        time.sleep(0.02)


def _group_runs(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose new parent does not reap counts as a member for ever, but runs no more.
    return any(_is_running_member(process, pgid) for process in psutil.process_iter())


def _is_running_member(process: psutil.Process, pgid: int) -> bool:
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        return os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE
    return False


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "closed its pipe without an answer"
    if code <= 128:
        return f"ended with status {code}"
    try:
        return f"was killed by signal {code - 128} ({signal.Signals(code - 128).name})"
    except ValueError:
        return f"ended with status {code}"
