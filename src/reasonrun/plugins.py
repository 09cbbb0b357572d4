"""Finding plug-ins: methods, tasks, engines, trainers, launchers, trackers, by name or by dotted path.

``star`` is the one plug-in class of ``reasonrun.methods.star``; ``my_package.my_module.MyMethod`` is a class of the
user's own, importable from the current folder too. Built-ins are listed from their source text, so that listing
imports nothing.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import Field, create_model

from reasonrun.contracts import Method, Task
from reasonrun.errors import RecipeError
from reasonrun.recipe_errors import nearest
from reasonrun.settings import Effect, Settings, setting

Kind = Literal["methods", "tasks", "engines", "trainers", "launchers", "trackers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_CONTRACTS: dict[str, type] = {"methods": Method, "tasks": Task}
_DECLARES_SETTINGS = re.compile(r"^    (class Settings\b|Settings\b *[:=])", re.MULTILINE)


class UnknownPlugin(RecipeError):
    """No plug-in has that name. ``allowed`` lists the built-ins, ``nearest`` is the likeliest of them or empty."""

    def __init__(self, message: str, *, allowed: tuple[str, ...] = (), nearest: str = "") -> None:
        known = f"; built in: {', '.join(allowed)}" if allowed else ""
        guess = f"; nearest is {nearest}" if nearest else ""
        super().__init__(message + guess + known, hint="a class of your own is named by its dotted path: module.Class")
        self.reason, self.allowed, self.nearest = message, allowed, nearest


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """The built-in plug-ins of a kind, sorted, without importing them.

    Raises:
        RecipeError: there is no such kind.
    """
    if kind not in KINDS:
        raise RecipeError(f"there is no kind of plug-in {kind!r}; the kinds are {', '.join(KINDS)}")
    folder = Path(__file__).parent / kind
    return tuple(
        path.stem
        for path in sorted(folder.glob("[!_]*.py"))
        if _DECLARES_SETTINGS.search(path.read_text(encoding="utf-8"))
    )


def find(kind: Kind, name: str) -> type[Any]:
    """The class of a plug-in.

    Args:
        kind: methods, tasks, engines, trainers, launchers or trackers.
        name: the module of a built-in, or ``package.module.Class``; the current folder is searched last.

    Raises:
        UnknownPlugin: nothing has that name; carries the nearest name and the built-ins.
        RecipeError: the module cannot be imported, or its class is no plug-in of this kind.
    """
    builtins = names(kind)
    if name in builtins:
        return _only_plugin(kind, importlib.import_module(f"reasonrun.{kind}.{name}"))
    if "." not in name:
        singular = kind.removesuffix("s")
        raise UnknownPlugin(f"unknown {singular} {name!r}", allowed=builtins, nearest=nearest(name, builtins))
    if "/" in name or name.endswith(".py"):
        meant = f"{Path(name).stem}.{kind.removesuffix('s').capitalize()}"
        raise UnknownPlugin(
            f"{name!r} is a file; name the class in it by its dotted path, such as {meant}", allowed=builtins
        )
    module_name, _, class_name = name.rpartition(".")
    module = _import(kind, name, module_name)
    cls = getattr(module, class_name, None)
    offered = tuple(sorted(c.__name__ for c in _plugins(kind, module)))
    if cls is None:
        guess = nearest(class_name, offered) if offered else ""
        raise UnknownPlugin(f"{module.__file__} has no class {class_name!r}", allowed=offered, nearest=guess)
    if not _is_plugin(kind, cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        lacks = f": it lacks {missing}" if missing else ""
        raise RecipeError(f"{name} is no plug-in of kind {kind}{lacks}", hint=_wanted(kind))
    return cls  # type: ignore[no-any-return]


def settings_class(kind: Kind, name: str, cls: type[Any]) -> type[Settings]:
    """The settings of a plug-in, with a field ``name`` that holds what the recipe calls it.

    A class of the user's own need not declare ``name``: it is added. An engine must, because its worker reads the
    settings back with the class's own ``Settings``.

    Raises:
        RecipeError: an engine's settings cannot hold ``name``.
    """
    base: type[Settings] = cls.Settings
    field = base.model_fields.get("name")
    if field is not None and (field.annotation is str or name in get_args(field.annotation)):
        return base
    if kind == "engines":
        raise RecipeError(f"{name}: its Settings cannot hold this name", hint="declare `name: str` in its Settings")
    named = {"name": (Literal[name], setting(name, Effect.SEMANTIC, "Which plug-in."))}
    return create_model(base.__name__, __base__=base, __module__=base.__module__, **named)  # type: ignore[call-overload, no-any-return]


def union(kind: Kind) -> Any:
    """The settings of all built-ins of a kind as one type, discriminated by ``name``; for JSON schemas."""
    classes = tuple(settings_class(kind, name, find(kind, name)) for name in names(kind))
    if len(classes) == 1:
        return classes[0]
    return Annotated[Union[classes], Field(discriminator="name")]  # noqa: UP007 - built from a tuple


def _import(kind: Kind, name: str, module_name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a file of the user's never hides an installed package
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            builtins = names(kind)
            raise UnknownPlugin(
                f"{name}: there is no module {error.name} in {here} or among the installed packages",
                allowed=builtins,
                nearest=nearest(name.rpartition(".")[2].lower(), builtins),
            ) from None
        raise RecipeError(f"{name}: importing {module_name} failed: {error}", hint=_HINT_IMPORT) from None
    except SyntaxError as error:
        raise RecipeError(f"{name}: {error.filename}:{error.lineno}: {error.msg}", hint="correct the module") from None
    except Exception as error:  # plug-in boundary: a module's top level may raise anything
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f"{last.filename}:{last.lineno}: {type(error).__name__}: {error}"
        raise RecipeError(f"{name}: importing {module_name} failed at {where}", hint=_HINT_IMPORT) from error


_HINT_IMPORT = "install what is missing, or correct the module"


def _only_plugin(kind: Kind, module: ModuleType) -> type[Any]:
    found = _plugins(kind, module)
    if len(found) != 1:
        listed = ", ".join(cls.__name__ for cls in found) or "none"
        raise RecipeError(f"{module.__name__} must have exactly one plug-in class; found: {listed}", hint=_wanted(kind))
    return found[0]


def _plugins(kind: Kind, module: ModuleType) -> list[type[Any]]:
    own = [cls for cls in vars(module).values() if getattr(cls, "__module__", "") == module.__name__]
    return [cls for cls in own if isinstance(cls, type) and not cls.__name__.startswith("_") and _is_plugin(kind, cls)]


def _is_plugin(kind: Kind, cls: Any) -> bool:
    settings = getattr(cls, "Settings", None)
    if not isinstance(cls, type) or not isinstance(settings, type) or not issubclass(settings, Settings):
        return False
    return issubclass(cls, _CONTRACTS.get(kind, object)) and not getattr(cls, "__abstractmethods__", None)


def _wanted(kind: Kind) -> str:
    contract = _CONTRACTS.get(kind)
    subclass = f"a complete subclass of reasonrun.contracts.{contract.__name__}" if contract else "a class"
    return f"a plug-in of kind {kind} is {subclass} with a nested `class Settings(reasonrun.settings.Settings)`"
