"""Kill runs again and again at random moments and compare what they end with, byte for byte, with an undisturbed run.

    python scripts/kill_loop.py --kills 200 --seed 0
    python scripts/kill_loop.py --only 0:17              # the moments of one run once more

The supervisor runs the recipe on the scripted engine in a forked child, which is killed with SIGKILL after a random
time: its whole process group, or the supervisor alone. One kill in five comes while the attempt is still recovering.
Such a run has no child processes; tests/workers/test_random_kills.py kills those. Then the same run continues in the next
child. Every run has a seed of its own, printed when it differs. Prints one JSON line; exits 1 when a byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
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


@dataclass
class Tally:
    """What was done so far."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    parser.add_argument("--only", help="one run, by the seed that a failure printed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reasonrun-kills-") as folder:
        raise SystemExit(_loop(Path(folder), args.only, args.seed, args.kills, args.seconds))


def _loop(folder: Path, only: str | None, seed: int, num_kills: int, seconds: float) -> int:
    deadline, begin = time.monotonic() + seconds, time.monotonic()
    os.waitpid(start(folder / "clean"), 0)
    whole, expected, tally = time.monotonic() - begin, content(folder / "clean"), Tally()
    while tally.kills.total() < num_kills and time.monotonic() < deadline:
        run_seed = only or f"{seed}:{tally.runs}"
        directory = folder / f"run-{tally.runs}"
        tally.runs += 1
        problem = kill_until_done(directory, random.Random(run_seed), whole, num_kills, deadline, tally)
        found = content(directory)
        differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if problem or differ:
            kept = shutil.copytree(directory, tempfile.mkdtemp(prefix="reasonrun-differs-"), dirs_exist_ok=True)
            failure = {"equal": False, "seed": run_seed, "problem": problem, "differ": differ[:20], "kept": str(kept)}
            print(json.dumps({**failure, "kills": tally.kills}))
            return 1
        if only:
            break
    print(json.dumps({"equal": True, "seed": seed, "kills": tally.kills, "runs": tally.runs, "files": len(expected)}))
    return 0


def kill_until_done(
    directory: Path, rng: random.Random, whole: float, num_kills: int, deadline: float, tally: Tally
) -> str:
    """Kill one run at random moments until it is done or the budget is spent, then let it finish. What went wrong."""
    while True:
        pid = start(directory)
        if tally.kills.total() < num_kills and time.monotonic() < deadline:
            is_early = directory.exists() and rng.random() < 0.2
            how = rng.choice(["group", "supervisor"])
            time.sleep(rng.uniform(0.0, whole / 40 if is_early else whole / 4))
            if os.waitpid(pid, os.WNOHANG)[0] != 0:
                return ""
            how = kill(pid, how)
            os.waitpid(pid, 0)
            tally.kills[f"{how}, recovering" if is_early else how] += 1
            continue
        return "" if os.waitpid(pid, 0)[1] == 0 else "the run failed by itself"


def kill(pid: int, how: str) -> str:
    """Kill a supervisor's group, or the supervisor alone where it leads none yet; what was killed."""
    is_leader = os.getpgid(pid) == pid
    os.killpg(pid, signal.SIGKILL) if how == "group" and is_leader else os.kill(pid, signal.SIGKILL)
    return "group" if how == "group" and is_leader else "supervisor"


if __name__ == "__main__":
    main()
