"""What can be said about a process of this machine: whether it still lives, for how long it has, what it runs."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

START_TOLERANCE_SECONDS = 1.5
"""Clock corrections shift the start time that the kernel reports; a pid does not come round again in this time."""

_COMMAND_CHARACTERS = 200


def start_time(pid: int) -> float | None:
    """Start time of a live process in seconds since the epoch; None when it is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


def is_alive(pid: int, started: float) -> bool:
    """Whether the process that had ``pid`` at ``started`` still lives; a later process with its pid does not count."""
    found = start_time(pid)
    return found is not None and abs(found - started) <= START_TOLERANCE_SECONDS


@dataclass(frozen=True)
class ProcessFacts:
    """A live process as it is shown to a person; a long command is cut, and empty where it may not be read."""

    pid: int
    age_seconds: float
    command: str

    @classmethod
    def of(cls, pid: int) -> ProcessFacts | None:
        """The facts, or None when there is no such process, or none that can be seen from here."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            age_seconds = round(max(0.0, time.time() - process.create_time()), 1)
            with suppress(psutil.AccessDenied):
                command = " ".join(process.cmdline()) or process.name()
                return cls(pid, age_seconds, command[:_COMMAND_CHARACTERS])
            return cls(pid, age_seconds, "")
        return None

    def __str__(self) -> str:
        command = f": {self.command}" if self.command else ""
        return f"process {self.pid}, running for {duration(self.age_seconds)}{command}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def duration(seconds: float) -> str:
    """The two largest units: ``3 d 4 h``, ``12 min 5 s``."""
    left = int(seconds)
    parts: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        amount, left = divmod(left, size)
        if amount or parts or name == "s":
            parts.append(f"{amount} {name}")
    return " ".join(parts[:2])
