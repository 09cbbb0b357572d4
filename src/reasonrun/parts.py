"""Classes and functions that cross to another process: by dotted path, with their settings. And records, as JSON lines."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from reasonrun.errors import EnvironmentProblem, RecipeError
from reasonrun.records import Record
from reasonrun.training import Part

R = TypeVar("R", bound=Record)


def part(thing: Callable[..., Any] | type, settings: BaseModel) -> Part:
    """What lets another process find ``thing`` and its settings.

    Raises:
        RecipeError: it is a lambda, a closure or a bound method, which no other process can name.
    """
    name = getattr(thing, "__qualname__", "")
    if not name or "<" in name or hasattr(thing, "__self__"):
        raise RecipeError(
            f"{thing!r} cannot be named across processes", hint="pass a function that stands at the top of a module"
        )
    return Part(
        path=f"{thing.__module__}:{name}",
        settings_path=f"{type(settings).__module__}:{type(settings).__qualname__}",
        settings=settings.model_dump(mode="json"),
    )


def plugin_part(cls: type[Any], settings: BaseModel) -> Part:
    """The same for a plug-in, whose settings may have got a field ``name`` that its own class does not declare."""
    path = f"{cls.__module__}:{cls.__qualname__}"
    own = {key: value for key, value in settings.model_dump(mode="json").items() if key in cls.Settings.model_fields}
    return Part(path=path, settings_path=f"{path}.Settings", settings=own)


def load_part(spec: Part) -> tuple[Any, Any]:
    """The class or function, and its settings."""
    return _find(spec.path), _find(spec.settings_path).model_validate(spec.settings)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One JSON line each."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(record.model_dump_json() + "\n" for record in records)


def read_records(path: Path, record_type: type[R]) -> list[R]:
    """What ``write_records`` wrote, in order."""
    with path.open(encoding="utf-8") as lines:
        return [record_type.model_validate_json(line) for line in lines]


def _find(path: str) -> Any:
    """Raises EnvironmentProblem when this interpreter cannot import it: a worker may have another one."""
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for attribute in name.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise EnvironmentProblem(
            f"the interpreter {sys.executable} cannot load {path}: {error}",
            hint="install what is missing there, or name another interpreter with launcher.python",
        ) from error
    return found
