"""Which step is at fault when two that are intact do not belong together: repair takes no innocent one away."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_runs import MakeRun

from reasonrun.ledger.damage import Damage
from reasonrun.ledger.repairing import plan_repair
from reasonrun.report.joins import METRICS, Join, settled
from reasonrun.report.verification import find

ROUNDS = "method.rounds=2"


def with_foreign(make_run: MakeRun, path: Path, step: str, *, is_finished: bool) -> Path:
    """A run in which one step was replaced by that of another run: its own seal is intact."""
    shutil.copytree(make_run(ROUNDS), path)
    shutil.rmtree(path / "steps" / step)
    shutil.copytree(make_run(ROUNDS, "seed=1") / "steps" / step, path / "steps" / step)
    if not is_finished:
        (path / "_OK.json").unlink()
    return path


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    "step", ["round-002/evaluate/greedy", "round-002/evaluate/grade-greedy", "final-trainings=2/test-last/sampled"]
)
def test_a_foreign_leaf_moves_no_training(make_run: MakeRun, tmp_path: Path, step: str, is_finished: bool) -> None:
    path = with_foreign(make_run, tmp_path / "run", step, is_finished=is_finished)
    for deep in (False, True):
        findings = find(path, deep=deep)
        assert {finding.step for finding in findings if isinstance(finding, Damage)} <= {step, ""}
        moved = plan_repair(path, findings).steps
        assert len(moved) <= 3 and not any(name.endswith("train") for name in moved)
    assert step in moved


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("step", ["round-001/train", "round-002/sample", "round-001/grade"])
def test_a_foreign_step_is_named_and_not_what_was_made_from_it(
    make_run: MakeRun, tmp_path: Path, step: str, is_finished: bool
) -> None:
    path = with_foreign(make_run, tmp_path / "run", step, is_finished=is_finished)
    (damage,) = find(path, deep=True)
    assert isinstance(damage, Damage) and damage.step == step and damage.remedy == "redo"


def join(source: str, reader: str, *, agrees: bool = False) -> Join:
    return Join(source=source, reader=reader, things="rows", agrees=agrees)


def blamed(*found: Join | Damage) -> list[tuple[str, str]]:
    return [(finding.path, finding.step) for finding in settled(found) if isinstance(finding, Damage)]


def test_who_is_at_fault() -> None:
    assert blamed(join("a", "b", agrees=True)) == []
    assert blamed(join("a", "b")) == [("steps/b", "b")]  # nothing tells: the reader takes less with it
    assert blamed(join("a", "b"), join("a", "c"), join("z", "a", agrees=True)) == [("steps/a", "a")]
    assert blamed(join("a", "b"), join("a", "c", agrees=True), join("b", "d")) == [("steps/b", "b")]
    assert blamed(join("a", METRICS)) == [(METRICS, "a")]
    assert blamed(join("a", METRICS), join("b", METRICS)) == [(METRICS, "a"), (METRICS, "b")]
    assert blamed(join("a", METRICS), join("a", "b"), join("b", METRICS, agrees=True)) == [("steps/a", "a")]
    flipped = Damage(path="steps/b/rows", what="does not match", promise="G5", remedy="redo", step="b")
    assert blamed(join("a", "b"), flipped) == [("steps/b/rows", "b")]  # says nothing about the other


def test_one_pair_that_differs_in_two_ways_counts_once() -> None:
    assert blamed(join("a", "b", agrees=True), join("a", "b"), join("a", "b")) == [("steps/b", "b")]
