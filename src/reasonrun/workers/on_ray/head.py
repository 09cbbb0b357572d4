"""Finds or starts the Ray of this machine: ``python -P -m reasonrun.workers.on_ray.head [ADDRESS]``.

Writes one line of JSON: the cluster's address, or what is wrong. A cluster that it has started lasts until it ends,
which it does with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

from reasonrun.errors import EnvironmentProblem
from reasonrun.workers.main import die_with_parent
from reasonrun.workers.on_ray import cluster


def main() -> NoReturn:
    die_with_parent(signal.SIGKILL, os.getppid(), lambda: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        ray = cluster.connect(sys.argv[1] if len(sys.argv) > 1 else "")
        found = {"address": ray.get_runtime_context().gcs_address}
    except EnvironmentProblem as error:
        found = {"message": error.message, "hint": error.hint}
    os.write(output_fd, json.dumps(found).encode() + b"\n")
    os.close(output_fd)
    if "address" in found:
        while os.read(0, 1):
            pass
        ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
