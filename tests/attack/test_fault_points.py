"""G2, G3, G6, G8: every named fault point, reached by the reference run, with every way to fail there."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from recovery import NUM_UNITS

from promises import Counted
from reasonrun.ledger.faults import FAULT_POINTS, Action
from toy_run import toy_donor
from toy_server import ToyServer, final_bytes

pytestmark = pytest.mark.attack

LEADS_THERE = {
    "wal.before_truncate": "wal.mid_write:kill:3",
    "set_aside.before_rename": "adopt.after_rename:kill",
    "set_aside.after_rename": "adopt.after_rename:kill",
}
"""Points on the paths of recovery, and the fault that leads there."""
READ_FROM_A_DONOR = {"borrow.before_link", "borrow.after_link"}
"""Points where a disk that cannot read costs nothing: the step is made here instead of taken over."""
HANG_SECONDS = 0.4
"""Deadline of a run that hangs; from outside it is ended with SIGKILL."""


@pytest.mark.parametrize("action", get_args(Action))
def test_every_fault_point_is_reached_and_recovered_from(
    action: str, toy_server: ToyServer, scratch: Path, counted: Counted, tmp_path: Path
) -> None:
    assert toy_server.run(tmp_path / "clean", num_units=NUM_UNITS) == 0
    clean = final_bytes(tmp_path / "clean")
    donor = toy_donor(tmp_path / "donor")
    for point in FAULT_POINTS:
        run, log = tmp_path / point, tmp_path / f"{point}.log"
        order = {"num_units": NUM_UNITS, "log": str(log), "donors": [str(donor)]}
        if point in LEADS_THERE:
            assert toy_server.run(run, fault=LEADS_THERE[point], **order) == -signal.SIGKILL
        ended = toy_server.run(run, fault=f"{point}:{action}", deadline_seconds=HANG_SECONDS, hushed=True, **order)
        expected = -signal.SIGKILL if action in ("kill", "hang") else 1
        if action == "EIO" and point in READ_FROM_A_DONOR:
            expected = 0
        assert ended == expected, f"{point}:{action} is not reached, or does not do what it says"
        assert (run / "_OK.json").exists() <= (expected == 0 or point == "finish.after_rename")
        order.pop("donors")  # what was half borrowed is made over
        assert toy_server.run(run, **order) == 0, f"not resumed after {action} at {point}"
        assert final_bytes(run) == clean, f"other bytes after {action} at {point}"
        computed = Counter(log.read_text().split())
        assert computed.total() - len(computed) <= 1 + (point in LEADS_THERE), f"repeated after {action} at {point}"
    for promise in ("G2", "G3", "G6", *(["G8"] if action in ("ENOSPC", "EIO") else [])):
        counted(promise, f"fault points x {action}", len(FAULT_POINTS))
