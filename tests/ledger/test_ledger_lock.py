"""G6: one writer per run directory, and what happens to the processes of dead ones."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reasonrun.errors import RunConflict
from reasonrun.ledger.attempts import ATTEMPT_NAME, WORKERS_NAME
from reasonrun.ledger.faults import Faults
from reasonrun.ledger.files import Files, encode_json
from reasonrun.ledger.lock import LOCK_NAME, RunLock, read_owner
from reasonrun.ledger.processes import WorkerProcess, end_processes
from reasonrun.ledger.run_dir import RunDir
from reasonrun.process_facts import is_alive, start_time

RACER = """
import sys, time
from pathlib import Path
from reasonrun.errors import RunConflict
from reasonrun.ledger.run_dir import RunDir
root = Path(sys.argv[1])
(root / f"ready-{sys.argv[2]}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
try:
    with RunDir.open(root / "run", identity={}, command="racer " + sys.argv[2]):
        print("won", flush=True)
        sys.stdin.read()
except RunConflict as conflict:
    print("lost", conflict)
"""

# Ignores TERM, as a worker in the middle of a CUDA call does, and starts a child of its own.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
os.write(1, b"ready\\n")
time.sleep(600)
"""


def open_run(path: Path) -> RunDir:
    return RunDir.open(path, identity={}, command="reasonrun train toy.yaml", files=Files(Faults()))


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    """A process group of two that outlives SIGTERM."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    is_ready = [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
    if is_ready:
        yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert is_ready


def group(pgid: int) -> list[int]:
    """Live members of a process group, zombies left out."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == pgid and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def test_of_six_racers_one_wins_and_the_others_learn_who(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(i)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(6)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    first = {racer: racer.stdout.readline() for racer in racers if racer.stdout is not None}
    winners = [racer for racer, line in first.items() if line == "won\n"]
    losers = [line for line in first.values() if line.startswith("lost")]
    for racer in racers:
        racer.communicate(timeout=30)
    assert len(winners) == 1 and len(losers) == 5
    assert all(f"process {winners[0].pid} on" in line and "racer" in line for line in losers)


def test_a_conflict_names_owner_time_and_ways_out_and_ends_with_the_owner(tmp_path: Path) -> None:
    with open_run(tmp_path / "run"):
        with pytest.raises(RunConflict) as caught:
            open_run(tmp_path / "run")
        assert caught.value.exit_code == 4
        message = str(caught.value)
        assert f"process {os.getpid()} on" in message and "UTC: reasonrun train toy.yaml" in message
        assert f"kill {os.getpid()}" in message and "--run NEW" in message
    open_run(tmp_path / "run").close()


def test_a_reused_pid_is_no_owner(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.close()
    lock = tmp_path / "run" / LOCK_NAME
    owner = read_owner(lock)
    assert owner is not None and not owner.is_dead
    started = start_time(os.getpid())
    assert started is not None and is_alive(os.getpid(), started) and not is_alive(os.getpid(), started - 3600)
    record = {"pid": os.getpid(), "started": started - 3600, "host": owner.host, "command": "", "since": 0.0}
    lock.write_bytes(encode_json(record))
    reused = read_owner(lock)
    assert reused is not None and reused.is_dead
    open_run(tmp_path / "run").close()


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        lock = RunLock.acquire(tmp_path / LOCK_NAME, "first", Files(Faults()))
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())  # its fork handlers have run
            time.sleep(60)
            lock.release()
        os._exit(0)
    child = int(os.read(reader, 20))
    os.waitpid(owner, 0)
    try:
        RunLock.acquire(tmp_path / LOCK_NAME, "second", Files(Faults())).release()
    finally:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.close(writer)


def test_a_released_lock_is_free_while_a_forked_child_lives(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path / LOCK_NAME, "first", Files(Faults()))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    lock.release()
    RunLock.acquire(tmp_path / LOCK_NAME, "second", Files(Faults())).release()
    os.close(writer)
    os.waitpid(child, 0)


@pytest.mark.promise("G6", "orphans that write")
@pytest.mark.promise("G10", "orphans")
def test_an_orphan_group_is_ended_before_the_next_attempt_writes(
    tmp_path: Path, stubborn: subprocess.Popen[bytes]
) -> None:
    with open_run(tmp_path / "run") as run:
        run.record_worker(stubborn.pid, stubborn.pid)
    assert len(group(stubborn.pid)) == 2
    with open_run(tmp_path / "run") as run:
        assert len(run.ended_orphans) == 2
        found = next(orphan for orphan in run.ended_orphans if orphan.pid == stubborn.pid)
        assert 0 <= found.age_seconds < 60
        assert "python" in found.command
        assert str(found).startswith(f"process {stubborn.pid}, running for {int(found.age_seconds)} s: ")
        assert run.attempt is not None
        record = json.loads((run.attempt.path / ATTEMPT_NAME).read_text())
        assert [orphan["pid"] for orphan in record["ended_orphans"]] == [o.pid for o in run.ended_orphans]
        assert group(stubborn.pid) == []
    with open_run(tmp_path / "run") as run:
        assert run.ended_orphans == []


@pytest.mark.promise("G10", "orphans")
def test_members_are_ended_when_their_leader_is_dead(tmp_path: Path, stubborn: subprocess.Popen[bytes]) -> None:
    worker = WorkerProcess.of(stubborn.pid, stubborn.pid)
    stubborn.kill()
    stubborn.wait()
    left = group(stubborn.pid)
    assert len(left) == 1
    assert [orphan.pid for orphan in end_processes([worker], grace_seconds=0.1)] == left
    assert group(stubborn.pid) == []


@pytest.mark.promise("G6", "reused pids")
def test_a_reused_pid_another_host_and_a_torn_record_end_nobody(
    tmp_path: Path, stubborn: subprocess.Popen[bytes]
) -> None:
    worker = WorkerProcess.of(stubborn.pid, stubborn.pid)
    older = WorkerProcess(worker.pid, worker.pgid, worker.started - 3600, worker.host)
    elsewhere = WorkerProcess(worker.pid, worker.pgid, worker.started, "another-host")
    with open_run(tmp_path / "run") as run:
        assert run.attempt is not None
        lines = [encode_json(older.to_json()), encode_json(elsewhere.to_json()), encode_json(worker.to_json())[:20]]
        (run.attempt.path / WORKERS_NAME).write_bytes(b"\n".join(lines))
    with open_run(tmp_path / "run") as run:
        assert run.ended_orphans == []
    assert len(group(stubborn.pid)) == 2
