"""No worker, and nothing that a worker started, outlives its supervisor by five seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import worker_stubs
from process_checks import group_runs, runs


class Scene:
    """A running supervisor with two busy workers, each with a child of its own."""

    def __init__(self, folder: Path, *, polls: bool, num_ranks: int = 0, **options: object) -> None:
        self._children_path, groups_path = folder / "children", folder / "groups"
        settings = worker_stubs.Stub.Settings(seconds=0.05, child_pid_path=str(self._children_path), **options)
        stub_path = Path(worker_stubs.__file__).parent / "supervisor_stub.py"
        command = [sys.executable, stub_path, "polls" if polls else "sleeps", groups_path, settings.model_dump_json()]
        command += [str(num_ranks)] if num_ranks else []
        source_dir = Path(sys.modules["reasonrun"].__file__ or "").parent.parent
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(source_dir)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "busy\n"
        self.groups = [int(line) for line in groups_path.read_text().split()]
        self.children = [int(line) for line in self._children_path.read_text().split()]
        assert len(self.children) == 2
        if num_ranks:
            self.children += [int(line) for line in (folder / "ranks").read_text().split()]
        assert len(self.groups) == 2 + bool(num_ranks)
        assert len(self.children) == 2 + num_ranks
        assert all(group_runs(pgid) for pgid in self.groups)
        assert all(runs(pid) for pid in self.children)

    def wait_until_gone(self) -> float:
        """Seconds until no worker and no child of one runs."""
        began = time.monotonic()
        while any(group_runs(pgid) for pgid in self.groups) or any(runs(pid) for pid in self.children):
            if time.monotonic() - began > 20:
                return float("inf")
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> None:
        for pgid in [self.process.pid, *self.groups]:
            if group_runs(pgid):
                os.killpg(pgid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def make_scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(**options: object) -> Scene:
        scenes.append(Scene(tmp_path, **options))  # type: ignore[arg-type]
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.end()


@pytest.mark.parametrize("trouble", ["hang", "hang with the lock"])
@pytest.mark.promise("G10", "deaths of a supervisor")
def test_killed_supervisor_takes_everything_along(make_scene: Callable[..., Scene], trouble: str) -> None:
    scene = make_scene(polls=True, trouble=trouble, trouble_keys=("request-2",))
    os.kill(scene.process.pid, signal.SIGKILL)
    assert scene.wait_until_gone() < 5


@pytest.mark.promise("G10", "deaths of a supervisor")
def test_killed_supervisor_takes_a_training_worker_with_its_ranks_along(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(polls=True, num_ranks=2)
    os.kill(scene.process.pid, signal.SIGKILL)
    assert scene.wait_until_gone() < 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.promise("G9", "signals to a group")
@pytest.mark.promise("G10", "signals to a group")
def test_signal_to_the_group_stops_without_orphans(
    make_scene: Callable[..., Scene], number: signal.Signals, code: int
) -> None:
    scene = make_scene(polls=True)
    os.killpg(scene.process.pid, number)
    _, errors = scene.process.communicate(timeout=10)
    assert scene.process.returncode == code
    assert scene.wait_until_gone() < 5
    assert errors.count("stopping at the next boundary; the same command continues") == 1
    assert "reasonrun train stub.yaml" in errors
    assert "Traceback" not in errors


@pytest.mark.promise("G9", "second Ctrl-C")
def test_second_interrupt_stops_a_supervisor_that_does_not_look(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene(polls=False)
    os.killpg(scene.process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert scene.process.poll() is None  # it sleeps for a minute, and the first one only sets the flag
    began = time.monotonic()
    os.killpg(scene.process.pid, signal.SIGINT)
    scene.process.communicate(timeout=10)
    assert scene.process.returncode == 130
    assert time.monotonic() - began < 3
    assert scene.wait_until_gone() < 5
