"""Every recipe of the corpus is refused as its ``.expected`` file says, by ``check``, and by ``plan`` and ``train`` alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bad_input import CORPUS, Expected, assert_as_expected, cases, input_of, place, read_expected, reasonrun

import reasonrun as package

pytestmark = [pytest.mark.attack, pytest.mark.promise("G17", "bad recipes")]

RECIPES = cases(CORPUS / "recipes")
REFUSED = [name for name, path in RECIPES.items() if read_expected(path).exit_code]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REASONRUN_NOT_SET", raising=False)


def command(name: str, expected: Expected) -> list[str]:
    """Put the recipe into the current folder; the arguments that read it."""
    place(input_of(RECIPES[name]), Path(f"{name}.yaml"))
    return [word.replace("{file}", f"{name}.yaml") for word in expected.arguments or ["check", "{file}"]]


def test_every_file_of_the_corpus_has_its_expectation() -> None:
    inputs = {path.stem for path in (CORPUS / "recipes").iterdir() if path.suffix != ".expected"}
    assert inputs == set(RECIPES) and len(inputs) >= 80


@pytest.mark.parametrize("name", RECIPES)
def test_check_says_what_is_wrong_and_where(name: str) -> None:
    expected = read_expected(RECIPES[name])
    arguments = command(name, expected)
    before = sorted(Path().rglob("*"))
    assert_as_expected(expected, reasonrun(*arguments))
    assert sorted(Path().rglob("*")) == before, "a check leaves nothing behind"


@pytest.mark.parametrize("name", RECIPES)
def test_json_is_one_document_with_the_same_facts(name: str) -> None:
    expected = read_expected(RECIPES[name])
    done = reasonrun(*command(name, expected), "--json")
    document = json.loads(done.out)
    assert (done.exit_code, done.err) == (expected.exit_code, "")
    if expected.exit_code == 0:
        assert document["ok"] is True
        return
    as_text = Expected(exit_code=done.exit_code, lines=expected.lines, never=expected.never)
    message = document["message"]
    assert document["exit_code"] == done.exit_code
    assert_as_expected(as_text, type(done)(exit_code=done.exit_code, out=message, err="", seconds=done.seconds))
    assert not [text for text in expected.never if text in done.out]
    if "problems" in document:
        assert len(document["problems"]) == int(message.split()[0])
        for problem in document["problems"]:
            on_command_line = problem["file"].startswith("command line: ")
            assert on_command_line or (problem["line"] >= 1 and problem["column"] >= 1), problem
            assert problem["message"] in message


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_nothing_begins_with_a_recipe_that_check_refuses(name: str, verb: str) -> None:
    expected = read_expected(RECIPES[name])
    arguments = command(name, expected)
    done = reasonrun(verb, *arguments[1:])
    assert_as_expected(expected, done)
    assert not Path("runs").exists() and not Path("owned").exists()


@pytest.mark.parametrize("name", sorted(RECIPES)[::12])
def test_a_process_of_its_own_says_the_same(name: str) -> None:
    expected = read_expected(RECIPES[name])
    arguments = command(name, expected)
    code = "import sys\nfrom reasonrun.cli.main import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=60, check=False
    )
    here = reasonrun(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (here.exit_code, here.out, here.err)


def test_ten_megabytes_are_refused_before_they_are_parsed() -> None:
    Path("big.yaml").write_text("method: star\ntask: arith\n" + "# " + "x" * 10_000_000 + "\n")
    done = reasonrun("check", "big.yaml")
    lines = ["1 problem", "big.yaml:1:1: 10000028 bytes are too many for a recipe (at most 1000000)"]
    assert_as_expected(Expected(exit_code=2, lines=lines), done)


def test_many_nested_brackets_below_the_limit_do_not_stall() -> None:
    Path("wide.yaml").write_text("method: star\ntask: arith\nseed: [" + "[]," * 9000 + "1]\n")
    expected = Expected(exit_code=2, lines=["wide.yaml:3:7: seed: expected a whole number, got a list"])
    done = reasonrun("check", "wide.yaml")
    assert done.seconds < 20  # PyYAML takes a second or two over so many nodes, and minutes over nested ones
    assert_as_expected(expected, replace(done, seconds=0))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check"], "Missing argument"),
        (["recipes", "list"], "write `reasonrun recipes` for the list"),
        (["check", "smoke_star", "--nope"], "No such option: --nope"),
        (["chek", "smoke_star"], "No such command 'chek'"),
        (["eval", "arith", "--k", "many"], "Invalid value for '--k'"),
        (["check", "no-such-recipe.yaml"], "there is no recipe 'no-such-recipe.yaml'"),
        (["check", "x" * 5000], "cannot be a recipe: File name too long"),
        (["train", "smoke_star", "--run", "a-file"], "--run a-file: that is a file"),
        (["status", "nowhere"], "nowhere is not a run directory"),
        (["samples", "nowhere"], "nowhere is not a run directory"),
        (["compare", "nowhere", "here"], "nowhere is not a run directory"),
        (["plan", "smoke_star", "--assume", "acuracy=1"], "--assume acuracy"),
        (["sweep", "smoke_star", "sed=1,2"], "sed: unknown key; nearest is seed"),
    ],
)
def test_a_wrong_command_is_a_line_or_a_document(arguments: list[str], says: str) -> None:
    Path("a-file").write_text("")
    done = reasonrun(*arguments)
    assert_as_expected(Expected(exit_code=2, lines=[says]), done)
    as_json = reasonrun(*arguments, "--json")
    document = json.loads(as_json.out)
    assert as_json.exit_code == document["exit_code"] == 2 and says in document["message"]
