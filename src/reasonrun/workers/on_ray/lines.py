"""The relay's view of the worker protocol: lines of a few kinds it reads, all others it passes on unread."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_KIND = re.compile(rb'\{"kind": ?"(\w+)"')
_KIND_BYTES = 32  # enough of a line to know its kind


class Lines:
    """Cuts a stream of lines into pieces: whole lines of the kinds in ``wanted``, everything else as it comes."""

    def __init__(self, *wanted: bytes) -> None:
        self._wanted = frozenset(wanted)
        self._held = bytearray()
        self._passing = False  # in the middle of a line that nobody wants to see

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, bool]]:
        """The pieces that ``chunk`` completes, in order, each with whether it is a wanted line."""
        if not self._wanted:
            yield chunk, False
            return
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield from self._feed_piece(line + b"\n")
        if rest:
            yield from self._feed_piece(rest)

    def _feed_piece(self, piece: bytes) -> Iterator[tuple[bytes, bool]]:
        complete = piece.endswith(b"\n")
        if self._passing:
            self._passing = not complete
            yield piece, False
            return
        self._held += piece
        if not complete and len(self._held) < _KIND_BYTES:
            return
        found = _KIND.match(self._held)
        wanted = found is not None and found[1] in self._wanted
        if wanted and not complete:
            return
        self._passing = not complete
        held = bytes(self._held)
        self._held.clear()
        yield held, wanted


def rewrite(line: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The line of a message after ``change`` had its way with the message's JSON."""
    message = json.loads(line.decode("utf-8", "surrogatepass"))
    change(message)
    # As protocol.encode writes what pydantic's encoder refuses: infinite numbers and lone surrogates survive.
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
