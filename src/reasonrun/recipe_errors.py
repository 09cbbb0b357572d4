"""Recipe problems with their places: how they are worded, where pydantic's errors belong, how they are shown."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from reasonrun.errors import RecipeError

Path = tuple[str | int, ...]
COMMAND_LINE = "command line"

_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|wandb_v1_\w{20,})"
)
_SECRET_KEY = r"(?:[\w.]*_)?(?:api_?key|token|secret|password|passwd|credentials?)"
_SECRET_NAME = re.compile(f"^{_SECRET_KEY}$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"((?<!\w){_SECRET_KEY}['\"]?\s*[:=]\s*['\"]?)(?!\$\{{)[^\s'\"]{{12,}}", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
# what would move the caret, or turn the line around: controls, line separators, marks of writing direction
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_MAX_LINE = 160


def looks_secret(key: str, text: str) -> bool:
    """Whether a literal is probably a credential: a known token format, or a long word under a key such as api_key."""
    long_word = len(text) >= 12 and not re.search(r"\s", text)
    return bool(_TOKENS.search(text)) or (bool(_SECRET_NAME.match(key)) and long_word)


def redact(text: str) -> str:
    """``text`` without what looks like a credential."""
    return _ASSIGNED.sub(r"\1<redacted>", _TOKENS.sub("<redacted>", _USER_IN_URL.sub("<redacted>@", text)))


def visible(word: str) -> str:
    """``word`` with an escape for every character that a terminal would hide or obey.

    >>> visible("se\\u200bed")
    'se\\\\u200bed'
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in word)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One mistake in a recipe. Line and column count from 1; both are None on the command line."""

    file: str
    line: int | None = None
    column: int | None = None
    path: str
    message: str
    allowed: tuple[str, ...] = ()
    nearest: str = ""
    source_line: str = ""

    def __post_init__(self) -> None:
        for name in ("file", "message", "source_line"):
            object.__setattr__(self, name, redact(getattr(self, name)))
        object.__setattr__(self, "path", redact(visible(self.path)))

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        text = f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"
        text += f"; nearest is {self.nearest}" if self.nearest else ""
        text += f". Allowed: {', '.join(self.allowed)}" if self.allowed else ""
        if self.line is None or self.column is None or not self.source_line.strip():
            return text
        line = _CONTROL.sub(" ", self.source_line)
        begin = max(0, self.column - _MAX_LINE // 2) if len(line) > _MAX_LINE else 0
        return f"{text}\n    {line[begin : begin + _MAX_LINE]}\n    {' ' * (self.column - 1 - begin)}^"


class RecipeProblems(RecipeError):
    """All mistakes of a recipe at once, in ``problems`` too."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        order = sorted(
            dict.fromkeys(problems), key=lambda p: (p.file.startswith(COMMAND_LINE), p.file, p.line or 0, p.column or 0)
        )
        self.problems = tuple(order)
        count = "1 problem" if len(order) == 1 else f"{len(order)} problems"
        super().__init__("\n".join([f"{count} in the recipe", *(str(problem) for problem in order)]))


def nearest(word: str, options: Iterable[str], descriptions: dict[str, str] | None = None) -> str:
    """The option that ``word`` was probably meant to be, or an empty string.

    By spelling first; then by meaning: all parts of the word occur in the option's description.
    """
    known = list(options)
    folded = {option.lower(): option for option in known}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=0.6)
    if close:
        return folded[close[0]]
    parts = [part for part in re.split(r"[^a-z]+", word.lower()) if len(part) > 2]
    for option, description in (descriptions or {}).items():
        if parts and option in known and all(part in description.lower() for part in parts):
            return option
    return ""


def meant_model(named: str) -> str:
    """The override that was meant by a folder, or a name on the Hub, in the place of a shipped model's name."""
    repository = named.removeprefix("hub:")
    on_hub = named != repository or (re.fullmatch(r"\w[\w.-]*/[\w.-]+", named) and not os.path.exists(named))
    return f"model.hub={repository}" if on_hub else f"model.path={named}"


def from_pydantic(
    errors: Iterable[Any],
    model: type[BaseModel],
    data: Any,
    place: Callable[[Path, bool], dict[str, Any]],
    hidden: Container[Path] = (),
) -> Iterator[Problem]:
    """Problems from pydantic's error list.

    Args:
        errors: ``ValidationError.errors()``.
        model: the class that was validated.
        data: what was validated; pydantic's union tags are told from keys by walking it.
        place: file, line, column and source line of a path, at its key (True) or at its value (False).
        hidden: paths whose values must not be shown.
    """
    grouped: dict[Path, list[Any]] = {}
    for error in errors:
        path = _plain_path(error, data)
        shown = {**error, "input": _Hidden()} if path in hidden else error
        grouped.setdefault(path, []).append(shown)
    for path, group in grouped.items():
        yield _problem(path, group, model, place)


class _Hidden:
    """Stands for a value from the environment."""

    def __repr__(self) -> str:
        return "a value from the environment"


def _problem(
    path: Path, group: list[Any], model: type[BaseModel], place: Callable[[Path, bool], dict[str, Any]]
) -> Problem:
    error, dotted = group[0], ".".join(str(part) for part in path)
    where = place(path, error["type"] == "extra_forbidden")
    if error["type"] == "extra_forbidden":
        parent = model_at(model, path[:-1])
        described = {name: info.description or "" for name, info in parent.model_fields.items()} if parent else {}
        guess = _deeper(parent, str(path[-1]), error["input"]) or nearest(str(path[-1]), described, described)
        dots = "; in a file, `a: {b: …}` is what the command line writes as a.b" if "." in str(path[-1]) else ""
        return Problem(path=dotted, message=f"unknown key{dots}", allowed=tuple(described), nearest=guess, **where)
    messages = list(dict.fromkeys(_message(error) for error in group))
    allowed = tuple(option for error in group for option in _allowed(error))
    given = next((error["input"] for error in group if isinstance(error["input"], str)), "")
    if error["type"].startswith(("model_", "dict_")):
        inner = model_at(model, path)
        allowed = tuple(inner.model_fields) if inner else ()
    guess = nearest(given, allowed) or _quoted_word(error["input"], allowed)
    return Problem(path=dotted, message=" or ".join(messages), allowed=allowed, nearest=guess, **where)


def model_at(model: type[BaseModel] | None, path: Path) -> type[BaseModel] | None:
    """The settings class that holds the keys at ``path`` below ``model``; list positions are looked through."""
    for part in path:
        if model is None or (isinstance(part, str) and part not in model.model_fields):
            return None
        model = next(iter(models_in(model.model_fields[part].annotation)), None) if isinstance(part, str) else model
    return model


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def _deeper(model: type[BaseModel] | None, key: str, given: Any) -> str:
    """``sft.lr`` for the key ``lr`` written too high, ``method.sft.lr`` for ``sft`` that holds ``lr`` alone."""
    waiting: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), model)] if model else []
    for path, group in waiting:  # grows while it is read: what is nearest comes first
        for name, info in group.model_fields.items():
            if name == key and path:
                return ".".join([*path, key, *_only_keys(given, info.annotation)])
            waiting += [((*path, name), inner) for inner in models_in(info.annotation)]
    return ""


def _only_keys(given: Any, annotation: Any) -> Iterator[str]:
    """The keys of groups that hold one key each, as far as there are such fields."""
    group = next(models_in(annotation), None)
    if isinstance(given, dict) and len(given) == 1 and group is not None:
        ((key, value),) = given.items()
        if key in group.model_fields:
            yield key
            yield from _only_keys(value, group.model_fields[key].annotation)


def _plain_path(error: Any, data: Any) -> Path:
    """The path in the recipe: pydantic's location without the tags of unions."""
    path: list[str | int] = []
    location, current = error["loc"], data
    for number, part in enumerate(location, start=1):
        inside = isinstance(part, int) and isinstance(current, list) and part < len(current)
        if inside or (isinstance(current, dict) and part in current):
            path.append(part)
            current = current[part]
        elif number == len(location) and error["type"] == "missing":
            path.append(part)
    return tuple(path)


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "model": "a group of keys",
    "dict": "a group of keys",
    "none": "null",
}


def _message(error: Any) -> str:
    kind, given = error["type"], error["input"]
    if kind == "missing":
        return "required key is missing"
    if kind in ("literal_error", "enum"):
        return f"{_shown(given)} is not one of the allowed values{_yaml_word(given)}"
    base = kind.split("_")[0]
    if kind.endswith(("_type", "_from_float", "_parsing")) and base in _EXPECTED:
        return f"expected {_EXPECTED[base]}, got {_shown(given)}{_unquote(base, given)}{_yaml_word(given)}"
    if kind == "json_invalid":
        return "the recipe holds a value that is no JSON"
    if kind == "string_pattern_mismatch":
        return f"{_shown(given)} does not have the form that is needed{_form(error)}"
    if kind == "finite_number":
        return f"expected a finite number, got {_shown(given)}"
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return text if kind == "value_error" else f"{text}, got {_shown(given)}"


_FORMS = {r"^[0-9a-f]{40}$": "a commit, 40 hex digits; a branch or tag may change", r"^[\w.-]+/[\w.-]+$": "owner/name"}


def _form(error: Any) -> str:
    pattern = str(error.get("ctx", {}).get("pattern", ""))
    return f": {_FORMS.get(pattern, pattern)}" if pattern else ""


def _allowed(error: Any) -> list[str]:
    if error["type"] not in ("literal_error", "enum"):
        return []
    expected = str(error.get("ctx", {}).get("expected", ""))
    return re.findall(r"'([^']*)'", expected) or re.split(r", | or ", expected)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, list):
        return "a list"
    return f"the text {value[:60]!r}" if isinstance(value, str) else repr(value)


def _unquote(base: str, given: Any) -> str:
    if base in ("int", "float") and isinstance(given, str) and re.fullmatch(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*", given):
        return " (write the number without quotes or leading zeros)"
    return ""


def _quoted_word(given: Any, allowed: Sequence[str]) -> str:
    """``'off'`` with its quotes, where a bare off was read as false and is one of the allowed words."""
    words = {True: ("on", "yes"), False: ("off", "no")}.get(given, ()) if isinstance(given, bool) else ()
    return next((f"'{word}'" for word in words if word in allowed), "")


def _yaml_word(given: Any) -> str:
    if isinstance(given, bool):
        return " (YAML reads no, off, yes and on as false and true; quote the word if it is meant as text)"
    return ""
