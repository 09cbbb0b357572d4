"""What the NVIDIA driver says about the GPUs of this machine: how much of their memory is free, and who holds the rest."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from reasonrun.errors import EnvironmentProblem
from reasonrun.process_facts import ProcessFacts, is_alive

HELD_SHARE = 0.5
"""A device is held, not free, when other processes hold more than this share of its memory. A desktop or a small model
beside a run takes less; an engine reserves nearly all."""

RELEASE_SECONDS = 5.0
"""How long the memory of processes that have just ended may take to come back."""

_QUERY_SECONDS = 30.0
_TOOL = "nvidia-smi"
# Where one of these exists there may be GPUs although the tool is missing.
_DRIVER_PATHS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_WORKER_MODULES = ("reasonrun.workers.main", "reasonrun.trainers.launch")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process with memory on a device.

    ``facts`` is None when it cannot be seen from here: it belongs to another container. ``run`` is the directory of the run
    that it was started for; it is left over when that run's supervisor has gone.
    """

    pid: int
    mib: float
    facts: ProcessFacts | None
    run: str = ""
    is_leftover: bool = False

    def __str__(self) -> str:
        held = "" if math.isnan(self.mib) else f" ({self.mib / 1024:.1f} GiB)"
        if self.facts is None:
            return f"process {self.pid}{held}, which cannot be seen from here (another container or user)"
        what = "a leftover worker" if self.is_leftover else "a worker"
        return f"{self.facts}{held}{f', {what} of {self.run}' if self.run else ''}"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. Memory that the driver does not tell is not a number."""

    index: str
    uuid: str
    name: str
    total_mib: float
    used_mib: float
    holders: tuple[Holder, ...] = ()

    @property
    def is_held(self) -> bool:
        return self.used_mib > HELD_SHARE * self.total_mib

    def goes_by(self, name: str) -> bool:
        """Whether ``name``, a number or the beginning of a UUID, means this device."""
        return name == self.index or (name.startswith("GPU-") and self.uuid.startswith(name))

    def __str__(self) -> str:
        free = self.total_mib - self.used_mib
        memory = "memory unknown" if math.isnan(free) else f"{free / 1024:.1f} of {self.total_mib / 1024:.1f} GiB free"
        return f"{self.name}, {memory}"


def query_devices() -> list[Device] | None:
    """All GPUs that the driver lists; None when there is no tool to ask.

    Raises EnvironmentProblem when the driver does not answer.
    """
    if shutil.which(_TOOL) is None:
        return None
    rows = _query("gpu", "index,uuid,name,memory.total,memory.used")
    if not rows:
        return []
    holders: dict[str, list[Holder]] = {}
    for uuid, pid, mib in _query("compute-apps", "gpu_uuid,pid,used_memory"):
        if pid.isdigit():
            holders.setdefault(uuid, []).append(_holder(int(pid), _number(mib)))
    return [
        Device(
            index=index,
            uuid=uuid,
            name=name,
            total_mib=_number(total),
            used_mib=_number(used),
            holders=tuple(holders.get(uuid, ())),
        )
        for index, uuid, name, total, used in rows
    ]


def check_devices(names: Sequence[str], source: str) -> None:
    """Refuse devices that are not there, or mostly held by others; to be called before any worker of ours runs on them.

    Args:
        names: numbers or UUIDs; parts of a device (MIG) are taken as they are.
        source: the setting or variable that named them, for the message.

    Raises:
        EnvironmentProblem: the message names who holds a device, the hint the cheapest way out.
    """
    names = [name for name in names if not name.startswith("MIG-")]
    deadline = time.monotonic() + RELEASE_SECONDS
    while names:
        found = query_devices()
        if found is None and any(os.path.exists(path) for path in _DRIVER_PATHS):
            return
        _refuse_missing(names, found or [], source)
        held = [device for device in found or [] if device.is_held and any(map(device.goes_by, names))]
        if not held:
            return
        if any(holder.facts for device in held for holder in device.holders) or time.monotonic() > deadline:
            raise _held(held, found or [], source)
        time.sleep(0.5)


def _refuse_missing(names: Sequence[str], found: Sequence[Device], source: str) -> None:
    missing = [name for name in names if not any(device.goes_by(name) for device in found)]
    if not missing:
        return
    if not found:
        why = f"{_TOOL} lists none" if shutil.which(_TOOL) else f"{_TOOL} is not on PATH"
        raise EnvironmentProblem(
            f"{source}: device {', '.join(missing)} is asked for, and this machine shows no GPU ({why})",
            hint="take launcher.devices=cpu, or run where a GPU is",
        )
    listed = "".join(f"\n  {device.index}: {device}, {device.uuid}" for device in found)
    raise EnvironmentProblem(
        f"{source}: there is no device {', '.join(missing)}; this machine has{listed}",
        hint=f"name some of {', '.join(device.index for device in found)}, or take launcher.devices=auto",
    )


def _held(held: Sequence[Device], found: Sequence[Device], source: str) -> EnvironmentProblem:
    lines, free = [], [device.index for device in found if not device.is_held]
    for device in held:
        lines.append(f"\n  device {device.index} ({device}) is held by")
        lines += [f"\n    {holder}" for holder in device.holders] or [
            "\n    processes that cannot be seen from here (another container or user)"
        ]
    leftover = sorted({holder.pid for device in held for holder in device.holders if holder.is_leftover})
    ways = [f"kill {' '.join(map(str, leftover))} ends what is left over"] if leftover else []
    ways += [f"launcher.devices=[{','.join(free)}] takes what is free"] if free else []
    ways += [] if leftover else ["wait until the memory is given back"]
    ways.append("launcher.devices=cpu needs no GPU")
    return EnvironmentProblem(
        f"{'devices are held' if free else 'no GPU free'} (more than {HELD_SHARE:.0%} of the memory is in use by others);"
        f" {source} asks for {', '.join(device.index for device in held)}:{''.join(lines)}",
        hint="; or ".join(ways),
    )


def _holder(pid: int, mib: float) -> Holder:
    facts = ProcessFacts.of(pid)
    attempt = _attempt_of(pid) if facts else None
    if attempt is not None:
        return Holder(pid=pid, mib=mib, facts=facts, run=str(attempt.parents[1]), is_leftover=_is_over(attempt))
    is_worker = facts is not None and any(module in facts.command for module in _WORKER_MODULES)
    return Holder(pid=pid, mib=mib, facts=facts, is_leftover=is_worker and _has_lost_its_parent(pid))


def _attempt_of(pid: int) -> Path | None:
    """The attempt that a process was started for: whatever a worker starts inherits its log."""
    with suppress(OSError):
        log_path = Path(os.readlink(f"/proc/{pid}/fd/2"))
        for folder in log_path.parents:
            if folder.parent.name == "attempts" and (folder / "attempt.json").is_file():
                return folder
    return None


def _is_over(attempt: Path) -> bool:
    """Whether the supervisor of an attempt on this machine has gone."""
    try:
        record = json.loads((attempt / "attempt.json").read_text(encoding="utf-8"))
        return record["host"] == socket.gethostname() and not is_alive(int(record["pid"]), float(record["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_lost_its_parent(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).ppid() <= 1
    return False


def _query(what: str, fields: str) -> list[list[str]]:
    command = [_TOOL, f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except (subprocess.CalledProcessError, OSError):
        return []  # the tool is installed, a driver is not
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(
            f"the GPU driver does not answer: {' '.join(command)} took more than {_QUERY_SECONDS:g} s",
            hint="take launcher.devices=cpu; the driver, or the machine, has to be restarted",
        ) from None
    rows = [[field.strip() for field in line.split(",")] for line in listed.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields.split(","))]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
