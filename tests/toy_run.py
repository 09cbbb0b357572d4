"""A small durable run, and a server that forks it: what the kill tests kill.

``python toy_run.py`` reads one JSON object a line (``run``, ``num_units``, ``fault``, ``log``, ``kill_after_units``,
``kill_seconds``, ``donors``, ``deadline_seconds``, ``hushed``, ``traced``, ``max_file_bytes``), runs the toy in a forked
child, which saves the imports, and answers with how the child ended. A ``traced`` child flushes for real, stops before it
begins, and its pid is a line of its own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from reasonrun.ledger.borrowing import CONDITIONS, Donors
from reasonrun.ledger.files import Files
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.steps import Committed
from reasonrun.records import Score, digest
from reasonrun.sets import Rows

ROWS_PER_UNIT = 3
Compute = Callable[[int], None]


def toy_run(
    path: Path,
    *,
    num_units: int,
    files: Files | None = None,
    on_compute: Compute = lambda unit: None,
    donors: Sequence[Path] = (),
) -> Any:
    """Sample, then train: every kind of file that a step can hold. Calls ``on_compute`` before each unit of work."""
    with toy_dir(path, files or Files(), {"recipe": "toy", "num_units": num_units}) as run:
        if run.finished is not None:
            return run.finished
        run.record_worker(os.getpid(), os.getpid())
        shared_step(run, donors)
        sampled = _sample(run, num_units, on_compute)
        trained = _train(run, sampled, path, on_compute)
        digests = [sampled.seal.files[shard.name].sha256 for shard in sampled.table_paths()]
        rows = Rows.load(Score, sampled.table_paths(), path / "derived", digests=digests)
        run.write_projection(
            "metrics.jsonl", [{"step": trained.name, "rows": digest([row.model_dump() for row in rows])}]
        )
        run.finish({"model": trained.digest, "num_rows": len(rows)})
        return run.finished


def toy_dir(
    path: Path, files: Files, identity: dict[str, Any], conditions: str = "toy", *, reopen: bool = False
) -> RunDir:
    attempt = {CONDITIONS: {"other": conditions}}
    return RunDir.open(path, identity=identity, command="toy", files=files, attempt=attempt, reopen=reopen)


def shared_step(run: RunDir, donors: Sequence[Path]) -> Committed:
    """A step that a donor may have: a table and a folder within a folder."""
    fingerprint = {"verb": "train", "shared": True}
    step = run.step("shared", fingerprint)
    if isinstance(step, Committed):
        return step
    lender = Donors(run.path, donors, {"other": "toy"}, run.files)
    taken = lender.lend(step, fingerprint, take=lambda path: None, refuse=lambda reason: None)
    if taken is not None:
        return taken
    step.seal_table("rows", Score, (toy_row(ordinal) for ordinal in range(5)))
    step.adopt_folder(_write_model(run.attempt_dir / "shared", state=7), "model")
    return step.commit({"num_rows": 5})


def toy_donor(path: Path) -> Path:
    """A run that has made the shared step and nothing else."""
    with toy_dir(path, Files(), {"recipe": "donor"}) as run:
        shared_step(run, ())
    return path


def toy_row(ordinal: int) -> Score:
    rng = random.Random(ordinal)
    return Score(value=rng.random(), answer=rng.choice([None, "é", str(rng.random())]), reason="wrong", grader="toy-1")


def _sample(run: RunDir, num_units: int, on_compute: Compute) -> Committed:
    step = run.step("round-001/sample", {"verb": "sample", "num_units": num_units})
    if isinstance(step, Committed):
        return step
    wal = step.wal()
    for unit in range(num_units):
        ordinals = range(unit * ROWS_PER_UNIT, (unit + 1) * ROWS_PER_UNIT)
        if all(ordinal in wal for ordinal in ordinals):
            continue
        on_compute(unit)
        wal.append([(ordinal, toy_row(ordinal).model_dump()) for ordinal in ordinals])
        if unit == num_units // 2:
            wal.flush()
    num_rows = step.seal_table("rows", Score, (Score(**row) for row in wal.rows()))
    step.put_json("counts", {"wrong": num_rows})
    return step.commit({"num_rows": num_rows})


def _train(run: RunDir, sampled: Committed, path: Path, on_compute: Compute) -> Committed:
    step = run.step("round-001/train", {"verb": "train", "rows": sampled.digest, "inputs": [sampled.name]})
    if isinstance(step, Committed):
        return step
    assert run.attempt is not None
    latest = step.latest_checkpoint()
    state = 0 if latest is None else int((latest[0] / "state.txt").read_text())
    for number in range(1 if latest is None else latest[1] + 1, 4):
        on_compute(-number)
        state = state * 31 + number
        step.adopt_checkpoint(_write_model(run.attempt.path / f"checkpoint-{number}", state), number)
    step.adopt_folder(_write_model(run.attempt.path / "final", state), "model")
    return step.commit({"state": state})


def _write_model(folder: Path, state: int) -> Path:
    (folder / "shards").mkdir(parents=True)
    (folder / "state.txt").write_text(str(state))
    (folder / "shards" / "weights.bin").write_bytes(random.Random(state).randbytes(5000))
    return folder


def _child(order: dict[str, Any], fsync: Callable[[int], None]) -> None:
    os.environ["REASONRUN_FAULT"] = order.get("fault", "")
    if "max_file_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["max_file_bytes"], resource.RLIM_INFINITY))
    if order.get("traced"):
        os.fsync = fsync
        os.kill(os.getpid(), signal.SIGSTOP)
    log = open(order["log"], "a", encoding="utf-8", buffering=1) if "log" in order else None  # noqa: SIM115
    num_computed = 0

    def on_compute(unit: int) -> None:
        nonlocal num_computed
        num_computed += 1
        if log is not None:
            log.write(f"{unit}\n")
        if num_computed == order.get("kill_after_units"):
            threading.Timer(order["kill_seconds"], os.kill, (os.getpid(), signal.SIGKILL)).start()

    donors = [Path(donor) for donor in order.get("donors", [])]
    toy_run(Path(order["run"]), num_units=order["num_units"], on_compute=on_compute, donors=donors)


def _serve() -> None:
    fsync = os.fsync
    os.fsync = lambda descriptor: None  # kill -9 loses nothing that was written; flushing takes most of the time
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _child(json.loads(line), fsync)
            except BaseException:
                if not json.loads(line).get("hushed"):
                    traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if json.loads(line).get("traced"):
            os.waitpid(pid, os.WUNTRACED)  # a child that is told to go on before it has stopped would stop for ever
            print(pid, flush=True)
        print(os.waitstatus_to_exitcode(_wait(pid, json.loads(line))), flush=True)


def _wait(pid: int, order: dict[str, Any]) -> int:
    """Status of a child that has ended. One that sleeps past the deadline ``deadline_seconds`` is killed from outside."""
    if not order.get("fault", "").endswith(":hang"):
        return os.waitpid(pid, 0)[1]
    deadline = time.monotonic() + order["deadline_seconds"]
    while time.monotonic() < deadline or psutil.Process(pid).status() != psutil.STATUS_SLEEPING:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    _serve()
