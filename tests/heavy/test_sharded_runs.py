"""Whole runs whose training is divided between processes, killed and continued."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

RECIPE = [
    "gold_sft_arith",
    *("method.rounds=1", "method.num_steps=16", "method.sft.checkpoint_every=2", "method.sft.batch_size=16"),
    *("task.num_train=64", "task.num_dev=4", "task.num_test=4", "evaluate.num_samples=1", "preflight=off"),
    "launcher.sharding=fsdp",
]
_DEADLINE_SECONDS = 250


def start(run: Path, *, num_processes: int) -> subprocess.Popen[bytes]:
    program = "import sys; from reasonrun.cli.main import main; sys.argv[0] = 'reasonrun'; sys.exit(main())"
    arguments = ["train", *RECIPE, f"launcher.num_processes={num_processes}", "--run", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stdout=log, stderr=log)


def finish(run: Path, *, num_processes: int) -> dict[str, str]:
    """Digests of what the training step left."""
    process = start(run, num_processes=num_processes)
    assert process.wait(_DEADLINE_SECONDS) == 0, run.with_suffix(".log").read_text()
    paths = sorted((run / "steps").rglob("*.safetensors"))
    assert paths
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kill_after_a_checkpoint(run: Path) -> None:
    process = start(run, num_processes=2)
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not any(run.glob("**/checkpoints/*/_OK.json")):
        assert process.poll() is None and time.monotonic() < deadline, run.with_suffix(".log").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(900)
def test_a_killed_run_ends_at_the_same_bytes(tmp_path: Path) -> None:
    kill_after_a_checkpoint(tmp_path / "killed")
    assert finish(tmp_path / "killed", num_processes=2) == finish(tmp_path / "whole", num_processes=2)


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kill_after_a_checkpoint(tmp_path / "killed")
    finish(tmp_path / "killed", num_processes=3)
    finish(tmp_path / "whole", num_processes=2)
    ((some, other),) = zip(
        *[sorted((tmp_path / run / "steps").rglob("model.safetensors")) for run in ("killed", "whole")], strict=True
    )
    weights, expected = load_file(some), load_file(other)
    assert weights.keys() == expected.keys()
    assert max(float((weights[name] - expected[name]).abs().max()) for name in weights) < 1e-3
