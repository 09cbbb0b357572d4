"""Workers in another interpreter: the wrong one is refused with the way out."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from worker_stubs import expected_completions, make_checkpoint, make_request

import reasonrun
from reasonrun.errors import EnvironmentProblem
from reasonrun.workers.pool import GenerationPool

MakePool = Callable[..., GenerationPool]


def write_interpreter(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_other_version_of_reasonrun_is_refused(make_pool: MakePool, tmp_path: Path) -> None:
    package_dir = Path(reasonrun.__file__).parent
    other_dir = tmp_path / "other"
    shutil.copytree(package_dir, other_dir / "reasonrun", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    init_path = other_dir / "reasonrun" / "__init__.py"
    init_path.write_text(re.sub(r"__version__ = .*", '__version__ = "0.0.7"', init_path.read_text()))
    python = write_interpreter(
        tmp_path / "python", f'PYTHONPATH="{other_dir}:$PYTHONPATH" exec "{sys.executable}" "$@"'
    )
    with pytest.raises(EnvironmentProblem) as caught:
        make_pool(python=python).load(make_checkpoint())
    assert f"has reasonrun 0.0.7, this one has {reasonrun.__version__}" in caught.value.message
    assert f"pip install --no-deps reasonrun=={reasonrun.__version__}" in caught.value.hint


def test_interpreter_that_prints_at_start_works(make_pool: MakePool, tmp_path: Path) -> None:
    python = write_interpreter(tmp_path / "python", f'echo "module cuda loaded"; exec "{sys.executable}" "$@"')
    pool = make_pool(python=python)
    pool.load(make_checkpoint())
    request = make_request(3)
    assert list(pool.generate([(0, [request])])) == [(0, expected_completions([request]))]


def test_interpreter_without_reasonrun_is_an_environment_problem(make_pool: MakePool, tmp_path: Path) -> None:
    python = write_interpreter(tmp_path / "bare-python", f'exec "{sys.executable}" -I -S "$@"')
    with pytest.raises(EnvironmentProblem) as caught:
        make_pool(python=python).load(make_checkpoint())
    assert "bare-python cannot run a worker" in caught.value.message
    assert "No module named" in caught.value.message
    assert "launcher.python" in caught.value.hint


def test_missing_interpreter_is_an_environment_problem(make_pool: MakePool, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="nowhere/python cannot be started: No such file"):
        make_pool(python=str(tmp_path / "nowhere/python")).load(make_checkpoint())
