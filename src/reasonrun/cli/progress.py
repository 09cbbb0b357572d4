"""How a run shows itself: bars on a terminal, a plain line every 30 seconds elsewhere. Writes to standard error."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from reasonrun.report.printable import printable

QUIET_SECONDS = 30.0


class PlainProgress:
    """One line per finished step, and one every 30 seconds in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._done: dict[str, tuple[int, int]] = {}
        self._spoke = time.monotonic()

    def begin(self, step: str, total: int, done: int) -> None:
        self._done[step] = (done, total)
        if done:
            self.say(f"{step}: goes on at {done} of {total}")

    def advance(self, step: str, amount: int, note: str = "") -> None:
        done, total = self._done.get(step, (0, 0))
        self._done[step] = (done + amount, total)
        if time.monotonic() - self._spoke > QUIET_SECONDS:
            self.say(f"{step}: {done + amount} of {total} {note}".rstrip())

    def end(self, step: str, summary: str) -> None:
        self.say(f"{step}: {summary}")

    def say(self, line: str) -> None:
        self._spoke = time.monotonic()
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class BarProgress:
    """A bar for the step at work; finished steps stay as lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, step: str, total: int, done: int) -> None:
        self._tasks[step] = self._bars.add_task(step, total=total, completed=done, note="")

    def advance(self, step: str, amount: int, note: str = "") -> None:
        if step in self._tasks:
            self._bars.update(self._tasks[step], advance=amount, note=note)

    def end(self, step: str, summary: str) -> None:
        task = self._tasks.pop(step, None)
        if task is not None:
            self._bars.remove_task(task)
        self.say(f"{step}: {summary}")

    def say(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class SilentProgress:
    """For rehearsals and tests."""

    def begin(self, step: str, total: int, done: int) -> None: ...

    def advance(self, step: str, amount: int, note: str = "") -> None: ...

    def end(self, step: str, summary: str) -> None: ...

    def say(self, line: str) -> None: ...
