"""The lines of a write-ahead log, and what a whole log looks like to somebody who only reads it.

A line is 8 hex digits of CRC-32 (zlib), a space, ``[ordinal,record]`` as compact JSON, a newline. Ordinal -1 marks how
many bytes had been flushed to disk when the line was written, which tells a hole left by a loss of power (rows that
were never safe) from damage to rows that were.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.ledger.files import decode_json, encode_json

FLUSHED = -1


@dataclass(frozen=True)
class LogExtent:
    """What a log holds.

    Attributes:
        size: bytes of the file.
        end: where the usable part ends; what follows was never safe and is set aside by the next attempt.
        damaged: offsets of lines before ``end`` that do not match their checksums; nobody may go on from such a log.
    """

    size: int
    end: int
    damaged: tuple[int, ...]


def examine_log(path: Path, on_row: Callable[[int, bytes, int], None], *, stop_at_damage: bool = False) -> LogExtent:
    """Read a log from its beginning and write nothing.

    Args:
        path: the log.
        on_row: gets ordinal, line and offset of every row that verifies, up to the first hole.
        stop_at_damage: read no further than the first damaged line.
    """
    offset, first_hole, flushed_to = 0, -1, 0
    damaged: list[int] = []
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            ordinal = ordinal_of(line)
            if ordinal is None:
                # Blocks that never reached the disk read as NUL, which no line of ours contains.
                if b"\0" in line:
                    first_hole = offset if first_hole < 0 else first_hole
                else:
                    damaged.append(offset)
                    if stop_at_damage:
                        break
            elif ordinal == FLUSHED:
                flushed_to = max(flushed_to, record_of(line))
            elif first_hole < 0:
                on_row(ordinal, line, offset)
            offset += len(line)
    if 0 <= first_hole < flushed_to:
        damaged.append(first_hole)
        first_hole = -1
    return LogExtent(path.stat().st_size, offset if first_hole < 0 else first_hole, tuple(sorted(damaged)))


def encode_line(ordinal: int, record: Any) -> bytes:
    body = b"[%d," % ordinal + encode_json(record) + b"]"
    return b"%08x %s\n" % (zlib.crc32(body), body)


def ordinal_of(line: bytes) -> int | None:
    """The ordinal of one line, or None when the line is damaged."""
    body = line[9:-1]
    if line[8:9] != b" " or line[-1:] != b"\n" or line[:8] != b"%08x" % zlib.crc32(body):
        return None
    number = body[1 : body.find(b",")]
    return int(number) if number.lstrip(b"-").isdigit() else None


def record_of(line: bytes) -> Any:
    """The record of a line that verifies."""
    return decode_json(line[line.index(b",") + 1 : -2])


def is_same_row(first: bytes, second: bytes) -> bool:
    """Whether two lines that verify hold equal records."""
    return first == second or bool(record_of(first) == record_of(second))
