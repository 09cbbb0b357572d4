"""From a recipe file, its group files and the command line to one tree of values. The home of Hydra.

Hydra stops at the first mistake and says no position. So the files are read and checked here first
(``recipe_source``), what is wrong is reported and left out, and Hydra composes the rest from memory. Overrides are
handed on as ``++key=value``, so that unknown keys reach pydantic, all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reasonrun.recipe_errors import COMMAND_LINE, Problem, meant_model, nearest
from reasonrun.recipe_errors import Path as KeyPath
from reasonrun.recipe_source import Source, read
from reasonrun.recipe_values import NOT_TEXT, SECTIONS, bad_interpolations, expand_names, without

_ROOT = "__recipe__"
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_DEFAULTS_HELP = "write `- model: tiny`, the name of a parent recipe, or `- _self_`"


@dataclass(frozen=True, kw_only=True)
class Override:
    """One ``key=value`` of the command line. ``group`` when it chooses a group file instead of setting a value."""

    text: str
    key: KeyPath
    value: Any
    for_hydra: tuple[str, ...]
    group: bool = False

    @property
    def place(self) -> str:
        return f"{COMMAND_LINE}: {self.text}"


@dataclass(kw_only=True)
class Composition:
    """The composed values, and what is known about where each came from. ``sources`` are in merge order."""

    data: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: KeyPath, at_key: bool = False) -> dict[str, Any]:
        """The ``file``, ``line``, ``column`` and ``source_line`` of a Problem about ``path``."""
        for override in reversed(self.overrides):
            if not override.group and path[: len(override.key)] == override.key:
                return {"file": override.place}
        best, depth, node = self.sources[-1], 0, None
        for source in self.sources:
            found, key, value = source.locate(path)
            if found >= max(depth, 1):
                best, depth = source, found
                is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style  # begins on another line
                is_shorthand = isinstance(value, yaml.ScalarNode) and path[found:] == ("name",)
                node = value if is_shorthand or (found == len(path) and not at_key and not is_block) else key
        if path and depth < len(path):  # in no file: a key that only the command line goes through
            for override in self.overrides:
                if override.key[: len(path)] == path:
                    return {"file": override.place}
        return best.place(node)

    def report(self, path: KeyPath, message: str, **more: Any) -> None:
        """Add a problem about the value at ``path``."""
        dotted = ".".join(str(part) for part in path)
        self.problems.append(Problem(path=dotted, message=message, **self.place(path), **more))


@dataclass(kw_only=True)
class _Files:
    """The recipe, its parents and group files, gathered in Hydra's merge order."""

    folders: tuple[Path, ...]
    picks: dict[str, str] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    stored: dict[tuple[str | None, str], dict[str, Any]] = field(default_factory=dict)
    groups_used: set[str] = field(default_factory=set)
    open: list[Path] = field(default_factory=list)

    def groups(self) -> tuple[str, ...]:
        """Folders of group files."""
        return tuple(sorted({path.parent.name for folder in self.folders for path in folder.glob("*/*.yaml")}))

    def choices(self, group: str) -> tuple[str, ...]:
        return tuple(sorted({path.stem for folder in self.folders for path in folder.glob(f"{group}/*.yaml")}))

    def add_recipe(self, path: Path, stored_as: str) -> Source:
        """Read a recipe with all that its defaults list names; the recipe stands where ``_self_`` does, or last."""
        source = read(path)
        self.open.append(path)
        entries: list[Any] = []
        nodes = source.defaults()
        for node in nodes:
            if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
                self._prefer_override(node)
        for number, node in enumerate(nodes):
            if isinstance(node, yaml.ScalarNode) and node.value == "_self_":
                self.sources.append(source)
                entries.append("_self_")
            else:
                entries += self._entry(source, node, number)
        if "_self_" not in entries:
            self.sources.append(source)
            entries.append("_self_")
        self.stored[None, stored_as] = {"defaults": entries, **expand_names(_usable(source))}
        self.open.pop()
        return source

    def _prefer_override(self, node: yaml.MappingNode) -> None:
        (key, value) = node.value[0]
        words = str(key.value).split()
        if len(words) == 2 and words[0] == "override" and value.value in self.choices(words[1]):
            self.picks.setdefault(words[1], value.value)

    def _entry(self, source: Source, node: yaml.Node, number: int) -> list[Any]:
        dotted = f"defaults.{number}"
        if isinstance(node, yaml.ScalarNode):
            return self._parent(source, node, dotted)
        if not isinstance(node, yaml.MappingNode) or len(node.value) != 1:
            source.report(node, dotted, f"not understood; {_DEFAULTS_HELP}")
            return []
        key, value = node.value[0]
        words = str(key.value).lstrip("/").split()
        group, choices = words[-1] if words else "", self.choices(words[-1] if words else "")
        if not choices:
            guess = nearest(group, self.groups())
            source.report(key, dotted, f"there is no group {group!r}", allowed=self.groups(), nearest=guess)
            return []
        if value.tag.endswith(":null"):
            return []
        if not isinstance(value, yaml.ScalarNode) or value.value not in choices:
            shown = value.value if isinstance(value, yaml.ScalarNode) else "a list"
            guess = nearest(str(shown), choices)
            source.report(value, group, f"{group} has no choice {shown!r}", allowed=choices, nearest=guess)
            return []
        overriding = words[0] == "override"
        if overriding and group not in self.groups_used:
            source.report(key, dotted, f"no parent recipe chooses a {group}; write `- {group}: {value.value}`")
            return []
        if not overriding:
            self.add_group(group, self.picks.get(group) or str(value.value))
        return [{f"override {group}" if overriding else group: value.value}]

    def _parent(self, source: Source, node: yaml.ScalarNode, dotted: str) -> list[Any]:
        name = str(node.value)
        path = next((folder / f"{name}.yaml" for folder in self.folders if (folder / f"{name}.yaml").is_file()), None)
        if path is None or path in self.open:
            known = tuple(sorted({path.stem for folder in self.folders for path in folder.glob("*.yaml")}))
            why = f"there is no recipe {name!r}" if path is None else f"the recipe {name!r} names itself as a parent"
            source.report(node, dotted, f"{why}; {_DEFAULTS_HELP}", nearest=nearest(name, known) if not path else "")
            return []
        self.add_recipe(path, name)
        return [name]

    def add_group(self, group: str, choice: str) -> None:
        """Read the group file ``choice``, which must exist."""
        self.groups_used.add(group)
        path = next(f / group / f"{choice}.yaml" for f in self.folders if (f / group / f"{choice}.yaml").is_file())
        source = read(path, (group,))
        for node in source.defaults():
            source.report(node, f"{group}.defaults", "a group file has no defaults list; recipes have")
        self.sources.append(source)
        self.stored[group, choice] = _usable(source)


def compose(recipe_path: Path, overrides: list[str], shipped: Path) -> Composition:
    """Compose a recipe. Mistakes are collected in ``problems``; ``data`` holds what could be used.

    Args:
        recipe_path: an existing file.
        overrides: ``key=value`` texts.
        shipped: folder of the shipped recipes, searched for groups and parents after the recipe's own folder.
    """
    composition = Composition()
    files = _Files(folders=(recipe_path.parent, shipped))
    for text in overrides:
        override = _parse_override(text, files, composition.problems)
        if override is not None:
            composition.overrides.append(override)
            if override.group:
                files.picks[str(override.key[0])] = override.value
    files.add_recipe(recipe_path, _ROOT)
    added = [group for group in files.picks if group not in files.groups_used]
    for group in added:
        files.add_group(group, files.picks[group])
    composition.sources = files.sources
    composition.problems += [problem for source in files.sources for problem in source.problems]
    composition.data = _compose_with_hydra(files, composition, added)
    return composition


def _usable(source: Source) -> dict[str, Any]:
    """The values of a file without those that Hydra would stop at; they are reported."""
    for path, message in bad_interpolations(source.data):
        _, _, node = source.locate((*source.package, *path))
        source.report(node, ".".join(str(part) for part in (*source.package, *path)), message)
    if "hydra" in source.data:
        _, key, _ = source.locate((*source.package, "hydra"))
        source.report(key, "hydra", "Hydra's own settings are not part of a recipe")
    faulty = {path for path, _ in bad_interpolations(source.data)} | {("hydra",)}
    return dict(without(source.data, faulty))


def _parse_override(text: str, files: _Files, problems: list[Problem]) -> Override | None:
    place = f"{COMMAND_LINE}: {text}"
    key, equals, raw = text.lstrip("+").partition("=")
    if NOT_TEXT.search(text):
        problems.append(Problem(path="", message="not UTF-8 text", file=ascii(place)))
        return None
    if not equals or not _KEY.fullmatch(key) or key.split(".")[0] == "hydra":
        hint = "unknown key" if key.split(".")[0] == "hydra" else "expected key=value, such as method.rounds=2"
        problems.append(Problem(path="", message=hint, file=place))
        return None
    try:
        parsed = override_parser().parse_override(f"++{key}={raw}")
    except HydraException as error:
        if raw[:1] in tuple("[{'\"$"):
            problems.append(Problem(path=key, message=f"not understood: {str(error).splitlines()[0]}", file=place))
            return None
        raw = _quoted(raw)  # a path with brackets or an equals sign is a plain text to its author
        parsed = override_parser().parse_override(f"++{key}={raw}")
    if parsed.is_sweep_override():
        message = "several values; `reasonrun sweep` tries them one by one, [a,b] is a list, 'a,b' in quotes is a text"
        problems.append(Problem(path=key, message=message, file=place))
        return None
    value, path = parsed.value(), tuple(key.split("."))
    for _, message in bad_interpolations({"": value}):
        problems.append(Problem(path=key, message=message, file=place))
        return None
    if key in files.groups() and isinstance(value, str):
        return _group_choice(key, value, files, problems, text)
    for_hydra = [f"++{key}={raw}"]
    if key in SECTIONS and isinstance(value, str):
        for_hydra = [f"++{key}=null", f"++{key}.name={raw}"]  # `method=star` replaces the method, settings included
    return Override(text=text, key=path, value=value, for_hydra=tuple(for_hydra))


def _group_choice(group: str, choice: str, files: _Files, problems: list[Problem], text: str) -> Override | None:
    choices = files.choices(group)
    if choice not in choices:
        where, message = f"{COMMAND_LINE}: {text}", f"{group} has no choice {choice!r}"
        guess = meant_model(choice) if group == "model" and "/" in choice else nearest(choice, choices)
        problems.append(Problem(file=where, path=group, message=message, allowed=choices, nearest=guess))
        return None
    return Override(text=text, key=(group,), value=choice, for_hydra=(f"{group}={choice}",), group=True)


@cache
def override_parser() -> Any:
    """Hydra's parser of ``key=value`` texts."""
    return OverridesParser.create()


def _quoted(raw: str) -> str:
    """Hydra's quoting: backslashes count only before a quote."""
    escaped = re.sub(r"(\\*)(')", lambda match: match[1] * 2 + "\\'", raw)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"


def _compose_with_hydra(files: _Files, composition: Composition, added: list[str]) -> dict[str, Any]:
    texts = []
    for override in composition.overrides:
        is_new = override.group and override.key[0] in added
        texts += [f"+{text}" if is_new else text for text in override.for_hydra]
    store = ConfigStore.instance()
    saved = store.repo
    store.repo = dict(saved)
    try:
        for (group, name), node in files.stored.items():
            store.store(name=name, node=node, group=group)
        with initialize(config_path=None, version_base="1.3"):
            composed = OmegaConf.to_container(hydra_compose(_ROOT, overrides=texts), resolve=False)
        return {str(key): value for key, value in composed.items()} if isinstance(composed, dict) else {}
    except (HydraException, OmegaConfBaseException) as error:
        place = composition.place(("defaults",), at_key=True)
        first = str(error).strip().splitlines()[0]
        composition.problems.append(Problem(path="", message=f"the files do not fit together: {first}", **place))
        return {}
    finally:
        store.repo = saved
