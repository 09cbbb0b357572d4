"""What a run costs beside its models: P4 over a whole STaR run, P9 from a kill to the first new token.

python scripts/bench_overhead.py share     # P4
python scripts/bench_overhead.py resume    # P9
python scripts/bench_overhead.py resume --recipe star_arith engine=vllm engine.enforce_eager=true
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from reasonrun.cli.progress import SilentProgress
from reasonrun.grading.number import NumberGrader
from reasonrun.recipe import load
from reasonrun.records import Problem, Score
from reasonrun.running import RunOptions, run
from reasonrun.workers import protocol
from reasonrun.workers.process import WorkerProcess

Interval = tuple[float, float]
NAMES = ("start", "generate", "grade", "train_set_up", "train", "train_write")


class Clock:
    """Intervals in which workers start, generate and train, and in which the supervisor grades."""

    def __init__(self) -> None:
        self.spent: dict[str, list[Interval]] = {name: [] for name in NAMES}
        self._began: dict[tuple[int, str], float] = {}
        self._logged = 0.0
        self._watch_workers()
        self._watch_grading()

    def _watch_workers(self) -> None:
        send, note = WorkerProcess.send, WorkerProcess._note

        def timed_send(worker: WorkerProcess, message: protocol.ToWorker) -> None:
            if isinstance(message, protocol.Train):
                self._logged = time.monotonic()
            if isinstance(message, protocol.Setup | protocol.Generate):
                self._began[worker.pid, message.kind] = time.monotonic()
            send(worker, message)

        def timed_note(worker: WorkerProcess, message: protocol.FromWorker) -> None:
            note(worker, message)
            now = time.monotonic()
            # An engine imports its libraries with its first load, a trainer when it is made.
            if isinstance(message, protocol.Ready | protocol.Loaded) and (worker.pid, "setup") in self._began:
                self.spent["start"].append((self._began[worker.pid, "setup"], now))
                if isinstance(message, protocol.Loaded):
                    del self._began[worker.pid, "setup"]
            elif isinstance(message, protocol.Generated):
                self.spent["generate"].append((self._began.pop((worker.pid, "generate")), now))
            elif isinstance(message, protocol.Event) and message.event["event"] == "log":
                name = "train" if message.event["step"] > 1 else "train_set_up"
                self.spent[name].append((self._logged, now))
                self._logged = now
            elif isinstance(message, protocol.Trained):
                self.spent["train_write"].append((self._logged, now))

        WorkerProcess.send, WorkerProcess._note = timed_send, timed_note  # type: ignore[method-assign]

    def _watch_grading(self) -> None:
        grade_many = NumberGrader.grade_many

        def timed(grader: NumberGrader, items: Iterable[tuple[Problem, str, bool]]) -> Generator[Score]:
            scores = grade_many(grader, items)
            while True:
                begin = time.monotonic()
                score = next(scores, None)
                self.spent["grade"].append((begin, time.monotonic()))
                if score is None:
                    return
                yield score

        NumberGrader.grade_many = timed  # type: ignore[method-assign]


def union(intervals: Iterable[Interval]) -> float:
    """Seconds that at least one of the intervals covers."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(intervals):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def share() -> dict[str, Any]:
    """P4: wall seconds of ``star_arith`` in which no kernel is at work, worker starts taken out of both."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        outcome = run(load("star_arith"), RunOptions(directory=Path(folder) / "run"), SilentProgress())
        total = time.monotonic() - begin
    kernels = [interval for name in ("generate", "train", "grade") for interval in clock.spent[name]]
    starting = union([*kernels, *clock.spent["start"]]) - union(kernels)
    outside = total - union(kernels) - starting
    return {
        "seconds": round(total, 2),
        **{name: round(union(intervals), 2) for name, intervals in clock.spent.items()},
        "only_starting": round(starting, 2),
        "outside": round(outside, 2),
        "outside_share": round(outside / (total - starting), 4),
        "test_sampled": outcome.result["test"]["last"]["sampled"]["accuracy"],
    }


def first_answer(directory: Path, recipe: list[str]) -> None:
    """Run until the first tokens of this attempt are there; print the seconds since this interpreter began."""
    note = WorkerProcess._note

    def timed(worker: WorkerProcess, message: protocol.FromWorker) -> None:
        note(worker, message)
        # Not the first unit: those of a resumed step and of a new run's first one differ in size. A heartbeat comes each second.
        if isinstance(message, protocol.Generated) or (isinstance(message, protocol.Heartbeat) and message.num_done):
            print(time.time() - float(os.environ["BENCH_BEGAN"]), flush=True)
            os.killpg(0, signal.SIGKILL)

    WorkerProcess._note = timed  # type: ignore[method-assign]
    run(load(recipe[0], recipe[1:]), RunOptions(directory=directory), SilentProgress())


def resume(recipe: list[str]) -> dict[str, Any]:
    """P9: from the start of the command to its first new tokens, in a new run and in one killed in round 2."""
    command = [sys.executable, __file__, "first"]

    def seconds(directory: Path) -> float:
        done = subprocess.run(
            [*command, "--directory", str(directory), "--recipe", *recipe],
            env={**os.environ, "BENCH_BEGAN": str(time.time())},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return float(done.stdout)

    with tempfile.TemporaryDirectory() as folder:
        cold = [seconds(Path(folder) / f"cold-{number}") for number in range(3)]
        killed = Path(folder) / "killed"
        train = [sys.executable, "-m", "reasonrun.cli.main", "train", *recipe, "--run", str(killed)]
        process = subprocess.Popen(train, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        while not list(killed.glob("steps/round-002/sample/*")):
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        resumed = [seconds(killed) for _ in range(3)]
    cold.sort()
    resumed.sort()
    return {
        "recipe": recipe,
        "cold_seconds": cold,
        "resumed_seconds": resumed,
        "difference_of_medians": round(resumed[1] - cold[1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("share", "resume", "first"))
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--recipe", nargs="+", default=["star_arith"], help="of P9: a recipe and overrides")
    args = parser.parse_args()
    if args.what == "first":
        first_answer(args.directory, args.recipe)
    else:
        print(json.dumps(share() if args.what == "share" else resume(args.recipe)))


if __name__ == "__main__":
    main()
