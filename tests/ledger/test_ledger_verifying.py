"""Verifying the ledger's files: nothing is found in a run that was killed anywhere, and damage of checkpoints is."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from test_ledger_kills import NEEDS_AN_EARLIER_CRASH, NUM_UNITS

from reasonrun.ledger.damage import Damage, Note
from reasonrun.ledger.faults import FAULT_POINTS, Faults
from reasonrun.ledger.files import Files
from reasonrun.ledger.repairing import apply_repair, plan_repair
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.verifying import verify_ledger
from toy_run import toy_donor, toy_run

pytestmark = pytest.mark.usefixtures("no_fsync")

FILES = Files(Faults())


def damages(path: Path, *, deep: bool = True) -> list[Damage]:
    return [finding for finding in verify_ledger(path, FILES, deep=deep) if isinstance(finding, Damage)]


def test_a_kill_at_any_fault_point_leaves_nothing_that_looks_damaged(tmp_path: Path, toy_server: Any) -> None:
    donor = toy_donor(tmp_path / "donor")
    assert not damages(donor)
    for point in FAULT_POINTS:
        path, order = tmp_path / point, {"num_units": NUM_UNITS, "donors": [str(donor)]}
        if point in NEEDS_AN_EARLIER_CRASH:
            first, nth = NEEDS_AN_EARLIER_CRASH[point]
            assert toy_server.run(path, fault=f"{first}:kill:{nth}", **order) == -signal.SIGKILL
        assert toy_server.run(path, fault=f"{point}:kill", **order) == -signal.SIGKILL, point
        if (path / "run.json").exists():
            assert damages(path) == [], f"after a kill at {point}"


def killed_in_training(toy_server: Any, path: Path) -> Path:
    """A run with two checkpoints behind it is killed while it writes the third."""
    assert toy_server.run(path, fault="ckpt.before_adopt:kill:3", num_units=2) == -signal.SIGKILL
    return path / "steps/round-001/train/checkpoints/2"


def test_a_damaged_checkpoint_is_named_and_training_begins_again(tmp_path: Path, toy_server: Any, tree: Any) -> None:
    toy_run(tmp_path / "clean", num_units=2)
    for number, harm in enumerate(("missing", "flipped", "seal")):
        path = tmp_path / str(number)
        checkpoint = killed_in_training(toy_server, path)
        if harm == "missing":
            (checkpoint / "state.txt").unlink()
        elif harm == "flipped":
            (checkpoint / "state.txt").write_bytes(bytes(byte ^ 1 for byte in (checkpoint / "state.txt").read_bytes()))
        else:
            (checkpoint / "_OK.json").write_text("{}")
        assert bool(damages(path, deep=False)) == (harm != "flipped")
        (damage,) = damages(path)
        assert damage.path == "steps/round-001/train/checkpoints/2" and "is a checkpoint of which" in damage.what
        findings = list(verify_ledger(path, FILES, deep=True))
        with RunDir.open(path, identity={}, command="repair", files=FILES, reopen=True) as run:
            apply_repair(run, plan_repair(path, findings))
        assert not damages(path) and next(path.glob("quarantine/*/steps/round-001/train/checkpoints/2"))
        toy_run(path, num_units=2)
        assert tree(path) == tree(tmp_path / "clean")


def test_a_checkpoint_that_lost_its_seal_is_no_damage(tmp_path: Path, toy_server: Any) -> None:
    checkpoint = killed_in_training(toy_server, tmp_path / "run")
    (checkpoint / "_OK.json").unlink()  # how the removal of an older one begins
    findings = list(verify_ledger(tmp_path / "run", FILES, deep=True))
    assert [type(finding) for finding in findings] == [Note]


@pytest.mark.parametrize("deep", [False, True])
def test_a_trainers_damaged_log_takes_the_step_with_it(tmp_path: Path, deep: bool) -> None:
    path = tmp_path / "run"
    with RunDir.open(path, identity={}, command="c", files=FILES) as run:
        step: Any = run.step("train", {"verb": "train"})
        step.wal("curve").append([(number, {"step": number, "loss": 1.0}) for number in range(4)])
    log = path / "steps/train/wal-curve.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step":2', b'"step":9'))
    (damage,) = damages(path, deep=deep)
    assert damage.remedy == "redo" and damage.step == "train" and "1 line (at byte " in damage.what
    assert plan_repair(path, [damage]).steps == ("train",)


def test_a_step_that_was_only_begun_does_not_miss_what_it_would_have_read(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir.open(path, identity={}, command="c", files=FILES) as run:
        step: Any = run.step("a/b", {"verb": "x", "inputs": []})
        step.commit({})
        run.step("a", {"verb": "x", "inputs": ["gone"]})
    findings = list(verify_ledger(path, FILES, deep=True))
    assert [(type(finding), finding.path) for finding in findings] == [(Note, "steps/a")]
    with RunDir.open(path, identity={}, command="repair", files=FILES) as run:
        apply_repair(run, plan_repair(path, findings))
        assert run.steps() == {"a/b": "committed"} and list(verify_ledger(path, FILES, deep=True)) == []
