"""Write the run directory that tests keep for the present format: a finished scripted run, as small as can be.

    python scripts/golden_run.py tests/golden/run-1

Once committed it is never written again: every later version of reasonrun has to read it. A new format gets a new number.
"""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

from reasonrun.cli.progress import SilentProgress
from reasonrun.recipe import load
from reasonrun.running import RunOptions, run

OVERRIDES = ["task.num_train=4", "task.num_dev=2", "task.num_test=2", "method.rounds=1", "evaluate.num_samples=2"]


def main() -> None:
    path = Path(sys.argv[1])
    if path.exists():
        sys.exit(f"{path} exists; a golden run is never written again")
    command = ["reasonrun", "train", "smoke_star", *OVERRIDES, "preflight=off"]
    sys.argv, socket.gethostname = command, lambda: "localhost"  # nothing of this machine belongs into it
    run(load("smoke_star", command[3:]), RunOptions(directory=path, command=" ".join(command)), SilentProgress())
    for leftover in ("derived", "attempts/1/train"):
        shutil.rmtree(path / leftover)
    (path / "lock").unlink()


if __name__ == "__main__":
    main()
