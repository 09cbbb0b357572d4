"""``explain`` and completion as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_commands import reasonrun_cli

import reasonrun
from reasonrun import errors, plugins
from reasonrun.cli.explain import exit_meaning
from reasonrun.errors import EXIT_CODES, ExitCode, ReasonrunError, RecipeError
from reasonrun.field_catalogue import matching, section_fields, sections
from reasonrun.recipe import load
from reasonrun.recipe_fields import fields_of
from reasonrun.recipe_files import shipped
from reasonrun.recipe_values import SECTIONS
from reasonrun.settings import WHEN_CHANGED, Effect


def explained(folder: Path, *arguments: str) -> list[dict]:
    done = reasonrun_cli(folder, "explain", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["fields"]


# -- fields ------------------------------------------------------------------------------------------------------------


def test_a_field_is_explained_for_every_plugin_that_has_it(tmp_path: Path) -> None:
    by_plugin = {field["of"]: field for field in explained(tmp_path, "method.rounds")}
    assert set(by_plugin) == {"star", "step_dpo", "self_rationalize", "correction_sft", "gold_sft"}
    star = by_plugin["star"]
    assert (star["type"], star["default"], star["effect"]) == ("whole number, at least 1", 16, "horizon")
    assert "2203.14465" in star["paper"] and "--prune" in star["when_changed"]
    assert by_plugin["gold_sft"]["paper"] == ""


def test_a_recipe_narrows_and_shows_value_and_place(tmp_path: Path) -> None:
    (field,) = explained(tmp_path, "method.rounds", "--recipe", "star_arith")
    assert (field["of"], field["value"]) == ("star", 3)
    file, _, line = field["from"].rpartition(":")
    assert Path(tmp_path, file).read_text().splitlines()[int(line) - 1] == "  rounds: 3"
    (field,) = explained(tmp_path, "rounds", "method.rounds=5", "--recipe", "star_arith")
    assert (field["value"], field["from"]) == (5, "command line: method.rounds=5")
    (field,) = explained(tmp_path, "method.dedupe", "--recipe", "star_arith")
    assert (field["value"], field["from"]) == (False, "default")


def test_the_text_holds_what_a_person_needs(tmp_path: Path) -> None:
    done = reasonrun_cli(tmp_path, "explain", "engine.dtype")
    assert "engine.dtype of hf, vllm\n" in done.stdout
    assert "takes    auto, float32, bfloat16 or float16\n" in done.stdout and 'default  "auto"\n' in done.stdout
    assert "numeric: the same experiment with other arithmetic" in done.stdout
    star = reasonrun_cli(tmp_path, "explain", "method.rounds", "--recipe", "star_arith").stdout
    assert "default  16, the paper's (Zelikman et al. 2022, arXiv 2203.14465)\n" in star
    group = reasonrun_cli(tmp_path, "explain", "method.sft", "--recipe", "star_arith").stdout
    assert "default  lr: 1e-06, warmup_steps: 100, batch_size: 8; else the fields' own" in group
    assert "fields   lr, schedule" in group


@pytest.mark.parametrize(
    ("key", "paths"),
    [
        ("models.judge.endpoint.url", {"models.ROLE.endpoint.url"}),
        ("launcher.sharding", {"launcher.sharding"}),
        ("endpoint.model", {"models.ROLE.endpoint.model"}),
        ("trackers.0.project", {"trackers.project"}),
        ("sft.lora.rank", {"method.sft.lora.rank"}),
        ("seed", {"seed"}),
        ("evaluate.turns", {"evaluate.turns"}),
        ("model.hub", {"model.hub"}),
    ],
)
def test_keys_are_whole_paths_or_ends_of_them(key: str, paths: set[str]) -> None:
    assert {field.path for field in matching(key)} == paths


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("method.ronds", "method.rounds"),
        ("sft.ler", "method.sft.lr"),
        ("method.lr", "method.sft.lr"),
        ("launcher.shardng", "launcher.sharding"),
        ("learning_rate", "method.sft.lr"),
        ("models.judge.endpoint.ulr", "models.ROLE.endpoint.url"),
    ],
)
def test_a_misspelt_key_gives_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    done = reasonrun_cli(tmp_path, "explain", key)
    assert done.returncode == 2 and nearest in done.stderr and "Traceback" not in done.stderr


def test_other_mistakes_exit_with_2(tmp_path: Path) -> None:
    for arguments in ([], ["7"], ["method.rounds", "seed=1"], ["method.alpha", "--recipe", "star_arith"]):
        done = reasonrun_cli(tmp_path, "explain", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr, arguments
    assert "star_arith has no field 'method.alpha'" in done.stderr and "it is made of method star" in done.stderr


def test_a_section_lists_its_choices(tmp_path: Path) -> None:
    done = reasonrun_cli(tmp_path, "explain", "engine", "--json")
    choices = json.loads(done.stdout)["choices"]
    assert set(choices) == set(plugins.names("engines")) and "engine.sleep_level" in choices["vllm"]
    assert "engine: vllm\n" in reasonrun_cli(tmp_path, "explain", "engine").stdout


@pytest.mark.parametrize(
    ("words", "heading", "name"),
    [
        (["models"], "models.ROLE", "endpoint"),
        (["models.teacher"], "models.ROLE", "endpoint"),
        (["model"], "model", "name, path, hub"),
        (["star"], "method: star", "rationalize"),
        (["hf"], "engine: hf", "prefill_tokens"),
        (["engine.hf"], "engine: hf", "prefill_tokens"),
        (["method.rounds=3"], "method.rounds of star", "at least 1"),
        (["exit 4"], "exit 4: error", "--run NEW"),
        (["exit", "4"], "exit 4: error", "--run NEW"),
    ],
)
def test_what_is_asked_in_another_way_is_understood(tmp_path: Path, words: list[str], heading: str, name: str) -> None:
    shown = reasonrun_cli(tmp_path, "explain", *words).stdout
    assert heading in shown and name in shown.partition(heading)[2]


def test_a_class_of_ones_own_is_explained_through_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "from reasonrun.contracts import Method\nfrom reasonrun.settings import Effect, Settings as Base, setting\n"
        "class Toy(Method):\n    class Settings(Base):\n"
        "        strength: int = setting(1, Effect.SEMANTIC, 'How much.', ge=1)\n"
        "    def run(self, lab):\n        return lab.base\n"
    )
    (tmp_path / "mine.yaml").write_text("method:\n  name: toy.Toy\n  strength: 4\ntask: arith\nengine: scripted\n")
    (field,) = explained(tmp_path, "method.strength", "--recipe", "mine.yaml")
    assert (field["of"], field["value"], field["from"]) == ("toy.Toy", 4, "mine.yaml:3")


@pytest.mark.parametrize("name", ["star_arith", "step_dpo_arith_teacher", "score_gsm8k", "self_rationalize_feedback"])
def test_every_field_of_a_recipe_can_be_explained(name: str) -> None:
    for path, field in load(name).fields.items():
        if path in {*SECTIONS, "models", "trackers"}:  # listed by what can be chosen
            continue
        same = [known for known in matching(path) if known.field.description == field.description]
        assert same, path


def test_every_effect_is_explained_and_every_paper_field_exists() -> None:
    assert set(WHEN_CHANGED) == set(Effect)
    for name in plugins.names("methods"):
        cls = plugins.find("methods", name)
        assert bool(cls.paper) == bool(cls.from_paper)
        assert set(cls.from_paper.split()) <= {path for path, _ in fields_of(cls.Settings)}
    assert sum(bool(field.paper) for section in sections() for field in section_fields(section)) > 25


# -- exit codes --------------------------------------------------------------------------------------------------------


def test_every_code_that_an_error_can_have_is_in_the_table() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ReasonrunError)]
    assert len(classes) > 7
    assert {cls.exit_code for cls in classes} | {0, 130} == set(EXIT_CODES) == set(ExitCode)
    assert all(EXIT_CODES[code].meaning and (EXIT_CODES[code].remedies or code == 0) for code in ExitCode)


def test_an_exit_code_is_explained_with_its_remedies(tmp_path: Path) -> None:
    done = reasonrun_cli(tmp_path, "explain", "4")
    assert done.stdout.startswith("exit 4: ") and "--run NEW" in done.stdout and "--redo STEP" in done.stdout
    document = json.loads(reasonrun_cli(tmp_path, "explain", "75", "--json").stdout)
    assert document["exit_code"] == 75 and document["remedies"] == ["the same command continues it"]
    assert "SIGKILL" in exit_meaning(137).meaning
    with pytest.raises(RecipeError, match="0, 1, 2, 3, 4, 5, 75, 130"):
        exit_meaning(200)


# -- speed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["sft.lr"], ["method.rounds", "--recipe", "star_arith"], ["--schema"], ["4"]])
def test_explaining_needs_no_torch_and_under_a_second(tmp_path: Path, arguments: list[str]) -> None:
    code = (
        "import resource, sys; sys.argv = ['reasonrun', 'explain', *sys.argv[1:]]\n"
        "from reasonrun.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'trl', 'wandb', 'ray', 'sympy'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, file=sys.stderr)\n"
        "sys.exit(f'imported {bad}' if bad else 0)\n"
    )
    seconds = []
    for _ in range(2):  # the first one may have to compile
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seconds.append(min(float(done.stderr.split()[-1]), time.monotonic() - begin))
    assert min(seconds) < (2.0 if arguments == ["--schema"] else 1.0)  # of CPU time: the machine may be busy


# -- completion --------------------------------------------------------------------------------------------------------


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parents[1]), **more}


def completed(folder: Path, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    program = "import sys; sys.argv = ['reasonrun']; from reasonrun.cli.main import main; main()"
    line = " ".join(["reasonrun", *words])
    env = _environment(_REASONRUN_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words)))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_recipes_are_completed(tmp_path: Path) -> None:
    (tmp_path / "star_mine.yaml").write_text("method: star\ntask: arith\n")
    (tmp_path / "notes.txt").write_text("")
    offered = completed(tmp_path, "train", "star")
    assert offered == [*(name for name in shipped() if name.startswith("star")), "star_mine.yaml"]
    assert completed(tmp_path, "sweep", "star_arith,smoke_sc") == ["star_arith,smoke_score"]
    assert completed(tmp_path, "train", "no") == []


def test_override_keys_and_their_choices_are_completed(tmp_path: Path) -> None:
    assert completed(tmp_path, "train", "star_arith", "method.ro") == ["method.rounds="]
    assert completed(tmp_path, "train", "star_arith", "method.init_from=") == [
        "method.init_from=base",
        "method.init_from=previous",
    ]
    assert completed(tmp_path, "plan", "star_arith", "seed=1", "engine=v") == ["engine=vllm"]
    assert completed(tmp_path, "train", "no_such_recipe", "method.") == []


def test_keys_to_explain_are_completed(tmp_path: Path) -> None:
    assert completed(tmp_path, "explain", "method.sft.warm") == ["method.sft.warmup_steps", "method.sft.warmup_ratio"]
    offered = completed(tmp_path, "explain", "eng")
    assert offered[0] == "engine" and "engine.sleep_level" in offered  # a section alone would end the word
    assert completed(tmp_path, "explain", "sft.warm") == ["sft.warmup_steps", "sft.warmup_ratio"]
    assert completed(tmp_path, "explain", "self_r") == ["self_rationalize"]


def test_tasks_to_measure_are_completed_with_what_they_can_be_told(tmp_path: Path) -> None:
    assert completed(tmp_path, "eval", "j") == ["judge"]
    assert completed(tmp_path, "eval", "judge", "task.score_f") == ["task.score_field="]
    assert completed(tmp_path, "eval", "arith", "evaluate.greedy=") == ["evaluate.greedy=true", "evaluate.greedy=false"]
