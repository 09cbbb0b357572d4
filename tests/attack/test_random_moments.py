"""G1 to G3: whole runs killed at random moments on the scripted engine, and in each stage with real training and sampling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from promises import Counted

pytestmark = [pytest.mark.attack, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).parents[2] / "scripts"
NUM_KILLS = 100
SEEDS = 2
"""Loops of so many kills, one a core."""


def begin(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_hundred_random_kills_leave_the_bytes_of_an_undisturbed_run(counted: Counted) -> None:
    first = int(os.environ.get("REASONRUN_ATTACK_SEED", "0"))
    loops = [begin("kill_loop.py", "--kills", str(NUM_KILLS), "--seed", str(first + loop)) for loop in range(SEEDS)]
    for loop in loops:
        out, err = loop.communicate()
        assert out, err
        told = json.loads(out.splitlines()[-1])
        assert loop.returncode == 0 and told["equal"], f"replay with: kill_loop.py --only {told['seed']}\n{told}\n{err}"
        assert sum(told["kills"].values()) == NUM_KILLS
        for kind, number in told["kills"].items():
            for promise in ("G1", "G2"):
                counted(promise, f"random kills ({kind})", number)


@pytest.mark.parametrize("recipe", ["star_arith", "score_arith"])
def test_kills_in_each_stage_leave_weights_and_rows_of_an_undisturbed_run(recipe: str, counted: Counted) -> None:
    """The Hugging Face engine and the real trainers. A stage that was over before it was hit is tried again."""
    for _ in range(3):
        out, err = begin("kill_stages.py", recipe).communicate()
        assert out, err
        told = json.loads(out.splitlines()[-1])
        assert told["equal"] and told["weights"], out + err
        if all(told["hit"].values()):
            break
    assert all(told["hit"].values()), told["hit"]
    for promise in ("G1", "G2"):
        counted(promise, "kills with torch", len(told["hit"]))
