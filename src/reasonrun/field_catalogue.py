"""Every field that a recipe can have, in every plug-in that has it; for explaining, not for loading."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from reasonrun import plugins
from reasonrun.errors import RecipeError
from reasonrun.recipe_fields import ModelSettings, RecipeField, RoleModelSettings, fields_of, recipe_model
from reasonrun.recipe_files import recipes_dir
from reasonrun.recipe_values import SECTIONS
from reasonrun.settings import Settings

if TYPE_CHECKING:
    from reasonrun.recipe import ResolvedRecipe

ROLE = "ROLE"
_PLUGIN_KINDS: dict[str, Any] = {
    **{section: kind for section, kind in SECTIONS.items() if kind},
    "trackers": "trackers",
}
_NUM_GUESSES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogueField:
    """One field of one plug-in.

    ``plugin`` is empty for what every recipe has. ``paper`` cites the publication that states the default, or is empty.
    """

    path: str
    plugin: str
    field: RecipeField
    paper: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The value that a recipe gives to a field, and where: ``file:line``, the command line, or ``default``."""

    value: Any
    place: str


@cache
def section_fields(section: str) -> tuple[CatalogueField, ...]:
    """The fields of one section of a recipe. Those of further models have ``ROLE`` for the role."""
    if section in _PLUGIN_KINDS:
        kind = _PLUGIN_KINDS[section]
        return tuple(field for name in plugins.names(kind) for field in _of_plugin(section, kind, name))
    if section == "model":
        return _plain(ModelSettings, "model")
    if section == "models":
        return _plain(RoleModelSettings, f"models.{ROLE}")
    whole = fields_of(recipe_model({}, ()))
    return tuple(
        CatalogueField(path=path, plugin="", field=field)
        for path, field in whole
        if path == section or path.startswith(f"{section}.")
    )


def sections() -> tuple[str, ...]:
    """The top-level keys of a recipe, without ``defaults``."""
    return tuple(dict.fromkeys([*SECTIONS, *recipe_model({}, ()).model_fields]))


def group_of(key: str) -> tuple[str, Sequence[CatalogueField]] | None:
    """The section whose choices a key names (``engine``), or the one choice (``hf``, ``engine.hf``, ``models.judge``).

    Returns:
        Its path and its fields; None when the key names a field, or nothing.
    """
    wanted = _generic(key)
    if wanted in ("models", f"models.{ROLE}"):
        return f"models.{ROLE}", section_fields("models")
    if wanted in sections():
        fields = section_fields(wanted)
        return None if wanted in {field.path for field in fields} else (wanted, fields)
    everything = [field for section in sections() for field in section_fields(section)]
    if any(f".{field.path}".endswith(f".{wanted}") for field in everything):
        return None
    section, _, name = wanted.rpartition(".")
    found = [field for field in everything if field.plugin == name and field.path.startswith(f"{section}.".lstrip("."))]
    return (found[0].path.partition(".")[0], found) if found else None


def matching(key: str) -> list[CatalogueField]:
    """The fields that a key names: by their whole path, or by the end of it (``sft.lr``).

    Raises:
        RecipeError: nothing has that name; the nearest ones are in the message.
    """
    wanted = _generic(key)
    section = wanted.partition(".")[0]
    if section in sections():
        found = [field for field in section_fields(section) if field.path == wanted]
        if found:
            return found
    everything = [field for section in sections() for field in section_fields(section)]
    found = [field for field in everything if field.path.endswith(f".{wanted}")]
    if not found:
        raise RecipeError(
            f"no recipe has a field {key!r}{_nearest(wanted, everything)}",
            hint=f"sections are {', '.join(sections())}; reasonrun explain SECTION lists the fields of one",
        )
    return found


def origin(recipe: ResolvedRecipe, overrides: list[str], path: str) -> Origin | None:
    """What a recipe says about the field at ``path``; None when it has no such field."""
    from reasonrun.recipe_compose import compose  # with Hydra, which the catalogue itself does without
    from reasonrun.recipe_fit import choose_models

    keys = [int(part) if part.isdigit() else part for part in path.split(".")]
    value: Any = recipe.resolved
    for key in keys:
        if not _has(value, key):
            return None
        value = value[key]
    composition = compose(recipe.source_path, overrides, recipes_dir())
    choose_models(composition)
    given: Any = composition.data
    for key in keys:
        if not _has(given, key):
            return Origin(value=value, place="default")
        given = given[key]
    place = composition.place(tuple(keys))
    return Origin(value=value, place=":".join(str(place[part]) for part in ("file", "line") if place.get(part)))


def _has(data: Any, key: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(key, int) and key < len(data)
    return isinstance(data, dict) and key in data


def of_recipe(recipe: ResolvedRecipe, key: str) -> list[CatalogueField]:
    """The fields of ``recipe`` that a key names, those of classes of the user's own included.

    Raises:
        RecipeError: its parts have no such field; the nearest ones are in the message.
    """
    wanted = _generic(key)
    everything = [_in_recipe(recipe, path) for path in recipe.fields]
    found = [field for field in everything if _generic(field.path) == wanted]
    found = found or [field for field in everything if _generic(field.path).endswith(f".{wanted}")]
    if not found:
        sections_used = [section for section in _PLUGIN_KINDS if section != "trackers"]
        parts = ", ".join(f"{section} {recipe.resolved[section]['name']}" for section in sections_used)
        raise RecipeError(
            f"the recipe {recipe.name} has no field {key!r}{_nearest(wanted, everything)}",
            hint=f"it is made of {parts}; reasonrun explain {key} looks in all others, too",
        )
    return found


def _in_recipe(recipe: ResolvedRecipe, path: str) -> CatalogueField:
    section = path.partition(".")[0]
    if section not in _PLUGIN_KINDS or section == "trackers":
        return CatalogueField(path=path, plugin="", field=recipe.fields[path])
    field, cls = recipe.fields[path], recipe.classes[section]
    name = recipe.resolved[section]["name"]
    return CatalogueField(path=path, plugin=name, field=field, paper=_paper(cls, path))


def _of_plugin(section: str, kind: Any, name: str) -> Iterator[CatalogueField]:
    cls = plugins.find(kind, name)
    for path, field in fields_of(plugins.settings_class(kind, name, cls), section):
        yield CatalogueField(path=path, plugin=name, field=field, paper=_paper(cls, path))


def _paper(cls: Any, path: str) -> str:
    """The citation for a default: only methods have papers, and not all of their fields are in them."""
    inside = path.partition(".")[2]
    return getattr(cls, "paper", "") if inside in getattr(cls, "from_paper", "").split() else ""


def _plain(model: type[Settings], prefix: str) -> tuple[CatalogueField, ...]:
    return tuple(CatalogueField(path=path, plugin="", field=field) for path, field in fields_of(model, prefix))


def _generic(key: str) -> str:
    """``models.judge.path`` as ``models.ROLE.path``, ``trackers.0.project`` as ``trackers.project``."""
    parts = key.strip().split(".")
    if parts[0] == "models" and len(parts) > 1:
        parts[1] = ROLE
    return ".".join(part for part in parts if not (parts[0] == "trackers" and part.isdigit()))


def _nearest(wanted: str, everything: Iterable[CatalogueField]) -> str:
    guesses = _guesses(wanted, list(everything))
    return f"; nearest: {', '.join(guesses)}" if guesses else ""


def _guesses(wanted: str, everything: Sequence[CatalogueField]) -> list[str]:
    """Paths whose end is spelt nearly so, then those whose meaning has all words of the last key."""
    by_end: dict[str, list[str]] = {}
    for field in everything:
        parts = field.path.split(".")
        for start in range(len(parts)):
            by_end.setdefault(".".join(parts[start:]), []).append(field.path)
    close = difflib.get_close_matches(wanted, by_end, n=_NUM_GUESSES, cutoff=0.7)
    first, _, last = wanted.partition(".")
    inside = [f.path for f in everything if last and f.path.startswith(f"{first}.") and f.path.endswith(f".{last}")]
    found = [*inside, *(path for end in close for path in by_end[end])]
    words = [word for word in re.split(r"[^a-z]+", wanted.rpartition(".")[2].lower()) if len(word) > 2]
    meant = [f.path for f in everything if words and all(word in f.field.description.lower() for word in words)]
    return list(dict.fromkeys([*found, *meant]))[:_NUM_GUESSES]
