"""A supervisor to be killed: ``supervisor_stub.py POLLS GROUPS_PATH ENGINE_SETTINGS [NUM_RANKS]``; prints a line when busy.

With a number of ranks, a training worker with so many processes is at work beside the two generation workers.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import worker_stubs

from reasonrun.errors import ReasonrunError
from reasonrun.training import TrainJob
from reasonrun.workers.pool import GenerationPool, TrainingWorker
from reasonrun.workers.signals import StopFlag, StopNow


def train_beside(num_ranks: int, folder: Path, record_worker: Callable[[int, int], None]) -> None:
    """Start training in a thread, and return when all its processes have begun."""
    pids_path = folder / "ranks"
    worker = TrainingWorker(
        "worker_stubs.StubRanks", num_processes=num_ranks, attempt_dir=folder, record_worker=record_worker
    )
    job = TrainJob(
        kind="sft",
        rows=(),
        start=worker_stubs.make_checkpoint(),
        settings={"pids_path": str(pids_path)},
        num_steps=1,
        seed=0,
        out_dir=str(folder / "out"),
    )
    threading.Thread(target=worker.train, args=(job, lambda event: None), daemon=True).start()
    while not pids_path.exists() or pids_path.read_text().count("\n") < num_ranks:
        time.sleep(0.02)


def main() -> int:
    polls, groups_path, settings_json = sys.argv[1] == "polls", Path(sys.argv[2]), sys.argv[3]

    def record_worker(pid: int, pgid: int) -> None:
        with groups_path.open("a") as file:
            file.write(f"{pgid}\n")

    if len(sys.argv) > 4:
        train_beside(int(sys.argv[4]), groups_path.parent, record_worker)
    try:
        with StopFlag("reasonrun train stub.yaml") as flag:
            pool = GenerationPool(
                "worker_stubs.Stub",
                settings_json,
                num_workers=2,
                attempt_dir=groups_path.parent,
                record_worker=record_worker,
                interrupted=flag if polls else lambda: 0,
            )
            pool.load(worker_stubs.make_checkpoint())
            for _ in pool.generate((number, [worker_stubs.make_request(number)]) for number in range(1000)):
                print("busy", flush=True)
                time.sleep(0 if polls else 60)
    except (ReasonrunError, StopNow) as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
