"""``reasonrun check`` and ``reasonrun recipes`` as a user meets them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import reasonrun
from reasonrun.cli.recipes import copy_recipe, first_sentence
from reasonrun.errors import RecipeError
from reasonrun.recipe_files import recipes_dir, shipped
from reasonrun.recipe_schema import EDITOR_LINE

PAIR = "method: star\ntask: arith\n"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def reasonrun_main(*arguments: str, at_exit: str = "None") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, and the expression ``at_exit`` when it ends."""
    code = f"import atexit, sys\nfrom reasonrun.cli.main import main\natexit.register(lambda: {at_exit})\nmain()\n"
    env = {**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parents[1])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_a_valid_recipe_is_one_line_quickly_and_without_torch() -> None:
    reasonrun_main("check", "star_arith", "engine=scripted")  # in a new installation modules are compiled once
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = reasonrun_main(
        "check", "star_arith", "engine=scripted", "seed=3",
        at_exit="print(sorted({'torch', 'transformers', 'trl'} & set(sys.modules)), file=sys.stderr)",
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stdout.startswith("OK ")
    assert done.stdout.endswith(": method star, task arith, engine scripted, model tiny, launcher local, seed 3\n")
    assert done.stderr == "[]\n"
    # CPU seconds of the whole process, about 0.75 on an idle machine: a busy one must not fail this
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_mistakes_end_with_exit_code_2_and_no_traceback() -> None:
    Path("mine.yaml").write_text(PAIR + "sed: 1\n")
    done = reasonrun_main("check", "mine.yaml", "method.roundss=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 2 problems in the recipe\nmine.yaml:3:1: sed: unknown key; nearest is seed.")
    assert "\n    sed: 1\n    ^\n" in done.stderr
    assert "command line: method.roundss=2: method.roundss: unknown key; nearest is rounds." in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_as_json() -> None:
    Path("mine.yaml").write_text(PAIR + "sed: 1\n")
    done = reasonrun_main("check", "mine.yaml", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    document = json.loads(done.stdout)
    (problem,) = document["problems"]
    assert document["ok"] is False
    assert {key: problem[key] for key in ("file", "line", "column", "path", "message", "nearest", "source_line")} == {
        "file": "mine.yaml",
        "line": 3,
        "column": 1,
        "path": "sed",
        "message": "unknown key",
        "nearest": "seed",
        "source_line": "sed: 1",
    }
    assert {"method", "task", "seed"} <= set(problem["allowed"])


def test_a_valid_recipe_as_json() -> None:
    Path("mine.yaml").write_text(PAIR)
    document = json.loads(reasonrun_main("check", "mine.yaml", "seed=3", "--json").stdout)
    assert (document["ok"], document["name"], document["slug"]) == (True, "mine", "seed=3")
    assert document["resolved"]["method"]["name"] == "star" and document["resolved"]["evaluate"]["seed"] == 17


def test_recipes_lists_every_shipped_recipe_with_its_purpose() -> None:
    listed = dict(line.split(maxsplit=1) for line in reasonrun_main("recipes").stdout.splitlines())
    assert set(listed) == set(shipped())
    assert listed["star_arith"] == first_sentence(recipes_dir() / "star_arith.yaml")


def test_first_sentence_spans_lines_and_stops() -> None:
    Path("a.yaml").write_text(
        "# One job (Doe et al. 2022), at\n# most 3.5 minutes. More.\n# And more.\nmethod: star\n# not this\n"
    )
    Path("b.yaml").write_text("method: star\n")
    assert first_sentence(Path("a.yaml")) == "One job (Doe et al. 2022), at most 3.5 minutes."
    assert first_sentence(Path("b.yaml")) == ""


def test_copy_never_overwrites() -> None:
    original = EDITOR_LINE.encode() + (recipes_dir() / "star_arith.yaml").read_bytes()
    assert copy_recipe("star_arith", Path()) == Path("star_arith.yaml")
    assert Path("star_arith.yaml").read_bytes() == original
    assert json.loads(Path("recipe.schema.json").read_text())["title"] == "Recipe of reasonrun"
    Path("recipe.schema.json").write_text("mine")
    Path("star_arith.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"star_arith\.yaml exists already"):
        copy_recipe("star_arith", Path())
    assert Path("star_arith.yaml").read_text() == "mine"
    assert copy_recipe("star_arith", Path("other.yaml")).read_bytes() == original
    assert Path("recipe.schema.json").read_text() == "mine"
    with pytest.raises(RecipeError, match="cannot be written"):
        copy_recipe("star_arith", Path("no/folder/x.yaml"))
    with pytest.raises(RecipeError, match="nearest is star_arith"):
        copy_recipe("star_arit", Path("x.yaml"))


def test_a_copied_recipe_still_finds_its_groups() -> None:
    done = reasonrun_main("recipes", "copy", "star_arith", "mine.yaml")
    assert done.stdout == "copied star_arith to mine.yaml; check it with `reasonrun check mine.yaml`\n"
    assert reasonrun_main("check", "mine.yaml").stdout.startswith("OK mine.yaml: method star, task arith, engine hf")
    wrong = reasonrun_main("recipes", "cpy", "star_arith")
    assert wrong.returncode == 2 and "reasonrun recipes copy NAME" in wrong.stderr
