"""Text that a terminal shows and never obeys."""

from __future__ import annotations

import re

# A whole sequence goes, parameters included, so that no rubble of it is left in the text.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, clearing (ECMA-48 §5.4)
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # OSC: titles, links, clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]"  # every other escape
)
_CONTROL = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks and overrides of writing direction
    "]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no encoding takes it


def printable(text: str) -> str:
    """``text`` without control sequences, control characters and overrides of writing direction.

    Newlines and tabs stay. Half characters become U+FFFD.

    >>> printable("a\\x1b[31mb\\x07c")
    'abc'
    """
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", _SEQUENCE.sub("", text)))
