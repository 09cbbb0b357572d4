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
        fields = _fields(recipe) if recipe else _fields_of_task(str(ctx.params.get("task") or ""))
    except ReasonrunError:
        return []
    key, equals, value = incomplete.partition("=")
    groups = _groups()
    if equals:
        choices = groups.get(key) or _choices(fields.get(key))
        return [f"{key}={choice}" for choice in choices if choice.startswith(value)]
    return [f"{path}=" for path in [*groups, *fields] if path.startswith(key)]


def complete_key(incomplete: str) -> list[str]:
    """What can be explained: sections, plug-ins, the fields of the one section that is typed, and ends of fields."""
    from reasonrun.field_catalogue import section_fields, sections

    section, dot, _ = incomplete.partition(".")
    known = [name for name in sections() if name.startswith(section)]
    inside = known[0] if len(known) == 1 else section
    if inside in sections():  # beside the section, or a shell would end the word there
        paths = [f.path for f in section_fields(inside) if f.path.startswith(incomplete)]
        return list(dict.fromkeys([*(known if not dot else ()), *paths]))
    everything = [field for name in sections() for field in section_fields(name)]
    if not dot:
        return list(
            dict.fromkeys([*known, *(f.plugin for f in everything if f.plugin and f.plugin.startswith(section))])
        )
    ends = [f.path.find(f".{incomplete}") + 1 for f in everything]
    return list(dict.fromkeys(f.path[end:] for f, end in zip(everything, ends, strict=True) if end))


def complete_task(incomplete: str) -> list[str]:
    """The tasks that come with the package."""
    from reasonrun import plugins

    return [name for name in plugins.names("tasks") if name.startswith(incomplete)]


def _fields(recipe: str) -> dict[str, Any]:
    """Declarations of the recipe's fields by path, groups left out."""
    if not recipe:
        return {}
    from reasonrun.recipe import load
    from reasonrun.recipe_errors import models_in

    return {
        path: field.info for path, field in load(recipe).fields.items() if not any(models_in(field.info.annotation))
    }


def _fields_of_task(task: str) -> dict[str, Any]:
    """What an evaluation of ``task`` can be told; not by loading its recipe, which may need a file first."""
    from reasonrun.field_catalogue import section_fields

    sections = ("task", "evaluate") if task else ()
    return {f.path: f.field.info for name in sections for f in section_fields(name) if f.plugin in ("", task)}


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
