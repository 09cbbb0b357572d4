"""G1 to G3: a whole run on the scripted engine, killed at random moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from promises import Counted

pytestmark = pytest.mark.attack

NUM_KILLS = 60
MAX_SECONDS = 110


def test_random_kills_leave_the_bytes_of_an_undisturbed_run(counted: Counted) -> None:
    seed = os.environ.get("REASONRUN_ATTACK_SEED", "0")
    script = Path(__file__).parents[2] / "scripts" / "kill_loop.py"
    command = [sys.executable, str(script), "--kills", str(NUM_KILLS), "--seed", seed, "--seconds", str(MAX_SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and told["equal"], f"replay with: {script} --only {told['seed']}\n{told}\n{done.stderr}"
    num_kills = sum(told["kills"].values())
    print(told)
    assert num_kills >= 15, f"only {num_kills} kills in {MAX_SECONDS} s: the machine is busy"
    for promise in ("G1", "G2"):
        counted(promise, "random kills of whole runs", num_kills)
