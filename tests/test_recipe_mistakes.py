"""Every kind of mistake that a recipe can hold is found, at its place, together with all others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonrun.errors import RecipeError
from reasonrun.recipe import load
from reasonrun.recipe_errors import Problem, RecipeProblems
from reasonrun.recipe_files import recipes_dir

VALID = """\
defaults:
  - model: tiny
  - engine: scripted
  - launcher: local
  - _self_
method: {name: star, rounds: 3}
task: arith
"""
PAIR = "method: star\ntask: arith\n"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "mine.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def problems(text: str | bytes, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(RecipeProblems) as caught:
        load(write(text), list(overrides))
    return caught.value.problems


def only(text: str | bytes, *overrides: str) -> Problem:
    (problem,) = problems(text, *overrides)
    return problem


@dataclass(frozen=True)
class Case:
    text: str | bytes
    place: tuple[int, int]
    path: str
    says: str
    nearest: str = ""


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
SEED, LAUNCHER = VALID + "seed: ", VALID + "launcher: {python: "
CASES = {
    # name: text, (line, column), path, part of the message, nearest
    "unknown key": Case(VALID + "sed: 3\n", (8, 1), "sed", "unknown key", "seed"),
    "misspelt key": Case("task: arith\nmethod:\n  name: star\n  roun: 2\n", (4, 3), "method.roun", "unknown", "rounds"),
    "key by its meaning": Case(
        "task: arith\nmethod: {name: star, sft: {learning_rate: 1.0}}\n",
        (2, 28), "method.sft.learning_rate", "unknown key", "lr",
    ),
    "key too high": Case("task: arith\nmethod: {name: star, lr: 1.0}\n", (2, 22), "method.lr", "unknown key", "sft.lr"),
    "wrong type": Case(SEED + "[1]\n", (8, 7), "seed", "expected a whole number, got a list"),
    "quoted number": Case(SEED + "'3'\n", (8, 7), "seed", "without quotes"),
    "float for a count": Case(SEED + "1e3\n", (8, 7), "seed", "expected a whole number, got 1000.0"),
    "octal": Case(SEED + "010\n", (8, 7), "seed", "base 8 or 60"),
    "sexagesimal": Case(SEED + "1:30\n", (8, 7), "seed", "base 8 or 60"),
    "not finite": Case(VALID + "evaluate: {temperature: .inf}\n", (8, 25), "evaluate.temperature", "finite"),
    "out of range": Case(SEED + "-1\n", (8, 7), "seed", "greater than or equal to 0, got -1"),
    "no for a text": Case("task: arith\nmethod: {name: star, keep: no}\n", (2, 28), "method.keep", "YAML reads no"),
    "on in quotes": Case("task: arith\nmethod: {name: star, dedupe: 'on'}\n", (2, 30), "method.dedupe", "or false"),
    "value": Case("task: arith\nmethod: {name: star, keep: corect}\n", (2, 28), "method.keep", "not one of", "correct"),
    "tab": Case("method: star\ntask:\n\tname: arith\n", (3, 1), "", "a tab"),
    "duplicate key": Case(SEED + "1\nseed: 2\n", (9, 1), "seed", "given twice, first on line 8"),
    "group choice": Case(PAIR + "defaults:\n  - engine: scriptd\n", (4, 13), "engine", "no choice", "scripted"),
    "group": Case(PAIR + "defaults:\n  - modle: tiny\n", (4, 5), "defaults.0", "no group", "model"),
    "list for a choice": Case(PAIR + "defaults: [{model: [tiny]}]\n", (3, 20), "model", "no choice"),
    "nothing to override": Case(PAIR + "defaults: [{override engine: hf}]\n", (3, 13), "defaults.0", "no parent"),
    "parent": Case(PAIR + "defaults: [smoke_sta]\n", (3, 12), "defaults.0", "no recipe", "smoke_star"),
    "own parent": Case(PAIR + "defaults: [mine]\n", (3, 12), "defaults.0", "names itself"),
    "defaults": Case(PAIR + "defaults: 3\n", (3, 11), "defaults", "expected a list"),
    "unknown method": Case("method: sta\ntask: arith\n", (1, 9), "method.name", "unknown method 'sta'", "star"),
    "method without a name": Case("method: {rounds: 1}\ntask: arith\n", (1, 9), "method", "names no method"),
    "no method": Case("task: arith\n", (1, 1), "method", "required key is missing"),
    "unknown tracker": Case(VALID + "trackers: [nowhere]\n", (8, 12), "trackers.0.name", "unknown tracker"),
    "trackers no list": Case(VALID + "trackers: {a: 1}\n", (8, 11), "trackers", "expected a list"),
    "two models": Case(VALID + "model: {path: x, name: tiny}\n", (8, 24), "model.name", "given: path, name"),
    "model under its group file": Case(
        "defaults: [_self_, model: tiny]\n" + PAIR + "model: {path: x}\n", (4, 15), "model.path", "let `_self_` come after"
    ),
    "revision without hub": Case(VALID + "model: {revision: x}\n", (8, 8), "model", "belong to a hub model"),
    "word for a group": Case(VALID + "evaluate: 3\n", (8, 11), "evaluate", "expected a group of keys"),
    "nothing to measure": Case(VALID + "evaluate: {greedy: false}\n", (8, 11), "evaluate", "nothing to measure"),
    "style": Case(VALID + "evaluate: {style: palin}\n", (8, 19), "evaluate.style", "no style 'palin'", "plain"),
    "settings that exclude each other": Case(
        "method: star\ntask: {name: arith, max_steps: 3, multiplications: 4}\n", (2, 7), "task", "4 multiplications"
    ),
    "empty": Case("", (1, 1), "", "the file is empty"),
    "only a comment": Case("# nothing\n", (1, 1), "", "the file is empty"),
    "list": Case("- a\n", (1, 1), "", "a recipe is a group of keys"),
    "syntax": Case("method: {name: star\ntask: arith\n", (2, 5), "", "not YAML"),
    "two documents": Case("method: star\n---\ntask: arith\n", (2, 1), "", "another document"),
    "control character": Case('seed: 1\nmethod: "a\x01b"\n', (2, 11), "", "control character"),
    "not UTF-8": Case("seed: 1\n# été\n".encode("latin-1"), (2, 3), "", "not UTF-8"),
    "UTF-16": Case("seed: 1\n".encode("utf-16"), (1, 1), "", "not UTF-8"),
    "half a character": Case(VALID.replace("arith", '"\\ud800"'), (7, 7), "task", "stands for no character"),
    "too large": Case("# " + "x" * 1_000_000, (1, 1), "", "1000002 bytes"),
    "anchors bomb": Case(BOMB, (1, 1), "", "counting repeated anchors"),
    "anchor in itself": Case("a: &a [*a]\n", (1, 1), "", "contains itself"),
    "deep": Case("{a: " * 40 + "1" + "}" * 40 + "\n", (1, 1), "", "nested deeper"),
    "very deep": Case("a: " + "[" * 5000 + "]" * 5000 + "\n", (1, 4), "", "nested deeper"),
    "tag": Case("method: star\ntask: !!python/object/apply:os.system [ls]\n", (2, 7), "task", "tag !!python/object"),
    "key that is a bool": Case(VALID + "on: 1\n", (8, 1), "", "YAML reads this one as bool"),
    "key that is a list": Case(VALID + "? [a]\n: 1\n", (8, 3), "", "a key must be a word"),
    "unknown interpolation": Case(SEED + "${now:x}\n", (8, 7), "seed", "unknown interpolation"),
    "unfinished interpolation": Case(SEED + '"${x"\n', (8, 7), "seed", "unknown interpolation"),
    "reference to nothing": Case(SEED + "${task.sead}\n", (8, 7), "seed", "names nothing"),
    "cycle": Case(SEED + "${evaluate.seed}\nevaluate: {seed: '${seed}'}\n", (8, 7), "seed", "refers to itself"),
    "reference to a group": Case(SEED + "${method}\n", (8, 7), "seed", "names a group"),
    "environment in seed": Case(SEED + "${oc.env:HOME,1}\n", (8, 7), "seed", "cannot come from the environment"),
    "unset variable": Case(LAUNCHER + "'${oc.env:NOT_SET_X}'}\n", (8, 20), "launcher.python", "no variable NOT_SET_X"),
    "secret": Case(LAUNCHER + "hf_abcdefghijklmnopqrstuvwxyz}\n", (8, 20), "launcher.python", "looks like a secret"),
    "hydra's own": Case(VALID + "hydra: {verbose: true}\n", (8, 1), "hydra", "not part of a recipe"),
}  # fmt: skip


def test_several_turns_need_a_task_that_can_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = VALID + "evaluate: {turns: 2}\n"
    assert load(write(asked)).evaluate.turns == 2
    assert "less than or equal to 8" in only(VALID + "evaluate: {turns: 9}\n").message
    monkeypatch.setattr("reasonrun.tasks.arith.Arith.capabilities", frozenset({"solution"}))
    found = only(asked)
    assert (found.line, found.column, found.path) == (8, 19, "evaluate.turns")
    assert "need correction, which the task arith does not offer" in found.message
    assert load(write(VALID + "evaluate: {turns: 1}\n")).evaluate.turns == 1


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_found_at_its_place(name: str) -> None:
    case = CASES[name]
    found = problems(case.text)
    problem = next((p for p in found if (p.line, p.column) == case.place), None)
    assert problem is not None, found
    assert (problem.file, problem.path, problem.nearest) == ("mine.yaml", case.path, case.nearest)
    assert case.says in problem.message


def test_all_mistakes_are_reported_at_once_with_line_and_caret() -> None:
    text = """\
defaults:
  - engine: scriptd
method:
  name: star
  rounds: "4"
  rouns: 4
  sft: {learning_rate: 1.0}
task: arith
task: arit
seed: -1
"""
    with pytest.raises(RecipeProblems) as caught:
        load(write(text), ["evaluate.greedy=maybe", "foo"])
    message = str(caught.value)
    assert [(p.line, p.column, p.path) for p in caught.value.problems] == [
        (2, 13, "engine"),
        (5, 11, "method.rounds"),
        (6, 3, "method.rouns"),
        (7, 9, "method.sft.learning_rate"),
        (9, 1, "task"),
        (9, 7, "task.name"),
        (10, 7, "seed"),
        (None, None, "evaluate.greedy"),
        (None, None, ""),
    ]
    assert message.startswith("9 problems in the recipe\n")
    assert "mine.yaml:7:9: method.sft.learning_rate: unknown key; nearest is lr. Allowed: lr, schedule," in message
    assert "\n      sft: {learning_rate: 1.0}\n            ^\n" in message


def test_a_byte_order_mark_shifts_no_column() -> None:
    problem = only("\ufeffsed: 1\r\nmethod: star\r\ntask: arith\r\n")
    assert (problem.line, problem.column, problem.path, problem.source_line) == (1, 1, "sed", "sed: 1")


def test_a_mistake_in_a_group_file_is_placed_there() -> None:
    write("name: scripted\n\nacuracy: 0.5\n", "engine/scripted.yaml")
    problem = only(VALID)
    assert (problem.file, problem.line, problem.path) == ("engine/scripted.yaml", 3, "engine.acuracy")


def test_a_mistake_in_a_merged_anchor_is_placed_at_the_anchor() -> None:
    found = problems("x: &x {name: star, rouns: 2}\nmethod:\n  <<: *x\ntask: arith\n")
    assert {(p.path, p.line, p.column) for p in found} == {("x", 1, 1), ("method.rouns", 1, 20)}


@pytest.mark.parametrize(
    ("override", "path", "says", "nearest"),
    [
        ("method.roundss=2", "method.roundss", "unknown key", "rounds"),
        ("method.rounds='2'", "method.rounds", "without quotes", ""),
        ("method.rounds=007", "method.rounds", "leading zeros", ""),
        ("engine=scriptd", "engine", "no choice", "scripted"),
        ("hydra.verbose=true", "", "unknown key", ""),
        ("method.rounds", "", "expected key=value", ""),
        ("~method", "", "expected key=value", ""),
        ("=3", "", "expected key=value", ""),
        ("method..rounds=3", "", "expected key=value", ""),
        ("method.rounds=1,2", "method.rounds", "reasonrun sweep", ""),
        ("method.rounds=[1,2", "method.rounds", "not understood", ""),
        ("seed=${nope:x}", "seed", "unknown interpolation", ""),
        ("method=nope.mine.Mine", "method.name", "no module nope", ""),
        ("evaluate.seed=\udcff", "", "not UTF-8", ""),
    ],
)
def test_a_mistake_on_the_command_line_is_placed_there(override: str, path: str, says: str, nearest: str) -> None:
    problem = only(VALID, "method.rounds=2", override)
    assert (problem.path, problem.nearest, problem.line, problem.column) == (path, nearest, None, None)
    assert says in problem.message
    if override.isprintable():
        assert problem.file == f"command line: {override}"


def test_a_method_that_needs_what_the_task_lacks_is_refused() -> None:
    write(
        "from reasonrun.contracts import Method\n"
        "from reasonrun.settings import Settings as Base\n"
        "class Probing(Method):\n"
        "    requires = frozenset({'plain', 'telepathy'})\n"
        "    class Settings(Base):\n        pass\n"
        "    def run(self, lab):\n        return lab.base\n",
        "toy_probing.py",
    )
    problem = only("task: arith\nmethod:\n  name: toy_probing.Probing\n")
    assert (problem.line, problem.column, problem.path) == (3, 9, "method.name")
    assert "toy_probing.Probing needs telepathy" in problem.message and "few_shot" in problem.allowed


def test_there_is_no_such_recipe() -> None:
    write(VALID, "recipes/mine.yaml")
    with pytest.raises(RecipeError, match=r"nearest is recipes/mine\.yaml"):
        load("recipes/mien.yaml")
    with pytest.raises(RecipeError, match="nearest is star_arith"):
        load("star_arit")
    with pytest.raises(RecipeError, match="is a folder"):
        load("recipes")
    Path("eval").mkdir()  # such as a run directory of that name
    assert load("eval").name == "eval"


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_recipe_never_shows_a_traceback(data: st.DataObject) -> None:
    text = (recipes_dir() / "star_arith.yaml").read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(len(text), begin + 30)))
        text = text[:begin] + data.draw(st.text("\t\n :-{}[]&*!|>'\"%@`,?#${}x1~\\é", max_size=5)) + text[end:]
    try:
        load(write(text))
    except RecipeError as error:
        assert str(error)
