"""Borrowing: equal steps of another run become this run's own, or nothing does."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reasonrun.errors import EnvironmentProblem
from reasonrun.ledger.borrowing import Donors
from reasonrun.ledger.faults import Faults, InjectedFault
from reasonrun.ledger.files import Files
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.steps import OpenStep
from toy_run import shared_step, toy_dir, toy_donor, toy_run

Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture(autouse=True)
def _fast(no_fsync: None) -> None: ...


def inodes(run: Path) -> dict[str, int]:
    folder = run / "steps" / "shared"
    return {p.relative_to(folder).as_posix(): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


def lend(run: RunDir, donors: list[Path], name: str, fingerprint: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether the step was borrowed, and the reasons of refusals."""
    step, reasons = run.step(name, fingerprint), []
    assert isinstance(step, OpenStep)
    lender = Donors(run.path, donors, {"other": "toy"}, run.files)
    taken = lender.lend(step, fingerprint, take=lambda path: None, refuse=reasons.append)
    return taken is not None, reasons


def test_a_borrowed_step_shares_its_files_and_has_the_bytes_of_one_that_was_made(tmp_path: Path, tree: Tree) -> None:
    donor = toy_donor(tmp_path / "donor")
    toy_run(tmp_path / "alone", num_units=2)
    toy_run(tmp_path / "run", num_units=2, donors=[donor])
    assert tree(tmp_path / "run") == tree(tmp_path / "alone")
    own, theirs = inodes(tmp_path / "run"), inodes(donor)
    assert {name for name in own if own[name] == theirs[name]} == {
        "rows-00000.parquet",
        "model/state.txt",
        "model/shards/weights.bin",
    }


def test_links_and_their_folders_are_flushed_before_the_seal_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = toy_donor(tmp_path / "donor")
    folder = tmp_path / "run" / "steps" / "shared"
    calls: list[str] = []
    link, rename = os.link, os.rename

    def linked(source: Path, target: Path) -> None:
        link(source, target)
        calls.append(f"link {Path(target).relative_to(folder)}")

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(f"rename {target}")

    monkeypatch.setattr("os.link", linked)
    monkeypatch.setattr("os.rename", renamed)
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    toy_run(tmp_path / "run", num_units=2, donors=[donor])
    sealed = calls.index(f"rename {folder / '_OK.json'}")
    linked_names = [call.removeprefix("link ") for call in calls if call.startswith("link ")]
    assert len(linked_names) == 3
    for name in linked_names:
        after = calls[calls.index(f"link {name}") : sealed]
        assert str(folder / name) in after and str((folder / name).parent) in after


def test_where_the_disk_makes_no_links_the_files_are_copied(
    tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = toy_donor(tmp_path / "donor")
    toy_run(tmp_path / "alone", num_units=2)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr("os.link", refuse)
    toy_run(tmp_path / "run", num_units=2, donors=[donor])
    assert tree(tmp_path / "run") == tree(tmp_path / "alone")
    assert not set(inodes(tmp_path / "run").values()) & set(inodes(donor).values())


def test_a_link_that_fails_for_want_of_space_is_no_reason_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = toy_donor(tmp_path / "donor")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        toy_run(tmp_path / "run", num_units=2, donors=[donor])


@pytest.mark.parametrize("name", ["rows-00000.parquet", "model/shards/weights.bin", "_OK.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_step_is_not_borrowed_and_another_donor_is_asked(
    name: str, damage: str, tmp_path: Path, tree: Tree
) -> None:
    damaged, sound = toy_donor(tmp_path / "damaged"), toy_donor(tmp_path / "sound")
    toy_run(tmp_path / "alone", num_units=2)
    path = damaged / "steps" / "shared" / name
    data = path.read_bytes()
    spoilt = {"flip": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-2]}
    path.unlink() if damage == "missing" else path.write_bytes(spoilt[damage])
    fingerprint = {"verb": "train", "shared": True}
    with toy_dir(tmp_path / "run", Files(), {}) as run:
        taken, reasons = lend(run, [damaged], "shared", fingerprint)
        assert not taken
        if (name, damage) != ("_OK.json", "missing"):  # without a seal there is no step
            assert len(reasons) == 1 and "damaged" in reasons[0] and str(damaged) in reasons[0]
    with toy_dir(tmp_path / "run", Files(), {}) as run:
        assert lend(run, [damaged, sound], "shared", fingerprint)[0]
    made = {k: v for k, v in tree(tmp_path / "alone").items() if k.startswith("steps/shared/")}
    assert {k: v for k, v in tree(tmp_path / "run").items() if k.startswith("steps/")} == made


def test_what_a_broken_loan_left_behind_is_made_over(tmp_path: Path, tree: Tree) -> None:
    """The first file is linked before the second turns out to be damaged."""
    donor = toy_donor(tmp_path / "donor")
    toy_run(tmp_path / "alone", num_units=2)
    path = donor / "steps" / "shared" / "rows-00000.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    before = tree(donor)
    toy_run(tmp_path / "run", num_units=2, donors=[donor])
    assert tree(tmp_path / "run") == tree(tmp_path / "alone")
    assert tree(donor) == before


@pytest.mark.parametrize(
    "point", ["borrow.before_link", "borrow.after_link", "borrow.before_commit", "ok.before_rename"]
)
@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("asks_again", [True, False])
def test_a_crash_while_borrowing_ends_with_the_same_bytes_and_leaves_the_donor_alone(
    point: str, nth: int, asks_again: bool, tmp_path: Path, tree: Tree
) -> None:
    donor = toy_donor(tmp_path / "donor")
    toy_run(tmp_path / "alone", num_units=2)
    before = tree(donor)
    faults = Faults(point, "exception", nth if point.endswith("link") else 1)
    with pytest.raises(InjectedFault):
        toy_run(tmp_path / "run", num_units=2, donors=[donor], files=Files(faults))
    assert not (tmp_path / "run" / "steps" / "shared" / "_OK.json").exists()
    toy_run(tmp_path / "run", num_units=2, donors=[donor] if asks_again else [])
    assert tree(tmp_path / "run") == tree(tmp_path / "alone")
    assert tree(donor) == before


@pytest.mark.parametrize("conditions", ["others", None])
def test_a_run_under_other_or_unknown_conditions_lends_nothing(conditions: str | None, tmp_path: Path) -> None:
    donor = toy_donor(tmp_path / "donor")
    with toy_dir(donor, Files(), {}, conditions="others"):
        pass  # an attempt that made nothing counts: who knows what it would have kept
    if conditions is None:
        for path in donor.glob("attempts/*/attempt.json"):
            record = json.loads(path.read_text())
            del record["conditions"]
            path.write_text(json.dumps(record))
    with toy_dir(tmp_path / "run", Files(), {}) as run:
        assert lend(run, [donor], "shared", {"verb": "train", "shared": True}) == (False, [])


def test_another_fingerprint_another_name_and_the_run_itself_lend_nothing(tmp_path: Path) -> None:
    donor = toy_donor(tmp_path / "donor")
    with toy_dir(tmp_path / "run", Files(), {}) as run:
        assert lend(run, [donor], "shared", {"verb": "train", "shared": False}) == (False, [])
        assert lend(run, [donor], "other", {"verb": "train", "shared": True}) == (False, [])
        assert lend(run, [run.path, tmp_path / "nowhere"], "third", {"verb": "x"}) == (False, [])


@pytest.mark.parametrize("distance", [1, 2])
def test_a_step_that_reads_other_bytes_is_not_borrowed(distance: int, tmp_path: Path) -> None:
    """The inputs' fingerprints are equal, as those of rows are that a device computed twice."""

    def steps(run: RunDir, text: str, upto: int) -> None:
        for number in range(upto):
            step = run.step(f"s{number}", {"verb": "sample", "inputs": [f"s{number - 1}"] if number else []})
            assert isinstance(step, OpenStep)
            step.put_json("rows", text if number == 0 else "same")
            step.commit({})

    with toy_dir(tmp_path / "donor", Files(), {}) as run:
        steps(run, "theirs", upto=distance + 1)
    last = {"verb": "sample", "inputs": [f"s{distance - 1}"]}
    for text, is_borrowed in (("mine", False), ("theirs", True)):
        with toy_dir(tmp_path / text, Files(), {}) as run:
            steps(run, text, upto=distance)
            assert lend(run, [tmp_path / "donor"], f"s{distance}", last) == (is_borrowed, [])


def test_setting_a_borrowed_step_aside_leaves_the_donor_alone(tmp_path: Path, tree: Tree) -> None:
    donor = toy_donor(tmp_path / "donor")
    before = tree(donor)
    with toy_dir(tmp_path / "run", Files(), {}) as run:
        shared_step(run, [donor])
        run.redo("shared")
        shared_step(run, [])
        run.reached.clear()
        run.prune(["shared"])
    assert tree(donor) == before
