"""G2, G3, G8: kill -9, a full disk or a crash at any fault point, then the same command again."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_run import toy_run

from reasonrun.errors import EnvironmentProblem, ReasonrunError
from reasonrun.ledger.faults import FAULT_POINTS, Faults, InjectedFault
from reasonrun.ledger.files import Files

Tree = Callable[[Path], dict[str, bytes]]

NUM_UNITS = 6
NEEDS_AN_EARLIER_CRASH = {
    "wal.before_truncate": ("wal.mid_write", 3),
    "set_aside.before_rename": ("adopt.after_rename", 1),
    "set_aside.after_rename": ("adopt.after_rename", 1),
}
"""Points on the paths of recovery, and the fault that leads there."""


@pytest.mark.parametrize("nth", [1, 2])
def test_a_kill_at_every_fault_point_leaves_the_bytes_of_a_clean_run(
    nth: int, tmp_path: Path, toy_server: Any, tree: Tree
) -> None:
    assert toy_server.run(tmp_path / "clean", num_units=NUM_UNITS) == 0
    clean = tree(tmp_path / "clean")
    survived = []
    for point in FAULT_POINTS:
        path = tmp_path / point
        if point in NEEDS_AN_EARLIER_CRASH:
            first, first_nth = NEEDS_AN_EARLIER_CRASH[point]
            assert toy_server.run(path, num_units=NUM_UNITS, fault=f"{first}:kill:{first_nth}") == -signal.SIGKILL
        if toy_server.run(path, num_units=NUM_UNITS, fault=f"{point}:kill:{nth}") == 0:
            survived.append(point)
        assert toy_server.run(path, num_units=NUM_UNITS) == 0, f"not resumed after a kill at {point}"
        assert tree(path) == clean, f"other bytes after a kill at {point}"
    if nth == 1:
        assert survived == []  # so every registered point is passed
    else:
        assert len(survived) < len(FAULT_POINTS) / 2


def test_thirty_random_kills_leave_the_bytes_of_a_clean_run_and_repeat_no_logged_unit(
    tmp_path: Path, toy_server: Any, tree: Tree
) -> None:
    num_units = 200
    assert toy_server.run(tmp_path / "clean", num_units=num_units) == 0
    clean = tree(tmp_path / "clean")
    rng = random.Random(7)
    num_kills, num_runs = 0, 0
    while num_kills < 30:
        num_runs += 1
        path, log = tmp_path / f"run-{num_runs}", tmp_path / f"log-{num_runs}"
        order = {"num_units": num_units, "unit_seconds": 0.002, "log": str(log)}
        kills_here = 0
        while toy_server.run(path, kill_after=rng.uniform(0.005, 0.1) + 0.02 * (num_kills >= 30), **order) != 0:
            kills_here += 1
        num_kills += kills_here
        assert tree(path) == clean
        computed = Counter(log.read_text().split())
        # A kill costs at most the one unit that was at work.
        assert computed.total() - len(computed) <= kills_here
        assert set(map(str, range(num_units))) <= computed.keys()


@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "exception"])
def test_an_error_at_every_fault_point_is_survived(
    action: Any, tmp_path: Path, tree: Tree, no_fsync: None
) -> None:
    toy_run(tmp_path / "clean", num_units=NUM_UNITS, files=Files(Faults()))
    clean = tree(tmp_path / "clean")
    expected = InjectedFault if action == "exception" else ReasonrunError
    for point in FAULT_POINTS:
        path = tmp_path / point
        if point in NEEDS_AN_EARLIER_CRASH:
            first, nth = NEEDS_AN_EARLIER_CRASH[point]
            with pytest.raises(InjectedFault):
                toy_run(path, num_units=NUM_UNITS, files=Files(Faults(first, "exception", nth)))
        with pytest.raises(expected) as caught:
            toy_run(path, num_units=NUM_UNITS, files=Files(Faults(point, action)))
        if action == "ENOSPC":
            assert isinstance(caught.value, EnvironmentProblem)
            assert "No space left" in str(caught.value) and "same command" in caught.value.hint
        toy_run(path, num_units=NUM_UNITS, files=Files(Faults()))
        assert tree(path) == clean, f"other bytes after {action} at {point}"


def test_an_unknown_fault_is_refused_with_the_allowed_ones() -> None:
    assert Faults.from_environment({}) == Faults()
    assert Faults.from_environment({"REASONRUN_FAULT": "seal.mid_write:EIO:3"}) == Faults("seal.mid_write", "EIO", 3)
    for text in ("seal.mid_write", "seal.mid_write:explode", "nowhere:kill", "seal.mid_write:kill:0"):
        with pytest.raises(EnvironmentProblem, match="before_rename") as caught:
            Faults.from_environment({"REASONRUN_FAULT": text})
        assert text in str(caught.value)
