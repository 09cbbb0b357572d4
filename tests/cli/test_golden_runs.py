"""G22: runs of every format that was ever written stay readable. ``scripts/golden_run.py`` made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_commands import reasonrun_cli

from reasonrun.ledger.seals import FORMAT

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("run-*"))


def test_the_present_format_has_a_run_that_is_kept() -> None:
    assert [path.name for path in GOLDEN] == [f"run-{number}" for number in range(1, FORMAT + 1)]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with two copies of a kept run, because reading it makes caches in it."""
    for name in ("run", "again"):
        shutil.copytree(request.param, tmp_path / name)
    return tmp_path


@pytest.mark.promise("G22", "old runs")
def test_an_old_run_is_read(folder: Path) -> None:
    number = json.loads((folder / "run/run.json").read_text())["format"]
    assert {json.loads(path.read_text())["format"] for path in folder.rglob("_OK.json")} == {number}
    num_steps = len(list((folder / "run/steps").rglob("_OK.json")))
    state = json.loads(reasonrun_cli(folder, "status", "run", "--json").stdout)
    assert (
        state["state"] == "finished"
        and state["num_steps"] == num_steps
        and set(state["result"]["test"]) >= {"base", "last"}
    )
    page = json.loads(reasonrun_cli(folder, "samples", "run", "--limit", "100", "--json").stdout)
    graded = [
        row["num_rollouts"] for row in state["steps"] if row["step"] in ("round-001/grade", "round-001/grade-hinted")
    ]
    assert page["num_matching"] == sum(graded) == len(page["rollouts"]) > 0
    assert all(rollout["completion"] and rollout["scores"] for rollout in page["rollouts"])
    document = json.loads(reasonrun_cli(folder, "compare", "run", "again", "--json").stdout)
    (pair,) = document["comparisons"]
    assert pair["evaluations"]
    assert all(part["num_improved"] == part["num_worsened"] == 0 for part in pair["evaluations"])
    for run in ("run", "again"):
        done = reasonrun_cli(folder, "verify", run, "--deep", "--json")
        verified = json.loads(done.stdout)
        assert (
            done.returncode == 0 and verified["ok"] and verified["num_steps"] == num_steps and verified["notes"] == []
        )
