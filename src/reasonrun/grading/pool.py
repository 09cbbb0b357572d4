"""A pool of killable processes that compare mathematical expressions.

Every pair gets an answer: a verdict, or ``deadline``, ``memory``, ``crash``. The deadline is counted in the worker's
CPU time, so verdicts do not vary with the load of the machine. Workers are fresh interpreters (never forks), start
when first needed, and end with their parent.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

import reasonrun
from reasonrun.errors import EnvironmentProblem

_CACHE_SIZE = 100_000
_NUM_ATTEMPTS = 2  # a worker can be killed from outside; a pair that kills two of them has done it itself
_NUM_START_FAILURES = 3
_STALL_FACTOR, _STALL_SECONDS = 20, 60  # wall-clock limit in which a worker must have used some CPU time


@dataclass
class Ticket:
    """A question to the pool. ``reason`` is None until it is answered."""

    reference: str
    answer: str
    reason: str | None = None
    num_attempts: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    ready: bool = False
    ticket: Ticket | None = None
    busy_since: float = 0.0
    cpu_seconds: float = 0.0  # as of the last look
    received: bytes = b""

    @property
    def replies(self) -> IO[bytes]:
        assert self.process.stdout is not None  # started with a pipe
        return self.process.stdout

    @property
    def questions(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin


@dataclass
class _Processes:
    """The live workers, apart from the pool so that a finalizer can hold them."""

    workers: list[_Worker] = field(default_factory=list)

    def end(self) -> None:
        for worker in self.workers:
            _end(worker.process)
        self.workers.clear()


def _end(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            _close(stream)
    return process.wait()


def _close(stream: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # bytes of a question that the dead worker never read
        stream.close()


class SymbolicPool:
    """Answers pairs (reference, answer) through math-verify.

    Args:
        num_workers: processes at most.
        cpu_seconds: CPU time one pair may take.
        memory_mib: address space of one worker.

    Raises:
        EnvironmentProblem: math-verify is not installed, or no worker starts.
    """

    def __init__(self, *, num_workers: int, cpu_seconds: float, memory_mib: int) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise EnvironmentProblem(
                "the grader symbolic-1 needs the package math-verify, which is not installed",
                hint='pip install "math-verify[antlr4-9-3]", or choose the grader number-1',
            )
        self._num_workers = num_workers
        self._cpu_seconds = cpu_seconds
        self._memory_mib = memory_mib
        self._processes = _Processes()
        self._queue: deque[Ticket] = deque()
        self._tickets: OrderedDict[tuple[str, str], Ticket] = OrderedDict()
        self._crashed: set[tuple[str, str]] = set()
        self._num_start_failures = 0
        weakref.finalize(self, self._processes.end)

    def submit(self, reference: str, answer: str) -> Ticket:
        """Ask for a verdict; an equal question that was asked before, answered or not, is not asked again."""
        key = (reference, answer)
        ticket = self._tickets.get(key)
        if ticket is None:
            ticket = self._tickets[key] = Ticket(reference, answer)
            self._queue.append(ticket)
            if len(self._tickets) > _CACHE_SIZE:
                self._tickets.popitem(last=False)
        return ticket

    def pump(self, timeout_seconds: float) -> None:
        """Hand out questions and collect answers; waits at most ``timeout_seconds`` for the first one."""
        self._hand_out()
        workers = {worker.replies.fileno(): worker for worker in self._processes.workers}
        if not workers:
            return
        readable, _, _ = select.select(list(workers), [], [], timeout_seconds)
        for descriptor in readable:
            self._receive(workers[descriptor])
        self._end_stalled()
        self._hand_out()

    def wait(self, ticket: Ticket) -> str:
        """The reason for the verdict on ``ticket``, once it is there."""
        while ticket.reason is None:
            self.pump(1.0)
        return ticket.reason

    def close(self) -> None:
        """End all workers; the pool starts new ones when it is asked again."""
        self._processes.end()

    def _hand_out(self) -> None:
        workers = self._processes.workers
        while len(workers) < min(self._num_workers, len(self._queue) + sum(w.ticket is not None for w in workers)):
            workers.append(self._start())
        for worker in workers:
            if self._queue and worker.ready and worker.ticket is None:
                self._ask(worker, self._queue.popleft())

    def _start(self) -> _Worker:
        package_root = str(Path(reasonrun.__file__).resolve().parent.parent)
        search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "reasonrun.grading.pool_worker"),
                *(str(os.getpid()), str(self._cpu_seconds), str(self._memory_mib * 2**20)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # the order of sympy's sets must not depend on the run
            env={**os.environ, "PYTHONPATH": search_path, "PYTHONHASHSEED": "0"},
        )
        return _Worker(process=process, busy_since=time.monotonic())

    def _ask(self, worker: _Worker, ticket: Ticket) -> None:
        worker.ticket, worker.busy_since = ticket, time.monotonic()
        question = {"id": ticket.num_attempts, "reference": ticket.reference, "answer": ticket.answer}
        try:
            worker.questions.write(json.dumps(question).encode("ascii") + b"\n")
            worker.questions.flush()
        except BrokenPipeError:  # it died while it was idle; the end of its output says so and the pair is asked again
            pass

    def _receive(self, worker: _Worker) -> None:
        data = os.read(worker.replies.fileno(), 65_536)
        if not data:
            self._bury(worker)
            return
        *lines, worker.received = (worker.received + data).split(b"\n")
        for line in lines:
            self._note(worker, json.loads(line))

    def _note(self, worker: _Worker, reply: dict[str, Any]) -> None:
        if "ready" in reply:
            worker.ready = True
            self._num_start_failures = 0
            return
        if worker.ticket is not None:
            self._answer(worker.ticket, str(reply["reason"]))
        worker.ticket = None
        if reply["last"]:
            self._retire(worker)

    def _retire(self, worker: _Worker) -> int:
        self._processes.workers.remove(worker)
        return _end(worker.process)

    def _bury(self, worker: _Worker) -> None:
        process = worker.process
        exit_status = process.wait()
        self._retire(worker)
        if not worker.ready:
            self._note_start_failure(exit_status)
        ticket = worker.ticket
        if ticket is None:
            return
        if exit_status == -signal.SIGPROF:
            self._answer(ticket, "deadline")
        else:
            self._ask_again(ticket)

    def _ask_again(self, ticket: Ticket) -> None:
        ticket.num_attempts += 1
        if ticket.num_attempts < _NUM_ATTEMPTS:
            self._queue.appendleft(ticket)
        else:
            self._answer(ticket, "crash")
            key = (ticket.reference, ticket.answer)
            if key not in self._crashed:  # may have had outside causes: once, it is not remembered
                self._crashed.add(key)
                self._tickets.pop(key, None)

    def _answer(self, ticket: Ticket, reason: str) -> None:
        ticket.reason = reason

    def _note_start_failure(self, exit_status: int) -> None:
        self._num_start_failures += 1
        if self._num_start_failures >= _NUM_START_FAILURES:
            raise EnvironmentProblem(
                f"no grading process starts: {self._num_start_failures} of them ended at once, the last with exit"
                f" status {exit_status}, under a memory limit of {self._memory_mib} MiB",
                hint=f"try: {sys.executable} -c 'import math_verify', or raise memory_mib of the grader",
            )

    def _end_stalled(self) -> None:
        for worker in list(self._processes.workers):
            occupied = worker.ticket is not None or not worker.ready
            if occupied and self._stands_still(worker):
                self._processes.workers.remove(worker)
                _end(worker.process)
                if worker.ticket is not None:
                    self._ask_again(worker.ticket)

    def _stands_still(self, worker: _Worker) -> bool:
        """Whether a worker has used no CPU time for long: one that does, however little it gets, meets its own deadline."""
        now = time.monotonic()
        if now - worker.busy_since <= _STALL_FACTOR * self._cpu_seconds + _STALL_SECONDS:
            return False
        spent = _cpu_seconds(worker.process.pid)
        if spent <= worker.cpu_seconds:
            return True
        worker.cpu_seconds, worker.busy_since = spent, now
        return False


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
