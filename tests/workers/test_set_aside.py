"""A run in which one request ends its worker every time: all others are kept, and only that one is asked again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import RunFailed
from reasonrun.recipe import load
from reasonrun.running import Outcome, RunOptions, run
from reasonrun.tasks.arith import Arith

RECIPE = """
defaults: [{{model: tiny}}, {{launcher: local}}, _self_]
task: {{name: arith, num_test: 24, num_dev: 2, num_train: 2}}
method: {{name: measure}}
engine: {{name: worker_stubs.Answers42, log_path: "{folder}/calls", poison_path: "{folder}/poison"}}
launcher: {{num_workers: 2, devices: cpu}}
evaluate: {{num_samples: 0}}
"""


def execute(folder: Path) -> Outcome:
    path = folder / "measure.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return run(load(str(path), []), RunOptions(directory=folder / "run"), SilentProgress())


def calls(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def test_same_command_asks_only_for_what_was_set_aside(tmp_path: Path) -> None:
    problem = Arith(Arith.Settings(num_test=24, num_dev=2, num_train=2)).problems("test")[7]
    question = problem.messages[-1].content
    (tmp_path / "poison").write_text(question)
    with pytest.raises(RunFailed, match=f"problem {problem.id} .of unit .*; ended 4 workers") as caught:
        execute(tmp_path)
    assert caught.value.exit_code == 1
    keys = Counter(key for call in calls(tmp_path) for key in call)
    assert len(keys) == 24
    (bad,) = (key for key in keys if f"request {key} of problem" in caught.value.message)
    (tmp_path / "calls").unlink()

    with pytest.raises(RunFailed, match=bad):
        execute(tmp_path)
    assert calls(tmp_path) == [[bad]] * 4
    (tmp_path / "calls").unlink()

    (tmp_path / "poison").unlink()
    outcome = execute(tmp_path)
    assert calls(tmp_path) == [[bad]]
    (tmp_path / "calls").unlink()

    clean = tmp_path / "clean"
    clean.mkdir()
    assert execute(clean).result == outcome.result
    tables = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run" / "steps").rglob("*.parquet")]
    assert tables
    for path in tables:
        assert (clean / "run" / path).read_bytes() == (tmp_path / "run" / path).read_bytes()
