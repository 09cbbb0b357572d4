"""What of the vLLM engine can be known without vLLM; tests/heavy/test_vllm.py has the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from reasonrun.engines.vllm import VLLM
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from reasonrun.models import resolve
from reasonrun.recipe import load
from reasonrun.recipe_fields import ModelSettings


def test_the_environment_that_make_vllm_builds_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert VLLM.Settings().interpreter is None  # the launcher's
    python = tmp_path / "vllm/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert VLLM.Settings().interpreter == str(python)
    assert VLLM.Settings(python="/opt/python").interpreter == "/opt/python"


def test_an_interpreter_without_vllm_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EnvironmentProblem, match=r"(?s)cannot be imported by .*make vllm.*engine=hf"):
        VLLM(VLLM.Settings()).load(resolve(ModelSettings(name="tiny")))


def test_arguments_that_are_the_engines_own_are_refused() -> None:
    with pytest.raises(RecipeError, match="model, seed cannot be set here: the engine does"):
        load("star_arith", ["engine=vllm", "engine.arguments={seed: 1, model: x, swap_space: 1}"])


def test_nothing_is_answered_before_a_model_is_there() -> None:
    with pytest.raises(RunFailed, match=r"before load\(\)"):
        list(VLLM(VLLM.Settings()).generate([]))
    VLLM(VLLM.Settings()).sleep()


def test_a_recipe_takes_the_engine_with_its_fields() -> None:
    recipe = load("star_arith", ["engine=vllm", "engine.dtype=bfloat16", "engine.arguments={quantization: fp8}"])
    assert recipe.engine.dtype == "bfloat16" and recipe.engine.arguments == {"quantization": "fp8"}
    with pytest.raises(RecipeError, match="gpu_memory_utilization"):
        load("star_arith", ["engine=vllm", "engine.gpu_memory_utilization=1.5"])
