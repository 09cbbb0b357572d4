"""The values of a recipe between YAML and pydantic: shorthands, references, credentials.

A value may refer to another one with ``${task.seed}``, or to an environment variable with ``${oc.env:NAME}`` or
``${oc.env:NAME,default}``. Nothing else is evaluated: a clock or a program would make another experiment of every run.
What comes from the environment is remembered by path, so that it never reaches the stored recipe or a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from reasonrun.recipe_errors import Path, looks_secret

SECTIONS = {
    "method": "methods",
    "task": "tasks",
    "engine": "engines",
    "launcher": "launchers",
    "model": "",
}
"""Groups that a word stands for (``method: star``), with their kind of plug-in; a model is no plug-in."""

_ENVIRONMENT = r"oc\.env:(?P<variable>[A-Za-z_]\w*)(?:,(?P<default>[^${}]*))?"
_REFERENCE = re.compile(rf"(?<!\\)\$\{{\s*(?:{_ENVIRONMENT}|(?P<key>[A-Za-z_][\w-]*(?:\.[\w-]+)*))\s*\}}")
NOT_TEXT = re.compile("[\ud800-\udfff]")
"""Halves of UTF-16 pairs, which no UTF-8 file can hold."""
_HELP = "${section.key} and ${oc.env:NAME} are understood"


def expand_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """``method: star`` as ``method: {name: star}``, and the same for each tracker and each further model."""
    expanded = dict(data)
    for section in SECTIONS:
        if isinstance(expanded.get(section), str) and not expanded[section].startswith("${"):
            expanded[section] = {"name": expanded[section]}
    if isinstance(expanded.get("models"), Mapping):
        expanded["models"] = {
            role: {"name": item} if isinstance(item, str) and not item.startswith("${") else item
            for role, item in expanded["models"].items()
        }
    if isinstance(expanded.get("trackers"), list):
        expanded["trackers"] = [{"name": item} if isinstance(item, str) else item for item in expanded["trackers"]]
    return expanded


def leaves(data: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that is no group and no list, with its path."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from leaves(value, (*path, number))
    else:
        yield path, data


def without(data: Any, paths: Collection[Path], here: Path = ()) -> Any:
    """A copy of ``data`` in which the values at ``paths`` are gone from groups and null in lists."""
    if isinstance(data, Mapping):
        kept = {key: value for key, value in data.items() if (*here, key) not in paths}
        return {key: without(value, paths, (*here, key)) for key, value in kept.items()}
    if isinstance(data, list):
        items = [(None if (*here, number) in paths else item) for number, item in enumerate(data)]
        return [without(item, paths, (*here, number)) for number, item in enumerate(items)]
    return data


def bad_interpolations(data: Any) -> list[tuple[Path, str]]:
    """Values with a ``${`` that is neither a reference nor escaped, each with what to say about it."""
    return [
        (path, f"unknown interpolation {text!r}; {_HELP}, a backslash before ${{ keeps it as text")
        for path, text in leaves(data)
        if isinstance(text, str) and "${" in _REFERENCE.sub("", text).replace(r"\${", "")
    ]


def secrets(data: Any) -> Iterator[Path]:
    """Paths of literals that look like credentials."""
    for path, value in leaves(data):
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        if isinstance(value, str) and not _REFERENCE.search(value) and looks_secret(key, value):
            yield path


def resolve(data: dict[str, Any], report: Callable[[Path, str], None]) -> tuple[dict[str, Any], dict[Path, str]]:
    """Replace references by what they name.

    Args:
        data: the composed values.
        report: takes the path and the message of each reference that names nothing.

    Returns:
        The values, and the expressions by path where the environment had a part in the value.
    """
    from_environment: dict[Path, str] = {}
    resolved: Any = data
    for path, text in leaves(data):
        try:
            value, from_env = _value_of(data, text, (path,))
        except LookupError as error:
            report(path, str(error.args[0]))
            resolved = without(resolved, {path})
            continue
        if from_env:
            from_environment[path] = text
        if value is not text:
            resolved = with_value(resolved, path, value)
    return resolved, from_environment


def _value_of(data: Any, text: Any, via: tuple[Path, ...]) -> tuple[Any, bool]:
    """What a value stands for, and whether the environment had a part in it. ``via`` are the paths that led here."""
    if not isinstance(text, str) or "${" not in text:
        return text, False
    whole = _REFERENCE.fullmatch(text)
    if whole:
        return _named(data, whole, via)
    found = [_named(data, match, via) for match in _REFERENCE.finditer(text)]
    values = iter([str(value) for value, _ in found])
    return _REFERENCE.sub(lambda _: next(values), text).replace(r"\${", "${"), any(from_env for _, from_env in found)


def _named(data: Any, match: re.Match[str], via: tuple[Path, ...]) -> tuple[Any, bool]:
    variable = match["variable"]
    if variable:
        value = os.environ.get(variable, match["default"])
        if value is None:
            raise LookupError(f"the environment has no variable {variable}; set it, or write a default")
        if NOT_TEXT.search(value):
            raise LookupError(f"the environment variable {variable} is not UTF-8 text")
        return value, True
    target = tuple(match["key"].split("."))
    if target in via:
        raise LookupError(f"{match[0]} refers to itself")
    value = _at(data, target)
    if isinstance(value, dict | list):
        raise LookupError(f"{match[0]} names a group or a list; refer to one value")
    return _value_of(data, value, (*via, target))


def _at(data: Any, path: Path) -> Any:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            raise LookupError(f"${{{'.'.join(map(str, path))}}} names nothing that this recipe sets")
        data = data[part]
    return data


def with_value(data: Any, path: Path, value: Any) -> Any:
    """A copy of ``data`` with ``value`` at ``path``; a path that ``data`` lacks changes nothing."""
    if not path:
        return value
    if isinstance(data, Mapping) and path[0] in data:
        return {**data, path[0]: with_value(data[path[0]], path[1:], value)}
    if isinstance(data, list) and isinstance(path[0], int) and path[0] < len(data):
        return [with_value(item, path[1:], value) if n == path[0] else item for n, item in enumerate(data)]
    return data
