"""The exporter as a process, against the real wandb package, offline: what W&B's own files hold afterwards."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wandb_runs import catch_up, evaluate_row, read_offline, round_rows, run_python, write_metrics, write_round

from reasonrun.trackers.wandb import Wandb

pytest.importorskip("wandb")

CANARY = "canary0123456789abcdef0123456789abcdef01"


def until(is_done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def mark(run: Path) -> dict[str, Any]:
    path = run / "derived" / "wandb.json"
    return json.loads(path.read_text()) if path.exists() else {"num_rows": 0}


@pytest.mark.promise("G18", "trackers")
def test_run_and_its_resumption_are_one_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    run = tmp_path / "star-test"
    (run / "attempts" / "1").mkdir(parents=True)
    (run / "attempts" / "1" / "notes.jsonl").write_text(
        '{"step": "round-001/evaluate", "verb": "evaluate", "seconds": 1.5}\n{"step": "round-001/train", "ver'
    )
    recipe = {
        "seed": 7,
        "method": {"name": "star", "sft": {"lr": 2e-4}},
        "model": {"path": "/models/llama"},
        "note": CANARY,
    }
    for number in (1, 2, 3):
        write_round(run, number)
    rows = round_rows(1)
    write_metrics(run, rows)

    settings = Wandb.Settings(mode="offline", project="maths", num_sample_rows=3, finish_seconds=60)
    first = Wandb(settings)
    first.start(run, recipe)
    until(lambda: mark(run)["num_rows"] == 5)
    rows += round_rows(2)
    write_metrics(run, rows)  # a commit while the exporter follows
    first.log(rows[-1])
    first.finish()
    assert list(read_offline(run)) == [mark(run)["run_id"]]
    (before,) = read_offline(run).values()
    assert before.series("dev/greedy") == [0.1, 0.2]

    rows += [*round_rows(3), evaluate_row("final/test-best", "test", 0.4)]
    write_metrics(run, rows)
    second = Wandb(settings)
    second.start(run, recipe)
    second.finish()
    assert catch_up(run).returncode == 0  # everything is there: no third session
    assert len(list(run.glob("wandb/offline-run-*"))) == 2

    ((run_id, found),) = read_offline(run).items()
    assert run_id == mark(run)["run_id"]
    assert (found.project, found.name) == ("maths", "star-test")
    config = {key: value for key, value in found.config.items() if key != "_wandb"}
    assert config == {"seed": 7, "method": {"name": "star", "sft": {"lr": 2e-4}}, "model": {}, "note": "***"}
    # Per round: dev, sample, grade, curate, two curve points, the train row; then the test.
    assert found.steps() == list(range(3 * 7 + 1))
    assert found.series("dev/greedy") == [0.1, 0.2, 0.3]
    assert found.series("dev/greedy/low") == [0.3, 0.3, 0.3]
    assert found.series("test/best/greedy") == [0.4]
    assert found.series("round/kept_share") == [0.5, 0.5, 0.5]
    assert found.series("sample/num_completion_tokens") == [61, 62, 63]
    assert found.series("grade/accuracy") == [0.5, 0.5, 0.5]
    assert found.series("train/loss") == [2.0, 1.0, 1.0, 0.5, pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert found.series("train/optimizer_step") == [1, 2, 3, 4, 5, 6]
    assert found.series("round") == [*[1] * 7, *[2] * 7, *[3] * 7, 4]
    assert found.series("seconds/evaluate") == [1.5]
    assert found.axes["train/*"] == "train/optimizer_step"
    assert found.axes["dev/*"] == "round"

    tables = [json.loads(path.read_text()) for path in run.glob("wandb/offline-*/files/media/table/samples/*.json")]
    assert sorted(table["data"][0][2] for table in tables) == [f"user: What is 0 + {n}?" for n in (1, 2, 3)]
    assert tables[0]["columns"][2:] == ["prompt", "completion", "finish_reason", "verdict", "answer"]
    assert [row[5] for row in tables[0]["data"]] == ["wrong"] * 3  # rows 0, 2 and 4 of six; the odd ones are right

    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    captured = capfd.readouterr()
    assert CANARY not in captured.out + captured.err
    assert "W&B export" not in captured.err


KILLED_AFTER_POINT_150 = """
import os, signal, sys
from reasonrun.trackers import _wandb_export
from reasonrun.trackers._wandb_process import main

log = _wandb_export.Session.log
def log_and_die(session, step, *rest):
    log(session, step, *rest)
    if step == 150:
        os.kill(os.getpid(), signal.SIGKILL)

_wandb_export.Session.log = log_and_die
main(sys.argv[1:])
"""


@pytest.mark.parametrize("claimed", [0, 120, 390], ids=["mark lost its count", "mark behind", "mark ahead"])
def test_killed_exporter_catches_up_without_gap_or_repeat(tmp_path: Path, claimed: int) -> None:
    rows = [{"step": f"round-{n:03d}/sample", "verb": "sample", "num_rollouts": n} for n in range(1, 401)]
    write_metrics(tmp_path, rows)
    killed = run_python(["-c", KILLED_AFTER_POINT_150, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert mark(tmp_path)["num_points"] <= 151

    # W&B's file and the mark are written apart, so a kill leaves them at odds: the file decides.
    (tmp_path / "derived" / "wandb.json").write_text(json.dumps({**mark(tmp_path), "num_points": claimed}))
    assert catch_up(tmp_path).returncode == 0
    (found,) = read_offline(tmp_path).values()
    assert found.steps() == list(range(400))
    assert found.series("sample/num_rollouts") == list(range(1, 401))
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
