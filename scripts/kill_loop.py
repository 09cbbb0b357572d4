"""Kill a run again and again at random moments and compare what it ends with, byte for byte, with an undisturbed run.

    python scripts/kill_loop.py --kills 200 --seed 0

The supervisor runs the recipe on the scripted engine in a forked child, which is killed with SIGKILL after a random
time; then the same run continues in the next child. Prints one JSON line; exits 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from reasonrun.cli.progress import SilentProgress
from reasonrun.recipe import load
from reasonrun.running import RunOptions, run

OVERRIDES = [
    "task.num_train=30",
    "task.num_dev=10",
    "task.num_test=10",
    "method.rounds=3",
    "engine.unit_rows=8",
    "engine.seconds_per_unit=0.003",
]
UNCOMPARED = {"attempts", "derived", "quarantine", "lock"}


def content(directory: Path) -> dict[str, str]:
    """SHA-256 of every file that a result depends on."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    kept = [path for path in files if path.relative_to(directory).parts[0] not in UNCOMPARED]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def start(directory: Path) -> int:
    """Run or continue in a child of its own; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        run(load("smoke_star", OVERRIDES), RunOptions(directory=directory), SilentProgress())
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="reasonrun-kills-") as folder:
        clean = Path(folder) / "clean"
        begin = time.monotonic()
        os.waitpid(start(clean), 0)
        whole = time.monotonic() - begin
        expected = content(clean)
        num_kills, num_runs = 0, 0
        while num_kills < args.kills:
            directory = Path(folder) / f"run-{num_runs}"
            num_kills += kill_until_done(directory, rng, whole, args.kills - num_kills)
            num_runs += 1
            found = content(directory)
            if found != expected:
                changed = sorted(
                    name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
                )
                print(json.dumps({"equal": False, "seed": args.seed, "kills": num_kills, "differ": changed[:20]}))
                raise SystemExit(1)
    print(json.dumps({"equal": True, "seed": args.seed, "kills": num_kills, "runs": num_runs, "files": len(expected)}))


def kill_until_done(directory: Path, rng: random.Random, whole: float, budget: int) -> int:
    """Kill one run at random moments until it is done or the budget is spent, then let it finish. The kills made."""
    num_kills = 0
    while True:
        pid = start(directory)
        if num_kills < budget:
            time.sleep(rng.uniform(0.0, whole / 4))
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                os.killpg(pid, signal.SIGKILL) if os.getpgid(pid) == pid else os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                num_kills += 1
                continue
            return num_kills
        if os.waitpid(pid, 0)[1] != 0:
            raise SystemExit(f"the run in {directory} failed by itself")
        return num_kills


if __name__ == "__main__":
    main()
