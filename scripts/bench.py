"""The performance aims, measured side by side: one JSON line per figure, appended to a file or printed.

python scripts/bench.py                # all of them; those of vLLM need `make vllm`
python scripts/bench.py --only P5 P6
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import reasonrun

HERE = Path(__file__).parent
TINY = Path(reasonrun.__file__).parent / "assets" / "tiny-1"


def script(name: str, *arguments: str) -> dict[str, Any]:
    """The last JSON line of another benchmark script."""
    done = subprocess.run([sys.executable, str(HERE / name), *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def seconds(code: list[str], times: int = 7) -> float:
    """Median wall seconds of a whole process."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *code], cwd=folder, stdout=subprocess.DEVNULL, check=True)
            measured.append(time.perf_counter() - begin)
    return statistics.median(measured)


def start_up() -> dict[str, Any]:
    """P5: help, check and plan against the import of the libraries that they cannot do without."""
    floor = seconds(["-c", "import typer, hydra, pydantic"])
    command = ["-m", "reasonrun.cli.main"]
    spent = {
        "help": seconds([*command, "--help"]),
        "check": seconds([*command, "check", "star_arith"]),
        "plan": seconds([*command, "plan", "star_arith"]),
    }
    ratios = {name: round(value / floor, 2) for name, value in spent.items()}
    return {"floor_seconds": round(floor, 3), "seconds": {k: round(v, 3) for k, v in spent.items()}, "ratio": ratios}


GROWTH = """
import json, resource, sys, time
from reasonrun.cli.progress import SilentProgress
from reasonrun.recipe import load
from reasonrun.running import RunOptions, run
from pathlib import Path
n = int(sys.argv[1])
recipe = load("smoke_star", ["task.num_train=1000", "task.num_dev=2", "task.num_test=2", "method.rounds=1",
                             "method.rationalize=false", f"method.num_samples={n // 1000}"])
begin = time.perf_counter()
run(recipe, RunOptions(directory=Path(sys.argv[2])), SilentProgress())
anonymous = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
print(json.dumps({"seconds_per_rollout": (time.perf_counter() - begin) / n, "anonymous_kib": anonymous}))
"""


def growth(sizes: list[int]) -> dict[str, Any]:
    """P6: the supervisor's seconds per rollout and anonymous memory with the scripted engine, 1,000 problems."""
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", GROWTH, str(size), f"{folder}/run"], capture_output=True, text=True, check=True
            )
            found[str(size)] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


VLLM = ["engine=vllm", "engine.enforce_eager=true"]
MEASURES = {
    "P1": lambda: script("bench_vllm.py", "throughput", "--model", "smollm2"),
    "P2": lambda: script("bench_generation.py", str(TINY)),
    "P3": lambda: script("bench_training.py"),
    "P3-pairs": lambda: script("bench_pairs.py"),
    "P4": lambda: script("bench_overhead.py", "share"),
    "P5": start_up,
    "P6": lambda: growth([1_000, 10_000, 100_000, 1_000_000]),
    "P7": lambda: script("bench_grading.py"),
    "on-policy": lambda: script("bench_on_policy.py"),
    "P8": lambda: script("bench_vllm.py", "turnaround", "--model", "smollm2"),
    "P8-tiny": lambda: script("bench_vllm.py", "turnaround", "--model", "tiny"),
    "P9": lambda: script("bench_overhead.py", "resume"),
    "P9-vllm": lambda: script("bench_overhead.py", "resume", "--recipe", "star_arith", *VLLM),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(MEASURES), default=sorted(MEASURES))
    for name in parser.parse_args().only:
        load = os.getloadavg()[0]
        print(
            json.dumps({"figure": name, "load": round(load, 1), "cores": os.cpu_count(), **MEASURES[name]()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
