"""How a worker process is started: interpreter, environment, log, process group."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reasonrun.errors import EnvironmentProblem
from reasonrun.workers import protocol

NODE_LOST = 69  # sysexits.h EX_UNAVAILABLE; what ``through`` ends with when the machine under the worker is gone


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """How to start one worker. ``record_worker(pid, pgid)`` is called once per start, before anything is asked.

    ``through`` is the beginning of a command that runs the rest of it elsewhere, and connects its standard streams to its
    own: ``srun`` within an allocation, a relay into a Ray cluster. When that command ends, so must what it started.
    """

    name: str
    setup: protocol.Setup
    attempt_dir: Path
    record_worker: Callable[[int, int], None]
    python: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    through: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        parent = "any" if self.through else str(os.getpid())
        return [*self.through, self.interpreter, "-P", "-m", "reasonrun.workers.main", parent]

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable

    @property
    def log_path(self) -> Path:
        return self.attempt_dir / "logs" / f"{self.name}.log"


def spawn(spec: WorkerSpec) -> tuple[subprocess.Popen[bytes], int]:
    """Start the worker in a session of its own; the process, and where in the log its lines begin.

    Raises EnvironmentProblem when the interpreter cannot be executed.
    """
    spec.log_path.parent.mkdir(parents=True, exist_ok=True)
    with spec.log_path.open("ab") as log:
        try:
            process = subprocess.Popen(
                spec.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": import_path(), **spec.env},
                start_new_session=True,
            )
        except OSError as error:
            if spec.through:
                raise EnvironmentProblem(f"{spec.command[0]}, which starts a worker, cannot be run: {error}") from None
            raise EnvironmentProblem(
                f"the worker's interpreter {spec.command[0]} cannot be started: {error.strerror}",
                hint="launcher.python names a Python executable that has this version of reasonrun installed",
            ) from None
        return process, log.tell()


def import_path() -> str:
    """What this process added to its import path: a worker must find the same plug-ins, but keep its own packages."""
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    own |= {*site.getsitepackages(), site.getusersitepackages()}
    stdlib = sysconfig.get_path("stdlib")
    added = [str(Path(entry or ".").resolve()) for entry in sys.path if not entry.endswith(".zip")]
    return os.pathsep.join(path for path in added if path not in own and not path.startswith(stdlib + os.sep))
