"""What tests share that run the toy: a server that forks it, and the bytes of a run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FINAL_NAMES = ("steps", "metrics.jsonl", "run.json", "_OK.json")


class ToyServer:
    """Runs the toy in a process of its own, again and again."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("toy_run.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
        )

    def run(self, path: Path, **order: Any) -> int:
        """Exit code of one run of the toy; minus the signal's number when it was killed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"run": str(path), **order}) + "\n")
        self._process.stdin.flush()
        return self.wait()

    def start_stopped(self, path: Path, **order: Any) -> int:
        """Begin a run that waits for SIGCONT; its pid. ``wait`` gives the exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"run": str(path), "traced": True, **order}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """Exit code of the run that was started."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=30)


def final_bytes(path: Path) -> dict[str, bytes]:
    """Every file of a run that must not depend on how often it was stopped, by relative path."""
    paths = [found for name in FINAL_NAMES for found in [path / name, *(path / name).rglob("*")] if found.is_file()]
    return {found.relative_to(path).as_posix(): found.read_bytes() for found in paths}
