"""Reading JSON files that people made: every fault is found, named by file and line or item, and none is skipped.

A reader returns the good rows and the faults; the task adds its own faults and raises them all at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from reasonrun.errors import RecipeError
from reasonrun.file_kinds import kind_fault
from reasonrun.row_faults import PLACE, check_row, stated_once

MAX_LISTED_FAULTS = 200
_JSON_WORDS = {
    "Extra data": "something follows the object; a line holds one object and no comma behind it",
    "Unexpected UTF-8 BOM (decode using utf-8-sig)": "a byte order mark; two files were joined here",
    "Expecting property name enclosed in double quotes": "field names stand in double quotes, with no comma behind the last",
}
_JSON_BLANKS = re.compile(r"[ \t\r\n]*")
_NO_CONSTANT = "%s is not JSON; write null or leave the field out"


@dataclass(frozen=True)
class Row:
    """One good line or item: where it stands (``file:line``, ``file: item N``) and its object."""

    place: str
    fields: dict[str, Any]


def read_json_lines(path: Path, required: Mapping[str, type]) -> tuple[list[Row], list[str]]:
    """Rows of ``path`` and the faults found in it, each as ``file:line: what``.

    Args:
        path: a UTF-8 file with one JSON object per line; blank lines are no rows.
        required: fields that every row must have, with their types; strings must hold text.

    Raises:
        RecipeError: there is no such file, or it cannot be read.
    """
    content = _content(path)
    fault = kind_fault(content)
    if fault:
        return [], [f"{path}:1: {fault}"]
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows: list[Row] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            rows.append(Row(place, _parse(line, required)))
        except _Fault as fault_found:
            cut_off = number == len(lines) and "not valid JSON" in str(fault_found)
            faults.append(f"{place}: {fault_found}{'; the file ends here without a line end' if cut_off else ''}")
    return rows, stated_once(faults, len(rows) + len(faults))


def read_json(path: Path, required: Mapping[str, type]) -> tuple[list[Row], list[str]]:
    """``read_json_lines`` for a file that may also be one JSON array of objects; these are named ``file: item N``.

    Raises:
        RecipeError: there is no such file, or it cannot be read.
    """
    content = _content(path).removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        return read_json_lines(path, required)
    try:
        text = content.decode("utf-8").lstrip()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        return [], [
            f"{path}:{line}: not UTF-8: byte 0x{content[error.start]:02x} in column {column}; is the file Latin-1?"
        ]
    rows: list[Row] = []
    faults: list[str] = []
    for number, (value, fault) in enumerate(_array_items(text), start=1):
        fault = fault or _row_fault(value, required)
        if fault:
            faults.append(f"{path}: item {number}: {fault}")
        else:
            rows.append(Row(f"{path}: item {number}", value))
    if not rows and not faults:
        faults.append(f"{path}:1: the array is empty")
    return rows, stated_once(faults, len(rows) + len(faults))


def duplicates(places: Sequence[tuple[str, str]], what: str) -> list[str]:
    """Faults for every key that occurs again; ``places`` are (key, place) in file order."""
    first: dict[str, str] = {}
    faults = []
    for key, place in places:
        if key in first:
            faults.append(f"{place}: {what} as {first[key]}")
        first.setdefault(key, place)
    return faults


def same_file(one: str, other: str) -> bool:
    """Whether two paths of a recipe name one file, by link or by spelling too."""
    if not one or not other:
        return False
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def refuse(faults: Sequence[str], *, hint: str) -> NoReturn:
    """Raise all ``faults`` as one RecipeError, in the order of the files and their lines."""
    files: dict[str, int] = {}
    keys = []
    for fault in faults:
        found = PLACE.match(fault)
        name = found[1] if found else ""
        keys.append((files.setdefault(name, len(files)), int(found[2]) if found else 0))
    shown = [fault for _, fault in sorted(zip(keys, faults, strict=True), key=lambda pair: pair[0])][:MAX_LISTED_FAULTS]
    if len(faults) > len(shown):
        shown.append(f"… and {len(faults) - len(shown)} more")
    noun = "fault" if len(faults) == 1 else "faults"
    raise RecipeError("\n".join([f"{len(faults)} {noun} in the problem files:", *shown]), hint=hint)


class _Fault(Exception):
    """What is wrong with one line."""


def _content(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RecipeError(
                f"{path} is no regular file; it could be read only once, or for ever",
                hint="write the rows into a file, and name that",
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file; {_neighbours(path)}", hint="correct the path, in the recipe or on the command line"
        ) from None
    except NotADirectoryError:
        file = next(parent for parent in path.parents if parent.is_file())
        raise RecipeError(
            f"{path} cannot be read: {file} is a file, and a folder is needed there",
            hint=f"task.path is the folder: {file.parent}",
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path} is a folder, not a file; {_neighbours(path / 'x')}", hint="name the file in the recipe"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None


def _neighbours(path: Path) -> str:
    folder, missing = path.parent, path.name
    while not folder.is_dir():
        folder, missing = folder.parent, folder.name
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(missing, names, n=3, cutoff=0.5) or names[:8]
    here = f"{folder} has {', '.join(near)}" if near else f"{folder} is empty"
    if folder != path.parent:
        return f"{path.parent} does not exist either, the nearest existing folder is {folder}; {here}"
    return here


def _parse(line: bytes, required: Mapping[str, type]) -> dict[str, Any]:
    if b"\0" in line:
        raise _Fault(f"NUL byte in column {line.index(0) + 1}")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise _Fault(f"not UTF-8: byte 0x{byte:02x} in column {error.start + 1}; is the file Latin-1?") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        what = _JSON_WORDS.get(error.msg, error.msg.removesuffix(" at"))
        raise _Fault(f"not valid JSON: {what}, in column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise _Fault(f"not readable as JSON: {_unreadable(error)}") from None
    if fault := _row_fault(value, required):
        raise _Fault(fault)
    return value  # type: ignore[no-any-return]


def _unreadable(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else "a number of more than 4300 digits"


def _row_fault(value: Any, required: Mapping[str, type]) -> str:
    if not isinstance(value, dict):
        return f"must be a JSON object, not {type(value).__name__}"
    return check_row(value, required)


def _array_items(text: str) -> Iterator[tuple[Any, str]]:
    """Each item of a JSON array, or what is wrong with it; the last one when the array cannot be read further."""
    noted: list[str] = []  # a hook that raised would lose the place where the next item begins

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        try:
            return _unique_keys(pairs)
        except _Fault as fault:
            noted.append(str(fault))
            return dict(pairs)

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=lambda name: noted.append(_NO_CONSTANT % name))
    position = _JSON_BLANKS.match(text, 1).end()  # type: ignore[union-attr]
    closed = text.startswith("]", position)
    position += closed
    while not closed:
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield None, f"not valid JSON, and the items after it were not read: {error}"
            return
        except (RecursionError, ValueError) as error:
            yield None, f"not readable as JSON, and the items after it were not read: {_unreadable(error)}"
            return
        yield value, "; ".join(noted)
        noted.clear()
        position = _JSON_BLANKS.match(text, position).end()  # type: ignore[union-attr]
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            yield None, "no comma and no closing bracket before it; the file may be cut off"
            return
        position = _JSON_BLANKS.match(text, position + 1).end()  # type: ignore[union-attr]
    if text[position:].strip():
        yield None, "text follows the array's closing bracket"


def _refuse_constant(name: str) -> NoReturn:
    raise _Fault(_NO_CONSTANT % name)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise _Fault(f"field {repeated[0]!r} occurs twice")
    return fields
