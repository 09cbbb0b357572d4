"""Plug-ins are found by module name and by dotted path; what is wrong with one is said without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from reasonrun import plugins
from reasonrun.contracts import Method, Task
from reasonrun.errors import RecipeError
from reasonrun.recipe import load
from reasonrun.settings import Settings

TOY_METHOD = """\
from reasonrun.contracts import Method
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase


class Toy(Method):
    class Settings(SettingsBase):
        strength: int = setting(1, Effect.SEMANTIC, "How much.", ge=1)

    def run(self, lab):
        return lab.base
"""
TOY_TASK = """\
from reasonrun.tasks.arith import Arith


class Sums(Arith):
    class Settings(Arith.Settings):
        multiplications: int = 0
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # find() adds the current folder


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_listed_builtin_is_a_plugin_with_its_name(kind: plugins.Kind) -> None:
    for name in plugins.names(kind):
        cls = plugins.find(kind, name)
        assert cls.__module__ == f"reasonrun.{kind}.{name}"
        assert issubclass(cls.Settings, Settings)
        if kind != "trainers":  # chosen by the verb's kind, never named in a recipe
            assert plugins.settings_class(kind, name, cls)().model_dump()["name"] == name


def test_builtins_are_listed() -> None:
    assert {"star", "measure"} <= set(plugins.names("methods"))
    assert {"arith"} <= set(plugins.names("tasks"))
    assert {"hf", "scripted"} <= set(plugins.names("engines"))
    assert issubclass(plugins.find("methods", "star"), Method)
    assert issubclass(plugins.find("tasks", "arith"), Task)


def test_listing_imports_no_plugin() -> None:
    code = (
        "import sys\nfrom reasonrun import plugins\n"
        "found = [name for kind in plugins.KINDS for name in plugins.names(kind)]\n"
        "loaded = [f'reasonrun.{kind}.{name}' for kind in plugins.KINDS for name in plugins.names(kind)]\n"
        "print(len(found) > 5, [name for name in loaded if name in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(plugins.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "True []\n"


def test_a_toy_method_and_task_of_a_folder_make_a_recipe() -> None:
    write("toy_folder/__init__.py", "")
    write("toy_folder/toy.py", TOY_METHOD)
    write("toy_task.py", TOY_TASK)
    write("mine.yaml", "method: {name: toy_folder.toy.Toy, strength: 3}\ntask: toy_task.Sums\nengine: scripted\n")
    recipe = load("mine.yaml")
    assert recipe.classes["method"].__name__ == "Toy"
    assert (recipe.method.strength, recipe.resolved["method"]["name"]) == (3, "toy_folder.toy.Toy")
    assert (recipe.resolved["task"]["name"], recipe.task.multiplications) == ("toy_task.Sums", 0)
    assert isinstance(recipe.method, recipe.classes["method"].Settings)


def test_a_file_of_the_user_never_hides_an_installed_package() -> None:
    write("json.py", "raise RuntimeError('hidden')\n")
    write("toy_json.py", "import json\n" + TOY_METHOD)
    before = sys.modules.pop("json")
    try:
        assert plugins.find("methods", "toy_json.Toy").__name__ == "Toy"
    finally:
        sys.modules["json"] = before


def test_unknown_name_gives_the_nearest_and_all_builtins() -> None:
    with pytest.raises(plugins.UnknownPlugin) as caught:
        plugins.find("methods", "sta")
    assert caught.value.nearest == "star"
    assert caught.value.allowed == plugins.names("methods")
    assert "unknown method 'sta'; nearest is star; built in: " in str(caught.value)


def test_unknown_kind() -> None:
    with pytest.raises(RecipeError, match="no kind of plug-in 'method'; the kinds are methods, tasks"):
        plugins.names("method")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("toy_import.Toy", "import surely_not_installed\n" + TOY_METHOD, "No module named 'surely_not_installed'"),
        ("toy_syntax.Toy", "x = (\n", r"toy_syntax\.py:1: .*was never closed"),
        ("toy_raises.Toy", "x = {}\ny = x['a']\n" + TOY_METHOD, r"toy_raises\.py:2: KeyError: 'a'"),
        ("toy_class.Tey", TOY_METHOD, r"has no class 'Tey'; nearest is Toy"),
        ("toy_contract.Toy", "class Toy:\n    pass\n", "no plug-in of kind methods"),
        ("toy_settings.Toy", TOY_METHOD.replace("Settings(SettingsBase)", "Settings"), "no plug-in of kind methods"),
        ("toy_abstract.Toy", TOY_METHOD.replace("def run", "def walk"), "no plug-in of kind methods: it lacks run"),
        ("toy_wrong.Sums", TOY_TASK, "no plug-in of kind methods"),
        ("not_there_at_all.Toy", "", "no module not_there_at_all"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plugin_is_said(name: str, text: str, says: str) -> None:
    if text:
        write(f"{name.partition('.')[0]}.py", text)
    with pytest.raises(RecipeError, match=says):
        plugins.find("methods", name)


def test_a_module_with_two_plugins_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    write("toy_pair.py", TOY_METHOD + TOY_METHOD.split("\n\n\n")[1].replace("Toy", "Second"))
    module = sys.modules[plugins.find("methods", "toy_pair.Toy").__module__]
    monkeypatch.setitem(sys.modules, "reasonrun.methods.star", module)
    with pytest.raises(RecipeError, match="exactly one plug-in class; found: Toy, Second"):
        plugins.find("methods", "star")


def test_an_engine_must_be_able_to_hold_its_name() -> None:
    engine = (
        "from typing import Literal\nfrom reasonrun.settings import Settings as Base\n"
        "class Mine:\n    class Settings(Base):\n        name: Literal['mine'] = 'mine'\n"
        "class Open:\n    class Settings(Base):\n        name: str = ''\n"
    )
    write("toy_engine.py", engine)
    mine, free = (plugins.find("engines", f"toy_engine.{name}") for name in ("Mine", "Open"))
    with pytest.raises(RecipeError, match="declare `name: str`"):
        plugins.settings_class("engines", "toy_engine.Mine", mine)
    assert plugins.settings_class("engines", "toy_engine.Open", free) is free.Settings


def test_the_union_of_a_kind_is_told_apart_by_name() -> None:
    adapter = TypeAdapter(plugins.union("methods"))
    assert isinstance(adapter.validate_python({"name": "star", "rounds": 2}), plugins.find("methods", "star").Settings)
    with pytest.raises(ValidationError, match="'star'"):
        adapter.validate_python({"name": "sta"})
    assert set(adapter.json_schema()["discriminator"]["mapping"]) == set(plugins.names("methods"))
