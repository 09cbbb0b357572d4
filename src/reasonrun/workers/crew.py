"""Several workers under one supervision: deadlines, interruption, restarts, closing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from reasonrun.errors import EnvironmentProblem, ReasonrunError, Stopped
from reasonrun.workers import protocol
from reasonrun.workers.process import WorkerProcess, exchange
from reasonrun.workers.spawning import WorkerSpec

TURN_SECONDS = 0.1
NUM_DISPLACEMENTS = 5  # in a row, without an answer between them: no longer the machines' misfortune
_LAST_ORDINARY_STATUS = 127  # above it a shell reports a signal


Item = tuple[int, protocol.FromWorker | protocol.WorkerCrash]
"""What came from the worker in a slot, or how it ended."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a worker may take before it counts as hanging, in seconds.

    ``start_seconds`` covers interpreter, imports and construction of the plug-in, ``load_seconds`` one model load,
    ``stall_seconds`` the time without a new token or training event, ``close_seconds`` an orderly exit.
    """

    start_seconds: float = 300.0
    load_seconds: float = 1800.0
    stall_seconds: float = 600.0
    close_seconds: float = 10.0


class Crew:
    """Up to one process per spec. ``workers`` maps the spec's index to the process that runs now.

    ``displaced`` are the slots whose worker lost its machine and has not found another one yet. They are tried again
    and again, as long as some other worker goes on.
    """

    def __init__(self, specs: Sequence[WorkerSpec], limits: Limits, interrupted: Callable[[], int]) -> None:
        self.specs, self.limits, self._interrupted = specs, limits, interrupted
        self.workers: dict[int, WorkerProcess] = {}
        self.displaced: set[int] = set()
        self._num_displacements: Counter[int] = Counter()
        self._failure: ReasonrunError | None = None
        self.num_starts = 0
        self.start_seconds = 0.0

    def start(self, slot: int) -> WorkerProcess:
        """Start a process in an empty slot, without waiting for it."""
        self.workers[slot] = WorkerProcess(self.specs[slot])
        self.num_starts += 1
        return self.workers[slot]

    def start_missing(self) -> None:
        """Start a process in every empty slot, and in place of every one that died while it had nothing to do."""
        for slot in range(len(self.specs)):
            worker = self.workers.get(slot)
            if worker and worker.ready and worker.call is None and worker.has_exited:
                self.workers.pop(slot)
                if worker.crash().displaced:
                    self.displaced.add(slot)
            if slot not in self.workers:
                self.start(slot)

    def turn(self) -> list[Item]:
        """Wait a moment, then hand over what workers answered and which of them are gone.

        A worker that is gone, or was ended here because it hung, has left its slot.

        Raises:
            Stopped: ``interrupted()`` is true; all workers are ended.
            ReasonrunError: a worker raised it, or cannot run in its interpreter; all workers are ended. What arrived before
                is handed over first.
        """
        try:
            self._check_interrupted()
            items: list[Item] = []
            if self._failure is None:
                exchange(self.workers.values(), TURN_SECONDS)
                items = [item for slot, worker in list(self.workers.items()) for item in self._look_at(slot, worker)]
            if self._failure is not None and not items:
                failure, self._failure = self._failure, None
                raise failure
            return items
        except BaseException:
            self.end_all()
            raise

    def _check_interrupted(self) -> None:
        if code := self._interrupted():
            raise Stopped(
                "stopped while workers were busy; what is committed is safe",
                # A plain True has no code of its own.
                exit_code=code if code is not True else Stopped.exit_code,
                hint="the same command continues this run",
            )

    def _look_at(self, slot: int, worker: WorkerProcess) -> list[Item]:
        items: list[Item] = []
        for message in worker.receive():
            match message:
                case protocol.Failed():
                    self._failure = self._failure or protocol.rebuild_error(message)
                    return items
                case protocol.NoRoom():
                    return [*items, (slot, self._without_room(slot, message))]
                case protocol.Ready():
                    self.start_seconds += message.seconds
                    self.displaced.discard(slot)
                case protocol.Hello() | protocol.Heartbeat():
                    pass
                case _:
                    self._num_displacements[slot] = 0
                    items.append((slot, message))
        if worker.ended:
            items.append((slot, self._remove(slot, None)))
        elif reason := self._overdue(worker):
            worker.dump_stacks()
            items.append((slot, self._remove(slot, reason)))
        return items

    def _overdue(self, worker: WorkerProcess) -> str | None:
        waited = worker.waited_seconds
        if not worker.ready:
            limit = self.limits.start_seconds
            return f"did not start within {limit:g} s" if waited > limit else None
        if isinstance(worker.call, protocol.Load):
            limit = self.limits.load_seconds
            return f"did not load the model within {limit:g} s" if waited > limit else None
        limit = self.limits.stall_seconds
        return f"made no progress for {limit:g} s" if worker.call and waited > limit else None

    def _remove(self, slot: int, reason: str | None) -> protocol.WorkerCrash:
        worker = self.workers.pop(slot)
        crash = worker.crash(reason)
        if crash.displaced:
            self.displaced.add(slot)
            self._num_displacements[slot] += 1
            crash.displaced = self._num_displacements[slot] < NUM_DISPLACEMENTS
            return crash
        ended_itself = worker.exit_code is not None and worker.exit_code <= _LAST_ORDINARY_STATUS
        if not worker.greeted and ended_itself:
            raise EnvironmentProblem(
                f"the interpreter {worker.spec.interpreter} cannot run a worker: {crash.message}",
                hint="install this version of reasonrun there, or name another interpreter with launcher.python",
            )
        return crash

    def _without_room(self, slot: int, found: protocol.NoRoom) -> protocol.WorkerCrash:
        """How the worker ended. Raises EnvironmentProblem unless it had room before and another worker goes on."""
        if slot not in self.displaced or not any(worker.ready for worker in self.workers.values()):
            raise EnvironmentProblem(found.message, hint=found.hint)
        crash = self.workers.pop(slot).crash("found no other machine")
        crash.displaced = crash.from_outside = True
        return crash

    def end(self, slot: int) -> None:
        """End one worker at once."""
        if slot in self.workers:
            self.workers.pop(slot).end()

    def end_all(self) -> None:
        """End all workers at once."""
        self._failure = None
        for slot in list(self.workers):
            self.end(slot)

    def close(self) -> None:
        """Let idle workers leave in order, for at most ``close_seconds``; end the rest."""
        try:
            leaving = [worker for worker in self.workers.values() if worker.ready and worker.call is None]
            for worker in leaving:
                worker.send(protocol.Exit())
            deadline = time.monotonic() + self.limits.close_seconds
            while leaving and time.monotonic() < deadline and not self._interrupted():
                exchange(leaving, TURN_SECONDS)
                for worker in leaving:
                    worker.receive()
                leaving = [worker for worker in leaving if not worker.ended]
        finally:
            self.end_all()


class CrewOwner:
    """What everything that works through a crew offers beside its work."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    @property
    def num_starts(self) -> int:
        """Processes started so far."""
        return self._crew.num_starts

    @property
    def start_seconds(self) -> float:
        """Seconds that processes spent from their start until they could be asked, summed over processes."""
        return self._crew.start_seconds

    def close(self) -> None:
        """End the workers, in order when they are idle. The next call starts new ones."""
        self._crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self._crew.end_all()
