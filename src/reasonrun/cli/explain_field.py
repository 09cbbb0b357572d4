"""``reasonrun explain`` of a field: what it takes, its default, its effect, and its value in a recipe."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reasonrun.cli.main import echo, print_json
from reasonrun.field_catalogue import (
    CatalogueField,
    Origin,
    group_of,
    matching,
    of_recipe,
    origin,
)
from reasonrun.recipe_errors import models_in
from reasonrun.recipe_schema import type_in_words, value_schema
from reasonrun.settings import WHEN_CHANGED, Settings

_WIDTH = 110


def explain_field(key: str, overrides: list[str], recipe: str | None, *, as_json: bool) -> None:
    """Print what there is to say of the fields that ``key`` names, in all plug-ins or in ``recipe``.

    Raises:
        RecipeError: there is no such field, or the recipe has mistakes.
    """
    group = group_of(key) if recipe is None else None
    if group is not None:
        _list_group(key, *group, as_json=as_json)
        return
    if recipe is None:
        shown: list[tuple[CatalogueField, Origin | None]] = [(field, None) for field in matching(key)]
    else:
        shown = _in_recipe(key, overrides, recipe)
    if as_json:
        print_json({"key": key, "recipe": recipe, "fields": [_document(field, value) for field, value in shown]})
        return
    for fields, value in _alike(shown):
        for line in [*_text(fields, value, recipe), ""]:
            echo(line)
    echo("Changed under a run that has begun:")
    for effect in dict.fromkeys(known.field.effect for known, _ in shown):
        for line in _wrapped(f"{effect}: {WHEN_CHANGED[effect]}", "  "):
            echo(line)


def _in_recipe(key: str, overrides: list[str], recipe: str) -> list[tuple[CatalogueField, Origin | None]]:
    from reasonrun.recipe import load  # with Hydra, which nobody waits for who names no recipe

    resolved = load(recipe, overrides)
    return [(field, origin(resolved, overrides, field.path)) for field in of_recipe(resolved, key)]


def _list_group(key: str, path: str, fields: Sequence[CatalogueField], *, as_json: bool) -> None:
    """A section that is chosen by name, or one choice: the fields of each."""
    by_plugin: dict[str, list[str]] = {}
    for field in fields:
        by_plugin.setdefault(field.plugin, []).append(field.path)
    if as_json:
        print_json({"key": key, "choices": by_plugin})
        return
    for plugin, paths in by_plugin.items():
        names = [name for inner in paths if "." not in (name := inner.removeprefix(f"{path}."))]
        echo(f"{path}: {plugin}" if plugin else path)
        for line in _wrapped(", ".join(name for name in names if not plugin or name != "name") or "no fields", "  "):
            echo(line)


def _document(known: CatalogueField, value: Origin | None) -> dict[str, Any]:
    field = known.field
    document: dict[str, Any] = {
        "path": known.path,
        "of": known.plugin,
        "description": field.description,
        "type": type_in_words(field.info),
        "schema": value_schema(field.info),
        "required": field.info.is_required(),
        "default": _plain(field.default),
        "paper": known.paper,
        "effect": field.effect.value,
        "when_changed": WHEN_CHANGED[field.effect],
    }
    if value is not None:
        document |= {"value": value.value, "from": value.place}
    return document


def _alike(
    shown: Iterable[tuple[CatalogueField, Origin | None]],
) -> Iterator[tuple[list[CatalogueField], Origin | None]]:
    """Fields that differ in nothing but their plug-in are explained together."""
    groups: dict[str, tuple[list[CatalogueField], Origin | None]] = {}
    for known, value in shown:
        document = {**_document(known, value), "of": ""}
        groups.setdefault(json.dumps(document, sort_keys=True), ([], value))[0].append(known)
    yield from groups.values()


def _text(alike: list[CatalogueField], value: Origin | None, recipe: str | None) -> Iterator[str]:
    known, field = alike[0], alike[0].field
    of = ", ".join(each.plugin for each in alike if each.plugin)
    yield f"{known.path} of {of}" if of else known.path
    yield from _wrapped(field.description or f"Which {known.path.partition('.')[0]}.", "  ")
    yield from _wrapped(type_in_words(field.info), "  takes    ")
    yield from _wrapped(_default_in_words(known), "  default  ")
    yield f"  changed  {field.effect}"
    for group in models_in(field.info.annotation):
        yield from _wrapped(", ".join(group.model_fields), "  fields   ")
    if value is not None:
        yield from _wrapped(f"{json.dumps(value.value)}, from {value.place}", f"  in {recipe}  ")


def _default_in_words(known: CatalogueField) -> str:
    field = known.field
    if field.info.is_required():
        return "none: it must be given"
    plain = _plain(field.default)
    if isinstance(plain, dict) and field.stated_keys:
        stated = {key: item for key, item in plain.items() if key in field.stated_keys}
        return f"{', '.join(f'{key}: {json.dumps(item)}' for key, item in stated.items())}; else the fields' own"
    written = "the fields' own" if isinstance(plain, dict) and plain else json.dumps(plain)
    return f"{written}, the paper's ({known.paper})" if known.paper else written


def _plain(default: Any) -> Any:
    return default.model_dump(mode="json") if isinstance(default, Settings) else default


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )
