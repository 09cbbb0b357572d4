"""Whatever becomes of the exporter, the run does not notice: no exception, no wait beyond the bound, one line."""

from __future__ import annotations

import importlib.machinery
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from wandb_runs import catch_up, write_metrics

from reasonrun.errors import EnvironmentProblem
from reasonrun.trackers import wandb as tracker_module
from reasonrun.trackers.wandb import Wandb, resolve_mode

ROW = {"step": "measure", "verb": "sample", "num_rollouts": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_metrics(folder, [ROW])
    return folder


def fake_wandb(folder: Path, body: str) -> None:
    (folder / "wandb.py").write_text(
        f"import os, subprocess, time\nclass Settings:\n    def __init__(self, **_): pass\n{body}"
    )


def started(run: Path, finish_seconds: float) -> tuple[Wandb, subprocess.Popen[bytes]]:
    tracker = Wandb(Wandb.Settings(mode="online", finish_seconds=finish_seconds))
    tracker.start(run, {})
    assert tracker._process is not None
    return tracker, tracker._process


def test_broken_wandb(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "canary-0123456789")
    fake_wandb(tmp_path, "def init(**_): raise RuntimeError('refused ' + os.environ['SOME_TOKEN'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    tracker, process = started(run, 20)
    tracker.log(ROW)
    tracker.finish()
    assert process.returncode == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"W&B export failed (see {run}/wandb/exporter.log); the run is not affected")
    assert line.endswith(f"-m reasonrun.trackers.wandb {run}")
    log = (run / "wandb" / "exporter.log").read_text()
    assert "RuntimeError: refused ***" in log
    tracker.finish()  # again: nothing to do
    assert capfd.readouterr().err == ""


@pytest.mark.promise("G10", "hanging trackers")
def test_hanging_wandb_is_ended_in_time_with_what_it_started(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = (
        "def init(**_):\n"
        "    p = subprocess.Popen(['sleep', '300'])\n"
        "    open('pid', 'w').write(str(p.pid))\n"
        "    time.sleep(300)\n"
    )
    fake_wandb(tmp_path, body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    tracker, process = started(run, 4)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    begin = time.monotonic()
    tracker.finish()
    assert 1.5 < time.monotonic() - begin < 5
    # Without an init process that reaps, a killed orphan stays behind as a zombie: it is as dead.
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert process.wait(5) == -signal.SIGKILL
    assert "W&B export was not finished in time" in capfd.readouterr().err


@pytest.mark.promise("G10", "deaths of a supervisor")
def test_exporter_ends_when_the_run_is_killed(run: Path, tmp_path: Path) -> None:
    fake_wandb(tmp_path, "def init(**_): time.sleep(300)\n")
    script = (
        "import sys, time; from pathlib import Path; from reasonrun.trackers.wandb import Wandb;"
        "w = Wandb(Wandb.Settings(mode='online', finish_seconds=1)); w.start(Path(sys.argv[1]), {});"
        "print(w._process.pid, flush=True); time.sleep(300)"
    )
    path = os.pathsep.join([str(tmp_path), *(str(Path(entry or ".").resolve()) for entry in sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert parent.stdout is not None
    exporter = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1)
    assert exporter.is_running() and exporter.status() != psutil.STATUS_ZOMBIE
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while exporter.is_running() and exporter.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the exporter outlived its run"
        time.sleep(0.05)


def test_missing_package_is_said_before_anything_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = importlib.machinery.ModuleSpec("wandb", None, is_package=True)  # a folder of W&B's files
    for spec in (None, namespace):
        monkeypatch.setattr(tracker_module.importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(EnvironmentProblem, match=r"pip install 'reasonrun\[wandb\]'"):
            Wandb(Wandb.Settings()).start(run, {})
    Wandb(Wandb.Settings(mode="disabled")).start(run, {})  # asks for nothing


def test_folder_that_cannot_be_written(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "wandb").write_text("a file where the folder should be")
    tracker = Wandb(Wandb.Settings(mode="offline"))
    tracker.start(run, {})
    tracker.log(ROW)
    tracker.finish()
    assert capfd.readouterr().err.startswith("W&B export did not start (")


def test_which_mode_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Wandb.Settings()
    assert resolve_mode(settings) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert resolve_mode(settings) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode(settings) == "disabled"
    assert resolve_mode(Wandb.Settings(mode="offline")) == "offline"


def test_catching_up_on_what_is_no_run(tmp_path: Path) -> None:
    ended = catch_up(tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == f"{tmp_path} holds no metrics.jsonl\n  name a run directory, such as runs/star_arith\n"
