"""Which unit of work is where: waiting, with a worker, or lost with one and to be asked again."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reasonrun.errors import RunFailed
from reasonrun.workers import protocol

NUM_UNIT_CRASHES = 2  # a unit that ends its worker this often is at fault, not chance
_NUM_UNIT_DISPLACEMENTS = 8  # so many machines are not lost by chance while they do the same work


@dataclass(frozen=True)
class Unit:
    """One call. ``content`` says what is in it, for an error message; ``message(call)`` is the call itself."""

    number: int
    content: str
    message: Callable[[int], protocol.Generate | protocol.Logprobs]


class UnitQueue:
    """Hands units to slots, each until it is answered."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._units = units
        self._again: deque[Unit] = deque()
        self._num_crashes: Counter[int] = Counter()
        self._num_displacements: Counter[int] = Counter()
        self._exhausted = False
        self.in_flight: dict[int, Unit] = {}

    @property
    def done(self) -> bool:
        """Whether every unit has been answered."""
        return self._exhausted and not self._again and not self.in_flight

    def take(self, slot: int) -> Unit | None:
        """The next unit for a free slot, lost ones first; None when there is none to give."""
        unit = self._again.popleft() if self._again else next(self._units, None)
        if unit is None:
            self._exhausted = True
        else:
            self.in_flight[slot] = unit
        return unit

    def finish(self, slot: int) -> int:
        """Note that the slot's unit is answered; its number."""
        return self.in_flight.pop(slot).number

    def lose(self, slot: int, crash: protocol.WorkerCrash) -> None:
        """Put the slot's unit back. Raises RunFailed when it was lost so often that it must be the cause.

        A worker that lost its machine counts for nothing, unless that happens to one unit again and again.
        """
        unit = self.in_flight.pop(slot)
        if crash.displaced:
            self._num_displacements[unit.number] += 1
            if self._num_displacements[unit.number] < _NUM_UNIT_DISPLACEMENTS:
                self._again.append(unit)
                return
        self._num_crashes[unit.number] += 1
        if self._num_crashes[unit.number] >= NUM_UNIT_CRASHES:
            raise RunFailed(
                f"unit {unit.number} has ended its worker {NUM_UNIT_CRASHES} times and is set aside; it holds "
                f"{unit.content}\n  {crash.message}",
                hint=crash.hint or "the log says why; everything committed is safe, and the same command tries again",
            ) from crash
        self._again.append(unit)
