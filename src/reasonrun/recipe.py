"""Recipes: load one with its overrides, report every mistake at once, compare it with the one a run began with.

>>> recipe = load("smoke_star", ["method.rounds=2"])
>>> recipe.method.rounds, recipe.slug
(2, 'method.rounds=2')
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reasonrun import plugins
from reasonrun.errors import RecipeError
from reasonrun.recipe_compose import Composition, compose
from reasonrun.recipe_errors import Path as KeyPath
from reasonrun.recipe_errors import Problem, RecipeProblems, from_pydantic, nearest
from reasonrun.recipe_fields import (
    EvaluateSettings,
    ModelSettings,
    RecipeField,
    RoleModelSettings,
    fields_of,
    over_defaults,
    recipe_model,
)
from reasonrun.recipe_files import find_recipe, recipes_dir
from reasonrun.recipe_fit import check_pair, choose_models, construct, roles_of
from reasonrun.recipe_values import SECTIONS, expand_names, resolve, secrets, with_value, without
from reasonrun.records import digest
from reasonrun.settings import Effect, Settings

_DEFAULTS = {"model": "tiny", "engine": "hf", "launcher": "local"}
_MAX_SLUG = 60


@dataclass(frozen=True, kw_only=True)
class FieldChange:
    """A field that differs between two recipes. ``path`` is dotted; a change of a plug-in is told by its name alone."""

    path: str
    old: Any
    new: Any
    effect: Effect


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A valid recipe. ``classes`` holds the plug-in classes by section, those of ``trackers`` as a tuple; ``models`` has
    a field for each role, read with ``further_models``.

    ``resolved`` is the whole recipe as JSON, defaults included; a value from the environment stands there as the
    expression that reads it. ``fields`` describes every field by dotted path.
    """

    name: str
    slug: str
    source_path: Path
    method: Any
    task: Any
    model: ModelSettings
    models: Settings
    engine: Any
    launcher: Any
    trackers: tuple[Any, ...]
    preflight: str
    seed: int
    evaluate: EvaluateSettings
    classes: Mapping[str, Any]
    resolved: dict[str, Any]
    fields: Mapping[str, RecipeField]

    @property
    def effects(self) -> dict[str, Effect]:
        """What changing each field under a run means, by dotted path."""
        return {path: field.effect for path, field in self.fields.items()}

    @property
    def further_models(self) -> dict[str, RoleModelSettings]:
        """The models besides the policy, by role."""
        return {role: getattr(self.models, role) for role in type(self.models).model_fields}


def load(recipe: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> ResolvedRecipe:
    """Compose, validate and resolve a recipe.

    Args:
        recipe: a file, or the name of a shipped recipe.
        overrides: ``key=value`` texts; ``engine=scripted`` chooses a group file.

    Raises:
        RecipeProblems: all mistakes, with their places.
        RecipeError: there is no such recipe.
    """
    path = find_recipe(recipe)
    composition = compose(path, list(overrides), recipes_dir())
    if not composition.data:
        raise RecipeProblems(composition.problems)
    choose_models(composition)
    for key_path in secrets(composition.data):
        composition.report(key_path, "this looks like a secret; put it into the environment: ${oc.env:NAME}")
    data, from_environment = resolve(composition.data, composition.report)
    for key_path in [path for path in from_environment if path[-1] == "name"]:
        composition.report(key_path, "a plug-in's name cannot come from the environment")
        data = without(data, {key_path})
    data = {**{section: {"name": name} for section, name in _DEFAULTS.items()}, **expand_names(data)}
    roles = roles_of(composition, data)
    classes, settings = _sections(composition, data)
    trackers = _trackers(composition, data)
    model = recipe_model(settings, None if trackers is None else [own for _, own in trackers], roles)
    fields = dict(fields_of(model))
    data = over_defaults(model, data)
    _check_environment(composition, from_environment, fields)
    valid = _validate(composition, model, data, from_environment)
    check_pair(composition, classes, data)
    if valid is not None and not composition.problems:
        construct(composition, classes, valid, roles)
    if composition.problems:
        raise RecipeProblems(composition.problems)
    resolved = valid.model_dump(mode="json")
    for key_path, expression in from_environment.items():
        resolved = with_value(resolved, key_path, expression)
    return ResolvedRecipe(
        name=path.stem,
        slug=_slug(composition, fields),
        source_path=path,
        classes={**classes, "trackers": tuple(cls for cls, _ in trackers or ())},
        resolved=resolved,
        fields=fields,
        **{name: getattr(valid, name) for name in type(valid).model_fields},
    )


def diff(old: Mapping[str, Any], new: ResolvedRecipe) -> list[FieldChange]:
    """The fields in which ``new`` differs from a stored ``resolved`` recipe, sorted by path.

    A field that the stored recipe does not know yet counts as changed only if it has left its default.
    """
    return sorted(_changes(old, new.resolved, (), new.fields), key=lambda change: change.path)


def _changes(old: Any, new: Any, path: tuple[str, ...], fields: Mapping[str, RecipeField]) -> list[FieldChange]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = ["name"] if old.get("name") != new.get("name") else sorted({*old, *new})
        changes = []
        for key in keys:
            known = fields.get(".".join((*path, key)))
            before = old[key] if key in old or known is None else known.default
            changes += _changes(before, new.get(key), (*path, key), fields)
        return changes
    if old == new:
        return []
    dotted = ".".join(path)
    known = next((fields[".".join(path[:n])] for n in range(len(path), 0, -1) if ".".join(path[:n]) in fields), None)
    return [FieldChange(path=dotted, old=old, new=new, effect=known.effect if known else Effect.SEMANTIC)]


def _sections(
    composition: Composition, data: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, type[Settings] | None]]:
    """Plug-in class and settings class of each section; what cannot be found is reported and accepts anything."""
    classes: dict[str, Any] = {}
    settings: dict[str, type[Settings] | None] = {"model": ModelSettings}
    for section, kind in SECTIONS.items():
        if kind:
            classes[section], settings[section] = _plugin(composition, (section,), kind, data.get(section))
            data.setdefault(section, {})
    return classes, settings


def _trackers(composition: Composition, data: dict[str, Any]) -> list[tuple[Any, type[Settings] | None]] | None:
    given = data.get("trackers", [])
    if not isinstance(given, list):
        return None
    return [_plugin(composition, ("trackers", n), "trackers", item) for n, item in enumerate(given)]


def _plugin(composition: Composition, path: KeyPath, kind: Any, given: Any) -> tuple[Any, type[Settings] | None]:
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not name:
        if not _reported(composition, (*path, "name")) and not _reported(composition, path):
            singular = kind.removesuffix("s")
            misspelt = nearest("name", given) if isinstance(given, Mapping) else ""
            if misspelt and "name" not in given:
                composition.report((*path, misspelt), f"unknown key, and no {singular} is named", nearest="name")
                return None, None
            what = "required key is missing" if given is None else f"names no {singular}"
            composition.report(path, f"{what}; write `{path[0]}: {{name: …}}`", allowed=plugins.names(kind))
        return None, None
    at_name = (*path, "name")
    try:
        cls = plugins.find(kind, name)
        return cls, plugins.settings_class(kind, name, cls)
    except plugins.UnknownPlugin as error:
        composition.report(at_name, error.reason, allowed=error.allowed, nearest=error.nearest)
    except RecipeError as error:
        composition.report(at_name, f"{error.message} ({error.hint})" if error.hint else error.message)
    return None, None


def _reported(composition: Composition, path: KeyPath) -> bool:
    return any(problem.path == ".".join(str(part) for part in path) for problem in composition.problems)


def _validate(
    composition: Composition, model: type[Settings], data: dict[str, Any], from_environment: Mapping[KeyPath, str]
) -> Any:
    """The validated recipe, or None after reporting. As JSON, because only there strict means no conversions."""
    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = from_pydantic(
            error.errors(include_url=False, include_context=True), model, data, composition.place, from_environment
        )
        known = {problem.path for problem in composition.problems}
        composition.problems += [_with_owners(problem) for problem in found if problem.path not in known]
        return None


def _with_owners(problem: Problem) -> Problem:
    """An unknown key of a plug-in with the other plug-ins that have it: often only the name above it is another."""
    section, _, inside = problem.path.partition(".")
    kind: Any = SECTIONS.get(section)
    if problem.message != "unknown key" or not kind or not inside:
        return problem
    settings = {name: plugins.settings_class(kind, name, plugins.find(kind, name)) for name in plugins.names(kind)}
    owners = [name for name, cls in settings.items() if problem.path in dict(fields_of(cls, section))]
    also = f"; it is a field of {', '.join(owners)}" if owners else ""
    return replace(problem, message=problem.message + also)


def _check_environment(
    composition: Composition, from_environment: Mapping[KeyPath, str], fields: Mapping[str, RecipeField]
) -> None:
    for path in from_environment:
        field = fields.get(".".join(str(part) for part in path))
        if field and field.effect in (Effect.SEMANTIC, Effect.HORIZON):
            message = "part of the experiment, so it cannot come from the environment; pass it on the command line"
            composition.report(path, message)


def _slug(composition: Composition, fields: Mapping[str, RecipeField]) -> str:
    """Names a variant by its overrides, ``method.rounds=2,seed=1``, in any order of the command line.

    Overrides that leave the experiment as it is are not in it, so that they continue the same run.
    """
    texts: dict[str, str] = {}
    for override in composition.overrides:
        dotted = ".".join(str(part) for part in override.key)
        field = fields.get(dotted)
        if override.group:
            field = fields.get(f"{dotted}.name")
        if field is None or field.effect in (Effect.SEMANTIC, Effect.HORIZON):
            value = override.value if isinstance(override.value, str) else json.dumps(override.value, sort_keys=True)
            texts[dotted] = value
    whole = ",".join(f"{key}={value}" for key, value in sorted(texts.items()))
    safe = re.sub(r"[^\w.+=,-]+", "_", whole, flags=re.ASCII)
    if safe == whole and len(whole) <= _MAX_SLUG:
        return whole
    return f"{safe[: _MAX_SLUG - 9]}-{digest(whole)[:8]}"
