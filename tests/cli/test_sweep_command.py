"""``reasonrun sweep`` as a user meets it: exit codes, one JSON document, the table from the summaries alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import reasonrun

SMALL = ["task.num_train=10", "task.num_dev=5", "task.num_test=5", "method.rounds=1", "evaluate.num_samples=2"]
NEVER_RIGHT = ["engine.spread=0", "engine.gain=0"]


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "reasonrun.cli.main", "sweep", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_the_command_stops_with_75_goes_on_and_prints_one_document(tmp_path):
    arms = ["smoke_star", *SMALL, "method.num_samples=1,2", "--out", "mine"]
    process = start(tmp_path, *arms, "engine.seconds_per_unit=2")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("mine/*/run.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75 and "continues this run: reasonrun sweep smoke_star" in err and "Traceback" not in err
    code, out, _ = finish(start(tmp_path, *arms, "--json"))
    document = json.loads(out)
    assert code == document["exit_code"] == 0
    assert [arm["name"] for arm in document["arms"]] == [f"smoke_star method.num_samples={n}" for n in (1, 2)]
    assert document["comparisons"][0]["difference"]["low"] is None
    code, out, _ = finish(start(tmp_path, "--table", "--out", "mine"))
    assert code == 0 and "one seed, so there are no intervals" in out and "method.num_samples=2" in out


def test_the_command_ends_with_5_after_a_finding_and_with_2_before_anything_for_a_mistake(tmp_path):
    arms = ["smoke_star", *SMALL, *NEVER_RIGHT, "--out", "mine"]
    code, out, err = finish(start(tmp_path, *arms, "engine.accuracy=0,0.4", "--markdown"))
    assert code == 5 and "finding: " in err
    assert "| smoke_star engine.accuracy=0 | 0, 1 ended in a finding |" in out
    code, _, err = finish(start(tmp_path, "--table"))
    assert code == 2 and "no recipe is named" in err
