"""A supervisor to be killed: ``supervisor_stub.py POLLS GROUPS_PATH ENGINE_SETTINGS``; prints a line when busy."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import worker_stubs

from reasonrun.errors import ReasonrunError
from reasonrun.workers.pool import GenerationPool
from reasonrun.workers.signals import StopFlag, StopNow


def main() -> int:
    polls, groups_path, settings_json = sys.argv[1] == "polls", Path(sys.argv[2]), sys.argv[3]

    def record_worker(pid: int, pgid: int) -> None:
        with groups_path.open("a") as file:
            file.write(f"{pgid}\n")

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
