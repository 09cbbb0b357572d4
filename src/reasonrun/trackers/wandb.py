"""Export to Weights & Biases, by a process of its own that may fail, hang or die without the run noticing.

``metrics.jsonl`` stays the record. The exporter follows it, and ``derived/wandb.json`` holds the W&B run's id and how
far the export is, so that a resumed run goes on in the same W&B run and no row is logged twice. To catch up later::

    python -m reasonrun.trackers.wandb RUN_DIR

Offline, W&B cannot continue a run's folder. Each attempt then writes a new ``wandb/offline-run-*-<id>`` with the same
run id and only the rows above the mark; ``wandb sync --id <id> FOLDER FOLDER`` uploads them to one run, in order
of time. Going online later sends every row that the server lacks, so those folders need no sync any more. When a step
of the run was made again (``--redo``), rows that W&B holds are no longer true: the export begins a new W&B run.

The recipe goes to W&B as the run's configuration, without paths and without values from the environment; W&B's own
collection of code, packages, git state and machine data is off.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from reasonrun.errors import EnvironmentProblem
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.trackers._wandb_privacy import Scrubber, has_api_key, secret_values

Mode = Literal["auto", "offline", "online", "disabled"]
KILL_SECONDS = 2.0
"""Part of ``finish_seconds`` that is kept for ending an exporter that does not finish."""


class Wandb:
    """Starts the exporter and lets go of it in bounded time. After ``start`` nothing here raises or waits for W&B."""

    class Settings(SettingsBase):
        name: Literal["wandb"] = setting("wandb", Effect.OPERATIONAL, "Which tracker.")
        project: str = setting("reasonrun", Effect.OPERATIONAL, "W&B project.", min_length=1)
        entity: str | None = setting(None, Effect.OPERATIONAL, "W&B user or team; null takes the account's default.")
        mode: Mode = setting(
            "auto",
            Effect.OPERATIONAL,
            "auto is what WANDB_MODE says, else online when WANDB_API_KEY or ~/.netrc holds a key, else offline.",
        )
        num_sample_rows: int = setting(
            50, Effect.OPERATIONAL, "Graded completions in the table of each grade step; 0 sends none.", ge=0, le=10_000
        )
        finish_seconds: float = setting(
            20.0,
            Effect.OPERATIONAL,
            "Seconds that the exporter gets at the end of a run before it is ended.",
            ge=0,
            le=600,
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._run_dir = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._sender: threading.Thread | None = None

    def start(self, run_dir: Path, recipe: dict[str, Any]) -> None:
        """Start the exporter.

        Raises:
            EnvironmentProblem: the package wandb is not installed.
        """
        if resolve_mode(self.settings) == "disabled":
            return
        if not is_installed():
            raise EnvironmentProblem(
                "The recipe exports to W&B (trackers: wandb), and the package wandb is not installed.",
                hint="pip install 'reasonrun[wandb]', or take wandb out of trackers",
            )
        self._run_dir = run_dir.resolve()
        config = Scrubber(secret_values(os.environ)).recipe(recipe)
        order = json.dumps({"settings": self.settings.model_dump(mode="json"), "config": config}).encode() + b"\n"
        try:
            self._process = process = self._spawn()
        except OSError as error:
            tell(f"W&B export did not start ({error.strerror}); {catch_up(self._run_dir)}")
            return
        # A pipe holds little, and an exporter that does not read must not hold up the run.
        self._sender = threading.Thread(target=_send, args=(process, order), daemon=True)
        self._sender.start()

    def log(self, row: dict[str, Any]) -> None:
        """Nothing to do: the exporter reads the metrics record."""

    def finish(self) -> None:
        """Let the exporter send the rest, end it when that takes too long, and say so when rows are missing."""
        process, self._process = self._process, None
        if process is None or self._sender is None or process.stdin is None:
            return
        deadline = time.monotonic() + max(0.0, self.settings.finish_seconds - KILL_SECONDS)
        self._sender.join(deadline - time.monotonic())
        if not self._sender.is_alive():
            with suppress(OSError):
                process.stdin.close()
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            end_tree(process.pid)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS / 2)
            with suppress(OSError):
                process.stdin.close()
        if code != 0:
            why = "was not finished in time" if code is None else "failed"
            tell(f"W&B export {why} (see {self._log_path}); {catch_up(self._run_dir)}")

    @property
    def _log_path(self) -> Path:
        return self._run_dir / "wandb" / "exporter.log"

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
        command = [sys.executable, "-P", "-m", "reasonrun.trackers.wandb", str(self._run_dir)]
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                [*command, "--follow", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )


def end_tree(pid: int) -> None:
    """End a process and what it started; W&B's own process gets a moment to write its file."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        children = process.children(recursive=True)
        if pid != os.getpid():
            process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        _, stuck = psutil.wait_procs(children, timeout=KILL_SECONDS / 2)
        for child in stuck:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _send(process: subprocess.Popen[bytes], order: bytes) -> None:
    assert process.stdin is not None
    view = memoryview(order)
    with suppress(OSError, ValueError):
        while view:
            view = view[process.stdin.write(view) :]


def is_installed() -> bool:
    """Whether ``import wandb`` would find the package."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None  # a folder of W&B's files named wandb/ is no package


def tell(line: str) -> None:
    """A line on standard error, if anybody listens."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def catch_up(run_dir: Path) -> str:
    """What to do about rows that W&B lacks."""
    command = shlex.join([Path(sys.executable).name, "-m", "reasonrun.trackers.wandb", str(run_dir)])
    return f"the run is not affected, its record is metrics.jsonl. To catch up: {command}"


def resolve_mode(settings: Wandb.Settings) -> str:
    """offline, online or disabled: what ``mode: auto`` means in this environment."""
    if settings.mode != "auto":
        return settings.mode
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("offline", "online", "disabled"):
        return asked
    return "online" if has_api_key(os.environ) else "offline"


if __name__ == "__main__":
    from reasonrun.trackers._wandb_process import main

    sys.exit(main())
