"""Which unit of work is where: waiting, with a worker, or lost with one; and what is set aside because it ends workers.

A worker may be ended by its work, or by chance: by somebody, by a node that went down, because memory ran out under two
of them together. A kill cannot be told from the other, so a unit is blamed slowly and cleared cheaply. Lost once, it is
asked again at once. Lost twice, it waits until everything else is answered, and is then asked alone, in ever smaller
parts; a sample depends on its row alone, so that parts give the same completions. Only a single request that has ended
``NUM_CRASHES`` workers, the last ones alone, is set aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from reasonrun.errors import RunFailed
from reasonrun.workers import protocol

NUM_CRASHES_AMONG_OTHERS = 2
"""A unit that ended so many workers is held back and taken apart."""

NUM_CRASHES = 4
"""A single request that ended so many workers, in its unit and by itself, is at fault, not chance."""

NUM_EXCUSED = 8
"""Losses that the work cannot have caused, of one unit or one idle worker; what comes after these is blamed all the same,
for something may kill workers because of what they do."""

_NUM_PARTS = 4  # every level costs a worker, every part only a call
_BARREN_CRASHES, _BARREN_CRASHES_PER_WORKER = 4, 2
_NUM_NAMED = 10


@dataclass(frozen=True)
class Unit:
    """One call. ``message(call, items)`` is the call itself, ``describe(items)`` says what is in it, for an error message.

    ``num_crashes`` counts the workers that it ended, alone or in the larger unit that it was a part of, ``num_excused``
    those that were ended by something else.
    """

    number: int
    items: tuple[Any, ...]
    message: Callable[[int, tuple[Any, ...]], protocol.Generate | protocol.Logprobs]
    describe: Callable[[tuple[Any, ...]], str]
    num_crashes: int = 0
    num_excused: int = 0

    def parts(self) -> list[Unit]:
        """The same items in ``_NUM_PARTS`` units, or one each where there are not so many."""
        size = -(-len(self.items) // _NUM_PARTS)
        return [replace(self, items=self.items[i : i + size]) for i in range(0, len(self.items), size)]


class UnitQueue:
    """Hands units to slots, each until it is answered or set aside."""

    def __init__(self, units: Iterator[Unit], num_workers: int) -> None:
        self._units = units
        self._again: deque[Unit] = deque()
        self._suspects: deque[Unit] = deque()
        self._set_aside: list[tuple[Unit, protocol.WorkerCrash]] = []
        self._exhausted = False
        self._num_barren = 0  # crashes since the last answer
        self._max_barren = _BARREN_CRASHES + _BARREN_CRASHES_PER_WORKER * num_workers
        self.in_flight: dict[int, Unit] = {}

    @property
    def done(self) -> bool:
        """Whether every unit has been answered or set aside."""
        return self._exhausted and not (self._again or self._suspects or self.in_flight)

    def take(self, slot: int) -> Unit | None:
        """The next unit for a free slot: lost ones first, suspects last and one at a time. None when there is none to give."""
        unit = self._again.popleft() if self._again else next(self._units, None)
        if unit is None:
            self._exhausted = True
            unit = self._suspects.popleft() if self._suspects and not self.in_flight else None
        if unit is not None:
            self.in_flight[slot] = unit
        return unit

    def finish(self, slot: int) -> Unit:
        """Note that the slot's unit is answered; that unit."""
        self._num_barren = 0
        return self.in_flight.pop(slot)

    def lose(self, slot: int, crash: protocol.WorkerCrash) -> None:
        """Put the slot's unit back, take it apart, or set it aside.

        Raises RunFailed when workers end one after the other without an answer to anything, so that no unit is the cause.
        """
        unit = self.in_flight.pop(slot)
        excused = crash.from_outside and unit.num_excused < NUM_EXCUSED
        if excused:
            unit = replace(unit, num_excused=unit.num_excused + 1)
        else:
            unit = replace(unit, num_crashes=unit.num_crashes + 1)
            self._num_barren += 1
        if unit.num_crashes < NUM_CRASHES_AMONG_OTHERS:
            self._again.append(unit)
        elif excused or (len(unit.items) == 1 and unit.num_crashes < NUM_CRASHES):
            self._suspects.append(unit)
        elif len(unit.items) > 1:
            self._suspects.extend(unit.parts())
        else:
            self._set_aside.append((unit, crash))
        if self._num_barren >= self._max_barren and not self.done:
            raise RunFailed(
                f"workers have ended {self._num_barren} times without answering anything in between\n  {crash.message}",
                hint=crash.hint or "the log says why; everything committed is safe, and the same command tries again",
            ) from crash

    def check_complete(self) -> None:
        """Raise RunFailed when something is set aside, naming it; everything else has been answered."""
        if not self._set_aside:
            return
        crash = self._set_aside[-1][1]
        lines = [
            f"\n  {unit.describe(unit.items)} (of unit {unit.number}; ended {unit.num_crashes} workers)"
            for unit, _ in self._set_aside[:_NUM_NAMED]
        ]
        more = len(self._set_aside) - _NUM_NAMED
        raise RunFailed(
            "set aside, because a worker ends every time that it works on it, with nothing else under way:"
            f"{''.join(lines)}{f'{chr(10)}  and {more} more' if more > 0 else ''}\n"
            f"everything else of the step is answered; the last of these workers: {crash.message}",
            hint=(f"{crash.hint}; " if crash.hint else "the log says why; ")
            + "what was answered is kept, and the same command asks only for what is set aside",
        ) from crash
