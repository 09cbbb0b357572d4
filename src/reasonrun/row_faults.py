"""What is wrong with one row of a file of problems, and with many rows alike."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MAX_NAMES, MAX_NAME_CHARS = 30, 60
MAX_TEXT_CHARS = 5_000_000  # no model reads so much; a file that lost its line ends or its quotes does
PLACE = re.compile(r"(.*?): ?(?:item )?(\d+): ", re.DOTALL)
"""How a fault begins: with its file, and its line or item."""

_MANY = 3  # rows with the same fault that are still worth a line each
_SYNONYMS = {
    "question": ("prompt", "problem", "input", "query"),
    "answer": ("solution", "output", "response", "completion"),
}
"""What other data sets call a field."""


def check_row(fields: Mapping[str, Any], required: Mapping[str, type]) -> str:
    """What is wrong with the fields of one row; empty when nothing is."""
    missing = [name for name in required if name not in fields]
    if missing:
        return _missing(missing, fields, required)
    for name, kind in required.items():
        value = fields[name]
        if not isinstance(value, kind):
            return f"field {name!r} must be {kind.__name__}, not {type(value).__name__}{_nested(kind, value)}"
        if isinstance(value, str) and (fault := _text_fault(value)):
            return f"field {name!r} {fault}"
    return ""


def stated_once(faults: Sequence[str], num_rows: int) -> list[str]:
    """``faults`` with one that all of ``num_rows`` rows of a file share said at the first of them, with their number."""
    texts = [fault[found.end() :] if (found := PLACE.match(fault)) else "" for fault in faults]
    counts = Counter(texts)
    said: set[str] = set()
    kept = []
    for fault, text in zip(faults, texts, strict=True):
        if not text or num_rows <= _MANY or counts[text] != num_rows:
            kept.append(fault)
        elif text not in said:
            said.add(text)
            kept.append(f"{fault} (the same in all {num_rows} rows)")
    return kept


def listed(names: Collection[str]) -> str:
    """The first few names in one line."""
    shown = [name[:MAX_NAME_CHARS] for name in list(names)[:MAX_NAMES]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) or "none") + more


def _missing(missing: Sequence[str], fields: Mapping[str, Any], required: Mapping[str, type]) -> str:
    """Which fields are missing, and which other ones may be them under another name."""
    spare = [name for name in fields if name not in required]
    renamed: dict[str, str] = {}
    for name in missing:  # by what the word means before by its spelling: solution is an answer, not a question
        known = [word for word in _SYNONYMS.get(name, ()) if word in spare]
        renamed |= {name: known[0]} if known else {}
    for name in missing:
        near = difflib.get_close_matches(name, [word for word in spare if word not in renamed.values()], n=1)
        renamed |= {name: near[0]} if near and name not in renamed else {}
    if len(missing) == 1:
        lack, names = f"field {missing[0]!r} is missing", {repr(word): "" for word in renamed.values()}
    else:
        lack = f"fields {' and '.join(repr(name) for name in missing)} are missing"
        names = {repr(word): f" to {name!r}" for name, word in renamed.items()}
    if not names:
        return f"{lack}; the row has {listed([repr(name) for name in fields])}"
    return f"{lack}; did you mean to rename {' and '.join(word + to for word, to in names.items())}?"


def _nested(kind: type, value: Any) -> str:
    """What to do with chat messages where one text belongs."""
    first = value[0] if isinstance(value, list) and value else value
    if kind is str and isinstance(first, dict):
        return "; put in the text alone, such as the content of the one message"
    return ""


def _text_fault(text: str) -> str:
    if len(text) > MAX_TEXT_CHARS:
        return f"holds {len(text):,} characters, more than {MAX_TEXT_CHARS:,}; is a quote or a line end missing?"
    if not text.strip():
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds a lone surrogate (\\u{ord(text[error.start]):04x}), half of a character"
    return ""
