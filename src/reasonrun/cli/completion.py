"""What a shell offers at the tabulator: recipes, override keys with their choices, fields to explain.

A completion that fails offers nothing: a mistake in a recipe is for the command to report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from reasonrun.errors import ReasonrunError


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes and recipe files; after a comma, as ``sweep`` takes them, the next one."""
    from reasonrun.recipe_files import shipped

    before, comma, last = incomplete.rpartition(",")
    typed = Path(last)
    folder = typed if last.endswith("/") else typed.parent
    files = [str(path) + ("/" if path.is_dir() else "") for path in folder.glob("*") if _leads_on(path)]
    return [before + comma + name for name in [*shipped(), *sorted(files)] if name.startswith(last)]


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Keys of the recipe on the command line; behind ``key=``, the choices of a field that has them."""
    recipe = str(ctx.params.get("recipe") or ctx.params.get("recipes") or "").partition(",")[0]
    try:
        fields = _fields(recipe)
    except ReasonrunError:
        return []
    key, equals, value = incomplete.partition("=")
    groups = _groups()
    if equals:
        choices = groups.get(key) or _choices(fields.get(key))
        return [f"{key}={choice}" for choice in choices if choice.startswith(value)]
    return [f"{path}=" for path in [*groups, *fields] if path.startswith(key)]


def complete_key(incomplete: str) -> list[str]:
    """Fields that can be explained: sections first, then what is in the section that is typed."""
    from reasonrun.field_catalogue import section_fields, sections

    section, dot, _ = incomplete.partition(".")
    if not dot:
        return [name for name in sections() if name.startswith(section)]
    if section not in sections():
        return []
    return list(dict.fromkeys(f.path for f in section_fields(section) if f.path.startswith(incomplete)))


def _fields(recipe: str) -> dict[str, Any]:
    """Declarations of the recipe's fields by path, groups left out."""
    if not recipe:
        return {}
    from reasonrun.recipe import load
    from reasonrun.recipe_errors import models_in

    return {
        path: field.info for path, field in load(recipe).fields.items() if not any(models_in(field.info.annotation))
    }


def _groups() -> dict[str, list[str]]:
    """What ``engine=…``, ``model=…`` and the like can choose: files of groups, or plug-ins where there are none."""
    from reasonrun import plugins
    from reasonrun.recipe_files import recipes_dir
    from reasonrun.recipe_values import SECTIONS

    files = {section: sorted(path.stem for path in recipes_dir().glob(f"{section}/*.yaml")) for section in SECTIONS}
    kinds: dict[str, Any] = SECTIONS
    return {section: names or list(plugins.names(kinds[section])) for section, names in files.items()}


def _choices(info: Any) -> list[str]:
    from reasonrun.recipe_schema import value_schema

    if info is None:
        return []
    schema = value_schema(info)
    found: list[str] = []
    for option in schema.get("anyOf", [schema]):
        values = option.get("enum") or ([option["const"]] if "const" in option else [])
        values = [True, False] if option.get("type") == "boolean" else values
        found += [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    return found


def _leads_on(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_dir() or path.suffix in (".yaml", ".yml"))
