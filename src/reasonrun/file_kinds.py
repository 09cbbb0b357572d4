"""Telling a file that holds no lines of JSON at all: packed, binary, a web page, a table, one array."""

from __future__ import annotations

import re

_BINARY = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"SQLite format 3": "SQLite",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
}
_ANY_OBJECT = re.compile(rb"^[ \t]*[{\[]", re.MULTILINE)


def kind_fault(content: bytes) -> str:
    """What a file is instead of lines of JSON, which would make every line a fault; empty when it may hold such lines."""
    for magic, name in _BINARY.items():
        if content.startswith(magic):
            return f"this is {name} data, not lines of JSON in UTF-8"
    text = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return "the file is empty"
    if text.startswith(b"<"):
        return "this is an HTML or XML page, not lines of JSON; the download probably saved an error page"
    if text.startswith(b"["):
        return "the file holds a JSON array; write one object per line, without brackets and commas between them"
    if text.split(b"\n", 1)[0].strip() == b"{":
        return "the object is spread over several lines; write one object per line"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the data; fetch the file with `git lfs pull`"
    if b"\n" not in text.strip() and b"\r" in text.strip():
        return "the lines end with a carriage return alone; save the file with line feeds"
    if not _ANY_OBJECT.search(text):
        return f"no line begins with {{ as a JSON object does; the file begins with {text[:30].decode('latin-1')!a}"
    return ""
