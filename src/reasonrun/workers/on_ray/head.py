"""Finds or starts the Ray of this machine: ``python -P -m reasonrun.workers.on_ray.head [ADDRESS]``.

Writes one line of JSON: the cluster's address, or what is wrong. A cluster that it has started lasts until it ends,
which it does with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import NoReturn

import psutil

from reasonrun.errors import EnvironmentProblem
from reasonrun.workers.main import die_with_parent
from reasonrun.workers.on_ray import cluster


def main() -> NoReturn:
    die_with_parent(signal.SIGTERM, os.getppid(), lambda: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        ray = cluster.connect(sys.argv[1] if len(sys.argv) > 1 else "")
        # Ray may have switched tokens on; who joins must do the same, and only then.
        found = {"address": ray.get_runtime_context().gcs_address, "auth_mode": os.environ.get("RAY_AUTH_MODE", "")}
    except EnvironmentProblem as error:
        found = {"message": error.message, "hint": error.hint}
    os.write(output_fd, json.dumps(found).encode() + b"\n")
    os.close(output_fd)
    if "address" in found:
        signal.signal(signal.SIGTERM, lambda number, frame: _end())  # Ray has put its own handler there
        while os.read(0, 1):
            pass
    _end()


def _end() -> NoReturn:
    """End with all that this process started: Ray's own agents would notice only after half a minute."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
