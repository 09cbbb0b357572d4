"""Ctrl-C and TERM: the first stops the run at the next boundary, the second at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, Self

from reasonrun.workers.process import kill_all

INTERRUPTED, TERMINATED = 130, 75  # exit codes for INT and TERM


class StopNow(KeyboardInterrupt):
    """A second Ctrl-C. Workers are dead already; the ledger is in a state that the same command continues from."""

    exit_code = INTERRUPTED


class StopFlag:
    """Takes over INT and TERM inside a ``with`` block; to be used in the main thread.

    Calling the flag gives 0, or the exit code of the stop that was asked for: 130 for INT, 75 for TERM. It goes to
    pools as ``interrupted``. A second INT kills all workers and raises StopNow, a third ends this process.

    Args:
        resume_command: the command line that continues the run, for the line that is printed.
    """

    def __init__(self, resume_command: str) -> None:
        self._resume_command = resume_command
        self._num_interrupts = 0
        self.exit_code = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __call__(self) -> int:
        return self.exit_code

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self.exit_code:
            kill_all()
            if self._num_interrupts > 2:
                os._exit(INTERRUPTED)
            _say("stopping at once")
            self.exit_code = INTERRUPTED
            raise StopNow
        if self.exit_code:
            return
        self.exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        _say(f"stopping at the next boundary; the same command continues this run: {self._resume_command}")


def _say(line: str) -> None:
    # Not print: the signal may have come in the middle of one, and a buffered stream refuses to be entered twice.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nreasonrun: {line}\n".encode())
