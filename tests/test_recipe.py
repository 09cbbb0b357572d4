"""Recipes: composition, what is stored, what counts as a change; mistakes are in test_recipe_mistakes.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reasonrun import plugins
from reasonrun.recipe import FieldChange, ResolvedRecipe, diff, load
from reasonrun.recipe_errors import RecipeProblems
from reasonrun.recipe_files import recipes_dir, shipped
from reasonrun.settings import Effect

VALID = """\
defaults:
  - model: tiny
  - engine: scripted
  - launcher: local
  - _self_
method: {name: star, rounds: 3}
task: arith
"""


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "mine.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


# -- composition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = load(name)
    assert (recipe.name, recipe.slug) == (name, "")
    assert recipe.source_path.read_text().startswith("#"), "a recipe begins by saying what it is for"


def test_the_shipped_recipes_and_groups_are_found() -> None:
    assert {"eval", "smoke_star", "star_arith"} <= set(shipped())
    groups = {path.relative_to(recipes_dir()).as_posix() for path in recipes_dir().glob("*/*.yaml")}
    assert {"model/tiny.yaml", "engine/hf.yaml", "engine/scripted.yaml", "launcher/local.yaml"} <= groups


def test_recipe_group_files_and_overrides_are_merged_in_that_order() -> None:
    write("name: scripted\naccuracy: 0.9\nspread: 0.1\ngain: 0.3\n", "engine/scripted.yaml")
    path = write(VALID + "engine: {spread: 0.2, gain: 0.3}\n")
    recipe = load(path, ["engine.gain=0.4"])
    assert (recipe.engine.accuracy, recipe.engine.spread, recipe.engine.gain) == (0.9, 0.2, 0.4)
    assert recipe.engine.truncated == 0.02  # the class default
    assert recipe.classes["engine"] is plugins.find("engines", "scripted")


def test_self_first_lets_group_files_win() -> None:
    write("name: scripted\naccuracy: 0.9\n", "engine/scripted.yaml")
    text = "defaults: [_self_, engine: scripted]\nmethod: star\ntask: arith\nengine: {accuracy: 0.1}\n"
    assert load(write(text)).engine.accuracy == 0.9


def test_a_word_stands_for_a_name_and_unnamed_sections_have_defaults() -> None:
    recipe = load(write("method: star\ntask: arith\n"))
    assert recipe.resolved["method"]["name"] == "star"
    assert [recipe.resolved[key]["name"] for key in ("model", "engine", "launcher")] == ["tiny", "hf", "local"]
    assert recipe.trackers == () and recipe.seed == 0 and recipe.evaluate.seed == 17
    assert recipe.resolved["evaluate"]["max_new_tokens"] is None  # nulls are written out


def test_group_choice_on_the_command_line_replaces_the_recipes() -> None:
    assert load(write(VALID), ["engine=hf"]).resolved["engine"]["name"] == "hf"
    assert load(write("method: star\ntask: arith\n"), ["engine=scripted"]).resolved["engine"]["name"] == "scripted"


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("", ["model.path=/x"], {"path": "/x"}),
        ("", ["model.hub=a/b", "model.revision=main"], {"hub": "a/b", "revision": "main"}),
        ("", ["model={path: /x}"], {"path": "/x"}),
        ("model: {path: /x}\n", [], {"path": "/x"}),
        ("model: {path: /x}\n", ["model.hub=a/b"], {"hub": "a/b"}),
        ("model: {path: /x}\n", ["model=smollm2"], {"name": "smollm2"}),
        ("model: {name: null, path: /x}\n", [], {"path": "/x"}),
    ],
)
def test_a_model_named_later_replaces_the_one_below(text: str, overrides: list[str], source: dict[str, str]) -> None:
    given = load(write(VALID + text), overrides).resolved["model"]
    assert {key: value for key, value in given.items() if value not in (None, "auto")} == source


def test_a_role_named_later_replaces_the_parents() -> None:
    write(VALID + "models: {judge: tiny}\n", "parent.yaml")
    endpoint = "models: {judge: {endpoint: {url: 'http://x/v1', model: m}}}\n"
    recipe = load(write("defaults: [parent, _self_]\n" + endpoint))
    assert recipe.further_models["judge"].name is None and recipe.further_models["judge"].endpoint is not None
    assert load("mine.yaml", ["models.judge.path=/x"]).further_models["judge"].path == "/x"


def test_a_model_put_in_the_place_of_the_parents_is_not_ignored_in_silence() -> None:
    write(VALID + "model: {path: /x}\n", "parent.yaml")
    with pytest.raises(RecipeProblems, match="given: name, path"):
        load(write("defaults: [parent, {override model: smollm2}, _self_]\n"))


def test_naming_another_method_drops_the_settings_of_the_first() -> None:
    recipe = load(write(VALID), ["method=measure", "method.split=dev"])
    assert recipe.resolved["method"] == {"name": "measure", "split": "dev", "max_new_tokens": 256}
    assert load(write("method: star\ntask: arith\n"), ["method.rounds=2"]).method.rounds == 2


def test_a_parent_recipe_is_extended() -> None:
    recipe = load(write("defaults: [smoke_star, {override engine: hf}, _self_]\nmethod: {rounds: 9}\n"))
    parent = load("smoke_star")
    assert (recipe.method.rounds, recipe.method.num_samples) == (9, parent.method.num_samples)
    assert (recipe.resolved["engine"]["name"], parent.resolved["engine"]["name"]) == ("hf", "scripted")


def test_byte_order_mark_and_windows_line_ends_change_nothing() -> None:
    plain = load(write(VALID)).resolved
    assert load(write(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())).resolved == plain


def test_a_recipe_may_have_any_file_name() -> None:
    recipe = load(write(VALID, "a folder=1/my recipe, v1.2.yaml"))
    assert recipe.name == "my recipe, v1.2"


@pytest.mark.parametrize("raw", ["/data/a b", "/data/x=y", "/a (1)/{b}", "it's", "trailing\\", "a:b"])
def test_texts_on_the_command_line_need_no_hydra_quoting(raw: str) -> None:
    recipe = load(write(VALID), ["model.name=null", f"model.path={raw}"])
    assert recipe.model.path == raw


def test_one_changed_setting_of_a_group_keeps_the_methods_other_ones() -> None:
    paper = load(write(VALID))
    assert paper.method.sft.warmup_steps == 100  # STaR's, not the trainer's 0
    recipe = load(write(VALID + "evaluate: {seed: 3}\n"), ["method.sft.batch_size=2", "method.sft.lora={rank: 4}"])
    assert (recipe.method.sft.warmup_steps, recipe.method.sft.batch_size) == (100, 2)
    assert (recipe.method.sft.lora.rank, recipe.method.sft.lora.alpha) == (4, 32.0)
    assert recipe.fields["method.sft.warmup_steps"].default == 100


def test_numbers_with_exponents_are_numbers_everywhere() -> None:
    text = VALID + "evaluate: {temperature: 5e-1}\n"
    recipe = load(write(text), ["method.top_p=1e-1"])
    assert (recipe.evaluate.temperature, recipe.method.top_p) == (0.5, 0.1)


def test_the_result_is_frozen() -> None:
    recipe = load(write(VALID))
    with pytest.raises(AttributeError):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        recipe.method.rounds = 1


# -- environment and secrets -------------------------------------------------------------------------------------------


def test_references_are_resolved_and_keep_their_type() -> None:
    text = VALID + "seed: 5\nevaluate: {seed: '${seed}', num_samples: '${method.rounds}'}\n"
    recipe = load(write(text), ["seed=7"])
    assert (recipe.evaluate.seed, recipe.evaluate.num_samples) == (7, 3)


def test_references_inside_a_text_and_escaped_ones() -> None:
    text = VALID + "launcher: {python: '/envs/${model.name}/\\${x}-${seed}'}\nseed: 5\n"
    assert load(write(text)).launcher.python == "/envs/tiny/${x}-5"


def test_the_environment_reaches_settings_but_not_the_stored_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PYTHON", "/opt/canary/python")
    recipe = load(write(VALID + "launcher: {python: '${oc.env:MY_PYTHON}'}\n"))
    assert recipe.launcher.python == "/opt/canary/python"
    assert recipe.resolved["launcher"]["python"] == "${oc.env:MY_PYTHON}"
    assert "canary" not in json.dumps(recipe.resolved)


@pytest.mark.promise("G18", "messages")
def test_a_value_from_the_environment_is_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "canary-value")
    text = (
        VALID
        + "launcher: {num_workers: '${oc.env:CANARY}', devices: '${oc.env:CANARY}'}\ntrackers: ['${oc.env:CANARY}']\n"
    )
    with pytest.raises(RecipeProblems) as caught:
        load(write(text))
    assert len(caught.value.problems) == 3
    assert "canary-value" not in str(caught.value) + repr(caught.value.problems)


@pytest.mark.promise("G18", "messages")
def test_secrets_are_refused_and_never_repeated() -> None:
    hidden = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(RecipeProblems) as caught:
        load(
            write(VALID + f"trackers: [{{name: wandb, api_key: {hidden}}}]\nnote: sk-{hidden}\n"),
            [f"launcher.token={hidden}", f"x=github_pat_{hidden}"],
        )
    secret = [p.path for p in caught.value.problems if "looks like a secret" in p.message]
    assert sorted(secret) == ["launcher.token", "note", "trackers.0.api_key", "x"]
    assert hidden not in str(caught.value) + repr(caught.value.problems)


def test_commits_and_token_counts_are_no_secrets() -> None:
    text = VALID + f"model: {{name: null, hub: a/b, trust_remote_code_commit: {'a1' * 20}}}\n"
    assert load(write(text)).model.trust_remote_code_commit == "a1" * 20


# -- slug, effects, changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "slug"),
    [
        ([], ""),
        (["method.rounds=2", "engine=hf"], "engine=hf,method.rounds=2"),
        (["engine=hf", "++method.rounds=2"], "engine=hf,method.rounds=2"),
        (["seed=1", "seed=2"], "seed=2"),
        (["launcher.num_workers=2"], ""),  # changes nothing in the experiment: continues the same run
        (["method.dedupe=true"], "method.dedupe=true"),
    ],
)
def test_slug(overrides: list[str], slug: str) -> None:
    assert load(write(VALID), overrides).slug == slug


def test_slug_is_safe_short_and_still_different() -> None:
    slugs = {load(write(VALID), ["model.name=null", f"model.path=/models/{'long/' * 20}{name}"]).slug for name in "ab/"}
    assert len(slugs) == 3
    assert all(len(slug) <= 60 and "/" not in slug for slug in slugs)


@pytest.mark.promise("G7", "looks at all fields of recipes")
def test_every_field_has_an_effect_and_a_meaning() -> None:
    recipe = load(write(VALID))

    def leaves(value: object, path: str) -> list[str]:
        if isinstance(value, dict):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else key)]
        return [path]

    stored = leaves(recipe.resolved, "")
    assert len(stored) > 60
    assert set(stored) <= set(recipe.effects)
    unexplained = [path for path, field in recipe.fields.items() if not field.description]
    assert all(path.endswith(".name") for path in unexplained)
    assert {recipe.effects[path] for path in ("seed", "method.sft.lr", "method.sft.lora.rank")} == {Effect.SEMANTIC}
    assert recipe.effects["method.rounds"] is Effect.HORIZON
    assert recipe.effects["method.sft.micro_batch_size"] is Effect.NUMERIC
    assert recipe.effects["launcher.num_workers"] is Effect.OPERATIONAL


def changes(old: ResolvedRecipe, new: ResolvedRecipe) -> list[FieldChange]:
    return diff(json.loads(json.dumps(old.resolved)), new)


@pytest.mark.promise("G7", "changed recipes")
def test_changes_name_field_values_and_effect() -> None:
    path = write(VALID)
    new = load(path, ["method.rounds=5", "method.sft.lora={rank: 4}", "launcher.num_workers=2"])
    found = changes(load(path), new)
    assert [(c.path, c.old, c.effect) for c in found] == [
        ("launcher.num_workers", 1, Effect.OPERATIONAL),
        ("method.rounds", 3, Effect.HORIZON),
        ("method.sft.lora", None, Effect.SEMANTIC),
    ]
    assert (found[1].new, found[2].new["rank"]) == (5, 4)
    assert changes(new, new) == []


@pytest.mark.promise("G7", "changed recipes")
def test_another_plugin_is_one_change() -> None:
    path = write(VALID)
    assert changes(load(path), load(path, ["engine=hf", "method=measure"])) == [
        FieldChange(path="engine.name", old="scripted", new="hf", effect=Effect.SEMANTIC),
        FieldChange(path="method.name", old="star", new="measure", effect=Effect.SEMANTIC),
    ]


@pytest.mark.promise("G7", "changed recipes")
@pytest.mark.promise("G22", "old recipes")
def test_a_field_that_an_old_run_did_not_know_changes_only_when_it_leaves_its_default() -> None:
    old = load(write(VALID)).resolved
    older = {**old, "method": {key: value for key, value in old["method"].items() if key != "dedupe"}}
    del older["seed"]
    assert diff(older, load(write(VALID))) == []
    changed = diff(older, load(write(VALID), ["method.dedupe=true"]))
    assert changed == [FieldChange(path="method.dedupe", old=False, new=True, effect=Effect.SEMANTIC)]


# -- speed -------------------------------------------------------------------------------------------------------------


def test_loading_is_quick_and_imports_no_heavy_library() -> None:
    code = (
        "import resource, sys\n"
        "from reasonrun.recipe import load\n"
        "for name in ('star_arith', 'smoke_star'):\n    load(name)\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'wandb', 'vllm', 'math_verify'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, sorted(heavy))\n"
    )
    source = str(Path(plugins.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
        check=True,
    )
    cpu_seconds, heavy = done.stdout.strip().split(" ", 1)
    assert heavy == "[]"
    assert float(cpu_seconds) < 1.0  # CPU seconds: a busy machine must not fail this
    assert done.stderr == ""
