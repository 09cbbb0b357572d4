"""G2, G3, G8: kill -9, a full disk or a crash at any fault point, then the same command again."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonrun.errors import EnvironmentProblem, ReasonrunError
from reasonrun.ledger.faults import FAULT_POINTS, Faults, InjectedFault
from reasonrun.ledger.files import Files
from toy_run import toy_donor, toy_run

Tree = Callable[[Path], dict[str, bytes]]

NUM_UNITS = 6
NEEDS_AN_EARLIER_CRASH = {
    "wal.before_truncate": ("wal.mid_write", 3),
    "set_aside.before_rename": ("adopt.after_rename", 1),
    "set_aside.after_rename": ("adopt.after_rename", 1),
}
"""Points on the paths of recovery, and the fault that leads there."""
READ_FROM_A_DONOR = {"borrow.before_link", "borrow.after_link"}
"""Points where a disk that cannot read costs nothing: the step is made here instead."""


def test_a_kill_at_every_fault_point_leaves_the_bytes_of_a_clean_run(
    tmp_path: Path, toy_server: Any, tree: Tree
) -> None:
    assert toy_server.run(tmp_path / "clean", num_units=NUM_UNITS) == 0
    clean = tree(tmp_path / "clean")
    donor = toy_donor(tmp_path / "donor")
    lent = tree(donor)
    for point in FAULT_POINTS:
        path, log, num_kills = tmp_path / point, tmp_path / f"{point}.log", 1
        order = {"num_units": NUM_UNITS, "log": str(log)}
        borrowing = {**order, "donors": [str(donor)]}
        if point in NEEDS_AN_EARLIER_CRASH:
            first, nth = NEEDS_AN_EARLIER_CRASH[point]
            assert toy_server.run(path, fault=f"{first}:kill:{nth}", **borrowing) == -signal.SIGKILL
            num_kills = 2
        # Every registered point is passed, or the toy would have survived.
        assert toy_server.run(path, fault=f"{point}:kill", **borrowing) == -signal.SIGKILL, point
        # Without the donor, so that what was half borrowed is made over.
        assert toy_server.run(path, **order) == 0, f"not resumed after a kill at {point}"
        assert tree(path) == clean, f"other bytes after a kill at {point}"
        computed = Counter(log.read_text().split())
        assert computed.total() - len(computed) <= num_kills, f"units done twice after a kill at {point}"
        assert tree(donor) == lent, f"the donor changed after a kill at {point}"


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
        kills_here = 0
        while num_kills + kills_here < 30:
            when = {"kill_after_units": rng.randint(1, 12), "kill_seconds": rng.uniform(0, 0.02)}
            if toy_server.run(path, num_units=num_units, log=str(log), **when) == 0:
                break
            kills_here += 1
        assert toy_server.run(path, num_units=num_units, log=str(log)) == 0
        num_kills += kills_here
        assert tree(path) == clean
        computed = Counter(log.read_text().split())
        assert {str(unit) for unit in range(num_units)} <= computed.keys()
        assert computed.total() - len(computed) <= kills_here  # a kill costs at most the unit that was at work


@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "exception"])
def test_an_error_at_every_fault_point_is_survived(action: Any, tmp_path: Path, tree: Tree, no_fsync: None) -> None:
    toy_run(tmp_path / "clean", num_units=NUM_UNITS, files=Files(Faults()))
    clean = tree(tmp_path / "clean")
    expected = InjectedFault if action == "exception" else ReasonrunError
    donors = [toy_donor(tmp_path / "donor")]
    for point in FAULT_POINTS:
        path = tmp_path / point
        if action == "EIO" and point in READ_FROM_A_DONOR:
            toy_run(path, num_units=NUM_UNITS, files=Files(Faults(point, action)), donors=donors)
            assert tree(path) == clean, f"a step that a broken disk cannot lend is not made at {point}"
            continue
        if point in NEEDS_AN_EARLIER_CRASH:
            first, nth = NEEDS_AN_EARLIER_CRASH[point]
            with pytest.raises(InjectedFault):
                toy_run(path, num_units=NUM_UNITS, files=Files(Faults(first, "exception", nth)), donors=donors)
        with pytest.raises(expected) as caught:
            toy_run(path, num_units=NUM_UNITS, files=Files(Faults(point, action)), donors=donors)
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
