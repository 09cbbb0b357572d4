"""The JSON schema of recipes: it takes what ships, refuses mistakes, and its committed copy is up to date."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from reasonrun import plugins
from reasonrun.recipe import load
from reasonrun.recipe_fields import fields_of
from reasonrun.recipe_files import recipes_dir, shipped
from reasonrun.recipe_schema import recipe_schema, schema_text, type_in_words
from reasonrun.recipe_source import read

COMMITTED = Path(__file__).parents[1] / "docs" / "recipe.schema.json"


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    schema = recipe_schema()
    Draft7Validator.check_schema(schema)
    assert set(re.findall(r'"\$ref": "#/definitions/([^"]+)"', json.dumps(schema))) == set(schema["definitions"])
    assert '"$defs"' not in json.dumps(schema)
    return Draft7Validator(schema)


def as_editors_read(path: Path) -> dict[str, Any]:
    """The whole file; numbers as in YAML 1.2, which is what ``read`` does too."""
    source = read(path)
    written = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    names = [key.value for key, _ in written.value]
    defaults = yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults")
    return {**source.data, **({"defaults": defaults} if "defaults" in names else {})}


def test_the_committed_copy_is_up_to_date() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == schema_text(), (
        "a field has changed: reasonrun explain --schema > docs/recipe.schema.json"
    )


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid_as_written_and_as_resolved(name: str, validator: Draft7Validator) -> None:
    validator.validate(as_editors_read(recipes_dir() / f"{name}.yaml"))
    validator.validate(load(name).resolved)


WRITTEN = {"method": {"name": "star", "rounds": 2}, "task": "arith"}


@pytest.mark.parametrize(
    "more",
    [
        {"method": "star"},
        {"method": "mine.toy.Toy"},
        {"method": {"name": "mine.toy.Toy", "anything": 3}},
        {"method": {"rounds": "${seed}", "sft": {"lr": "${oc.env:LR,1e-4}", "lora": {"rank": 8}}}},
        {"launcher": {"name": "local", "devices": [0, "GPU-1"]}},
        {"models": {"judge": {"endpoint": {"model": "m"}}, "teacher": "smollm2"}},
        {"trackers": ["wandb", {"name": "wandb", "project": "p"}]},
        {"engine": {"name": "vllm", "arguments": {"quantization": "fp8", "block_size": 16}}},
        {"defaults": ["star_arith", {"model": "tiny"}, {"override engine": "mine"}, {"launcher": None}, "_self_"]},
        {"preflight": "report", "seed": 3, "evaluate": {"num_samples": 4}, "model": {"path": "/m"}},
    ],
)
def test_what_a_recipe_may_say_is_valid(more: dict[str, Any], validator: Draft7Validator) -> None:
    validator.validate({**WRITTEN, **more})


@pytest.mark.parametrize(
    "mistake",
    [
        {"sed": 1},
        {"method": "sta"},
        {"method": {"name": "star", "ronds": 2}},
        {"method": {"name": "star", "rounds": 0}},
        {"method": {"name": "star", "rounds": "2"}},
        {"method": {"name": "star", "arm": "score"}},
        {"method": {"ronds": 2}},
        {"method": {"name": "star", "style": "fewshot"}},
        {"method": {"name": "star", "sft": {"lr": 0}}},
        {"method": {"name": "star", "sft": {"lora": {"rnk": 2}}}},
        {"launcher": {"name": "local", "devices": [0.5]}},
        {"models": {"Judge": "tiny"}},
        {"models": {"judge": {"endpoint": {"urls": "x"}}}},
        {"model": {"endpoint": {"model": "m"}}},
        {"trackers": ["wanb"]},
        {"evaluate": {"turns": 9}},
        {"defaults": [{"model": "tiny", "engine": "hf"}]},
    ],
)
def test_mistakes_are_marked(mistake: dict[str, Any], validator: Draft7Validator) -> None:
    assert not validator.is_valid({**WRITTEN, **mistake})


def test_a_group_shows_the_defaults_that_it_has_there() -> None:
    definitions = recipe_schema()["definitions"]
    rates = {
        name: definitions[f"method.{name}"]["properties"]["sft"]["properties"]["lr"]["default"]
        for name in ("star", "step_dpo", "self_rationalize")
    }
    assert rates == {"star": 1e-6, "step_dpo": 5e-6, "self_rationalize": 1e-5}


def test_every_property_says_what_it_means() -> None:
    def groups(schema: Any) -> list[dict[str, Any]]:
        below = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
        own = [schema] if isinstance(schema, dict) and schema.get("additionalProperties") is False else []
        return own + [group for part in below for group in groups(part)]

    found = groups(recipe_schema())
    assert len(found) > 40
    assert all("description" in info for group in found for info in group["properties"].values())


def test_types_are_words() -> None:
    words = {
        path: type_in_words(field.info)
        for kind in ("methods", "launchers", "engines")
        for name in plugins.names(kind)  # type: ignore[arg-type]
        for path, field in fields_of(plugins.find(kind, name).Settings, name)  # type: ignore[arg-type]
    }
    assert words["star.rounds"] == "whole number, at least 1"
    assert words["star.init_from"] == "base or previous"
    assert words["star.top_p"] == "number, above 0, at most 1"
    assert words["star.sft.lora"] == "group of fields or null"
    assert words["local.devices"] == "auto or cpu or list, each whole number or text"
    assert not [path for path, text in words.items() if "anything" in text]


def test_the_committed_copy_is_ascii() -> None:
    assert json.loads(COMMITTED.read_bytes().decode("ascii"))["$schema"].startswith("http://json-schema.org/draft-07")
