"""A policy-gradient step whose engine is a child process: the same run as with the engine inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from on_policy_jobs import experience, make_job, train

from reasonrun.engines.hf import HuggingFace
from reasonrun.workers.child_engine import ChildEngine, remove_weights


class Apart(HuggingFace):
    """The Hugging Face engine, as one that cannot share the trainer's process."""

    needs_own_process = True


def test_weights_reach_a_child_and_its_rollouts_are_those_of_the_engine_inside(
    tmp_path: Path, monkeypatch: Any
) -> None:
    folders: list[Path] = []
    update = ChildEngine.update

    def watched(self: ChildEngine, weights: Any) -> None:
        update(self, weights)
        folders.append(self._folder)
        assert (self._folder / "model.safetensors").is_file()

    monkeypatch.setattr(ChildEngine, "update", watched)
    inside = make_job(tmp_path, "inside", num_steps=2, lr=1e-3)
    apart = make_job(tmp_path, "apart", num_steps=2, lr=1e-3, engine=Apart)
    one, two = train(inside), train(apart)
    assert experience(inside, 2) == experience(apart, 2)
    assert one.metrics["loss"] == two.metrics["loss"]
    assert len(folders) == 2 and not folders[0].exists()
    assert (tmp_path / "apart/logs/engine-0.log").is_file()


def test_weights_of_a_trainer_that_was_ended_are_removed(tmp_path: Path) -> None:
    engine = ChildEngine("no.Engine", HuggingFace.Settings(), tmp_path / "run/attempts/1/train/x")
    engine._folder.mkdir()
    remove_weights(tmp_path / "other")
    assert engine._folder.exists()
    remove_weights(tmp_path / "run")
    assert not engine._folder.exists()
