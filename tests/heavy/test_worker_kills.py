"""A run whose generation workers are killed at random twenty times is the run that nobody disturbed, byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reasonrun.ledger.attempts import WORKERS_NAME

pytestmark = pytest.mark.heavy

NUM_KILLS = 20
SEED = 0
RECIPE = [
    "star_arith",
    "method.rounds=1",
    "method.num_samples=32",
    "method.max_new_tokens=96",
    "method.steps_start=4",
    "task.num_train=600",
    "task.num_dev=20",
    "task.num_test=20",
    "preflight=off",
    "engine.unit_rows=64",
    "launcher.num_workers=2",
    "launcher.devices=cpu",
]
UNCOMPARED = {"attempts", "derived", "quarantine", "lock"}


def start(directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", *RECIPE, "--run", str(directory)]
    with (directory.parent / f"{directory.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def content(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    kept = [path for path in files if path.relative_to(directory).parts[0] not in UNCOMPARED]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def generation_workers(directory: Path) -> list[int]:
    """Guards of the generation workers that run now."""
    alive = []
    for line in (directory / "attempts" / "1" / WORKERS_NAME).read_text().splitlines():
        pid = json.loads(line)["pid"]
        with contextlib.suppress(OSError, psutil.Error):
            is_generation = "generation-" in os.readlink(f"/proc/{pid}/fd/2")
            if is_generation and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                alive.append(pid)
    return alive


def kill_one(directory: Path, rng: random.Random) -> bool:
    how = rng.choice(["group", "guard", "child"])
    with contextlib.suppress(OSError, psutil.Error, IndexError):
        pid = rng.choice(generation_workers(directory))
        if how == "group":
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid if how == "guard" else psutil.Process(pid).children()[0].pid, signal.SIGKILL)
        return True
    return False


@pytest.mark.timeout(3600)
@pytest.mark.promise("G3", "runs under twenty kills of workers")
def test_completions_after_twenty_kills_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    assert start(clean).wait() == 0, (tmp_path / "clean.log").read_text()
    rng = random.Random(SEED)
    process = start(killed)
    log = killed / "steps" / "round-001" / "sample" / "wal.jsonl"
    num_kills = size = 0
    while process.poll() is None and num_kills < NUM_KILLS:
        # A worker that is killed whenever it starts would never answer; some unit comes in between two kills.
        if log.exists() and log.stat().st_size > size:
            time.sleep(rng.uniform(0.0, 2.0))
            size = log.stat().st_size if log.exists() else size
            num_kills += kill_one(killed, rng)
        time.sleep(0.02)
    assert process.wait() == 0, (tmp_path / "killed.log").read_text()
    assert num_kills == NUM_KILLS, "the load was over before all kills were made"
    assert content(killed) == content(clean)
    assert generation_workers(killed) == []
