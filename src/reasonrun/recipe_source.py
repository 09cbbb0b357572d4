"""Reading recipe files: YAML with a position for every key, and every mistake that YAML itself would hide.

PyYAML keeps the last of two equal keys, reads ``010`` as 8 and expands anchors without limit; all three are errors
here. Numbers follow OmegaConf (``1e-5`` is a number), so that a value means the same in a file and in Hydra.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from reasonrun.recipe_errors import Path as KeyPath
from reasonrun.recipe_errors import Problem
from reasonrun.recipe_values import NOT_TEXT

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 30
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_DEEP = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
_MAX_DIGITS = 300
_AMBIGUOUS_INT = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+)")


class _Loader(yaml.SafeLoader):
    """SafeLoader with OmegaConf's idea of numbers, and dates left as text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_TAG + "timestamp", _TAG + "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


@dataclass(kw_only=True)
class Source:
    """One recipe or group file.

    ``package`` is where its keys belong in the whole: () for a recipe, ("engine",) for a file of that group. ``data``
    holds its values, without ``defaults``.
    """

    path: Path
    label: str
    package: tuple[str, ...] = ()
    lines: list[str] = field(default_factory=list)
    node: yaml.Node | None = None
    data: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, node: yaml.Node | None) -> dict[str, Any]:
        """File, line, column and source line of a node; the top of the file without one."""
        mark = node.start_mark if node is not None else None
        return self.place_at(mark.line if mark else 0, mark.column if mark else 0)

    def place_at(self, line: int, column: int) -> dict[str, Any]:
        """The same from a line and column counted from 0."""
        text = self.lines[line] if line < len(self.lines) else ""
        return {"file": self.label, "line": line + 1, "column": column + 1, "source_line": text}

    def report(self, node: yaml.Node | None, path: str, message: str, **more: Any) -> None:
        self.problems.append(Problem(path=path, message=message, **self.place(node), **more))

    def report_at(self, text: str, position: int, message: str) -> None:
        """A problem at a position of the file's text."""
        line_start = text.rfind("\n", 0, position) + 1
        place = self.place_at(text.count("\n", 0, position), position - line_start)
        self.problems.append(Problem(path="", message=message, **place))

    def locate(self, path: KeyPath) -> tuple[int, yaml.Node | None, yaml.Node | None]:
        """How much of ``path`` this file has, and the nodes of the last key found and of its value."""
        depth = len(self.package)
        if path[:depth] != self.package or self.node is None:
            return 0, None, None
        key: yaml.Node | None = None
        value = self.node
        for part in path[depth:]:
            pair = _child(value, part)
            if pair is None:
                break
            (key, value), depth = pair, depth + 1
        return depth, key, value

    def defaults(self) -> list[yaml.Node]:
        """The nodes of the defaults list."""
        pair = _child(self.node, "defaults") if self.node is not None else None
        if pair and not isinstance(pair[1], yaml.SequenceNode):
            self.report(pair[1], "defaults", "expected a list such as `- model: tiny`")
        return list(pair[1].value) if pair and isinstance(pair[1], yaml.SequenceNode) else []


def label_of(path: Path) -> str:
    """How messages name a file: relative to the current folder when it lies inside."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def read(path: Path, package: tuple[str, ...] = ()) -> Source:
    """Read one file; what is wrong with it is in ``problems``, what can be used in ``data``."""
    source = Source(path=path, label=label_of(path), package=package)
    text = _decode(source)
    if text is None:
        return source
    source.lines = text.split("\n")
    if deep := _DEEP.search(text):  # PyYAML takes minutes over thousands of opening brackets
        source.report_at(text, deep.start(), f"nested deeper than {MAX_DEPTH} levels")
        return source
    try:
        source.node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        _syntax_problems(source, error)
    except yaml.reader.ReaderError as error:
        source.report_at(text, error.position, "a control character; take it out")
    except RecursionError:
        source.report(None, "", f"nested deeper than {MAX_DEPTH} levels")
    if source.node is None:
        if not source.problems:
            source.report(None, "", "the file is empty; a recipe names at least a method and a task")
        return source
    if not isinstance(source.node, yaml.MappingNode):
        source.report(source.node, "", "a recipe is a group of keys such as `method: star`, not a list or a word")
        source.node = None
        return source
    if not _too_large(source):
        _construct(source)
    return source


def _decode(source: Source) -> str | None:
    """The text without byte order mark and with plain line ends, as Windows editors are welcome."""
    raw = source.path.read_bytes()
    if len(raw) > MAX_BYTES:
        source.report(None, "", f"{len(raw)} bytes are too many for a recipe (at most {MAX_BYTES})")
        return None
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start)
        place = source.place_at(line, error.start - raw.rfind(b"\n", 0, error.start) - 1)
        source.problems.append(Problem(path="", message="not UTF-8 text; save the file as UTF-8", **place))
        return None


def _syntax_problems(source: Source, error: yaml.MarkedYAMLError) -> None:
    tabs = [number for number, line in enumerate(source.lines) if re.match(r" *\t", line)]
    if "'\\t'" in str(error.problem):
        tabs = tabs or ([error.problem_mark.line] if error.problem_mark else [])
        for number in tabs:
            place = source.place_at(number, source.lines[number].index("\t"))
            source.problems.append(Problem(path="", message="a tab; YAML is indented with spaces", **place))
        return
    mark = error.problem_mark or error.context_mark
    context = f" ({error.context})" if error.context else ""
    advice = ""
    if "could not find expected ':'" in str(error.problem):
        mark, context, advice = error.context_mark or mark, "", "; write `key: value`, with a blank after the colon"
    elif error.context == "while scanning a quoted scalar" and "end of stream" in str(error.problem):
        mark, context, advice = error.context_mark or mark, "", "; the quote that opens here is never closed"
    elif (error.context or "").startswith("while parsing a flow") and error.context_mark:
        context = f" ({error.context} that begins in line {error.context_mark.line + 1})"
    elif "mapping values are not allowed" in str(error.problem):
        advice = "; indent equal keys equally, and quote a text that holds a colon and a blank"
    place = source.place_at(mark.line, mark.column) if mark else source.place(None)
    source.problems.append(Problem(path="", message=f"not YAML: {error.problem}{context}{advice}", **place))


def _too_large(source: Source) -> bool:
    """Counts nodes as often as anchors repeat them: a few nested anchors can stand for billions of values."""
    count, deepest, waiting = 0, 0, [(source.node, 0)]
    while waiting and count <= MAX_NODES and deepest <= MAX_DEPTH:
        node, depth = waiting.pop()
        count, deepest = count + 1, max(depth, deepest)
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
    if deepest > MAX_DEPTH:
        source.report(source.node, "", f"nested deeper than {MAX_DEPTH} levels, or an anchor that contains itself")
    elif count > MAX_NODES:
        source.report(source.node, "", f"more than {MAX_NODES} values, counting repeated anchors")
    if source.problems:
        source.node = None
    return bool(source.problems)


def _construct(source: Source) -> None:
    _check(source, source.node, (), set())
    loader = _Loader("")
    try:
        data = loader.construct_document(source.node)
    except (yaml.MarkedYAMLError, ValueError) as error:
        message = f"not YAML: {getattr(error, 'problem', None) or error}"
        mark = getattr(error, "problem_mark", None)
        place = source.place_at(mark.line, mark.column) if mark else source.place(None)
        source.problems.append(Problem(path="", message=message, **place))
        return
    finally:
        loader.dispose()
    source.data = {key: value for key, value in data.items() if key != "defaults"}


def _check(source: Source, node: yaml.Node | None, path: KeyPath, seen: set[int]) -> None:
    """Report what YAML allows and a recipe does not, and take it out of the tree so that the rest can be checked."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    dotted = ".".join(str(part) for part in (*source.package, *path))
    if isinstance(node, yaml.MappingNode):
        _check_keys(source, node, path)
        for key, value in node.value:
            _check(source, value, path if key.tag == _TAG + "merge" else (*path, key.value), seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _check(source, item, (*path, number), seen)
    elif isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "int" and _AMBIGUOUS_INT.fullmatch(node.value):
        source.report(node, dotted, f"YAML 1.1 reads {node.value} in base 8 or 60; write it without leading 0 or colon")
    elif isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "int" and len(node.value) > _MAX_DIGITS:
        source.report(node, dotted, f"a number of {len(node.value)} digits")
        node.value = "0"
    elif isinstance(node, yaml.ScalarNode) and NOT_TEXT.search(node.value):
        source.report(node, dotted, "an escape that stands for no character")
        node.value = NOT_TEXT.sub("?", node.value)
    if node.tag not in _PLAIN_TAGS:
        source.report(node, dotted, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; recipes are plain data")
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq" if isinstance(node, yaml.SequenceNode) else "str"
        node.tag = _TAG + kind


def _check_keys(source: Source, node: yaml.MappingNode, path: KeyPath) -> None:
    lines: dict[str, int] = {}
    kept: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in node.value:
        prefix = ".".join(str(part) for part in (*source.package, *path))
        if key.tag == _TAG + "merge":
            kept.append((key, value))
        elif not isinstance(key, yaml.ScalarNode) or key.tag != _TAG + "str" or NOT_TEXT.search(key.value):
            kind = key.tag.rpartition(":")[2] if isinstance(key, yaml.ScalarNode) else "a group"
            source.report(key, prefix, f"a key must be a word; YAML reads this one as {kind} (quote it if it is meant)")
        else:
            dotted = ".".join(filter(None, [prefix, key.value]))
            if key.value in lines:
                source.report(key, dotted, f"given twice, first on line {lines[key.value]}")
                kept = [pair for pair in kept if pair[0].value != key.value]
            lines.setdefault(key.value, key.start_mark.line + 1)
            kept.append((key, value))
    node.value = kept


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        return next(((k, v) for k, v in reversed(node.value) if k.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None
