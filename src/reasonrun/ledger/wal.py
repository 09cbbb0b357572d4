"""The write-ahead log of a running step: one JSON line per row, each with its CRC (``wal_lines``)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from reasonrun.errors import ReasonrunError, RunFailed
from reasonrun.ledger.files import Files
from reasonrun.ledger.wal_lines import FLUSHED, encode_line, examine_log, is_same_row, ordinal_of, record_of

FLUSH_SECONDS = 2.0
"""Longest time that a logged row is not yet on disk, whether or not others follow it."""

_MAX_ORDINAL = 10**9
_READ_BYTES = 1 << 14


class Wal:
    """Rows of an unfinished step by ordinal, durable within ``FLUSH_SECONDS``.

    Memory is 8 bytes a row: an array from ordinal to byte offset; rows are read back from the file.

    Args:
        path: the log file, made when missing.
        files: does the writing.
        set_aside: gets a name and gives the path under which a torn tail is kept.
        redo_hint: what the user can do about damage.

    Raises:
        RunFailed: a line in the middle is damaged, or an ordinal stands there twice with different rows.
    """

    def __init__(self, path: Path, files: Files, set_aside: Callable[[str], Path], redo_hint: str) -> None:
        self.path, self._files, self._redo_hint = path, files, redo_hint
        self._offsets: npt.NDArray[np.int64] = np.full(1024, -1, dtype=np.int64)
        self._num_rows = 0
        files.mkdir(path.parent)
        self._descriptor = _open_to_read(path, files)
        try:
            self._recover(set_aside)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._file = files.append(path, "wal")
        self._flushed_to = self._marked_to = 0
        self._flushed_at = time.monotonic()
        self._writing = threading.RLock()
        self._timer: threading.Timer | None = None
        self._failed_flush: Exception | None = None
        if self._file.size:  # rows of an earlier attempt may still be in the page cache only
            self.flush()

    def __len__(self) -> int:
        return self._num_rows

    def __contains__(self, ordinal: int) -> bool:
        return 0 <= ordinal < len(self._offsets) and bool(self._offsets[ordinal] >= 0)

    def ordinals(self) -> npt.NDArray[np.int64]:
        """The ordinals that are present, ascending."""
        return np.flatnonzero(self._offsets >= 0)

    def missing(self, num_rows: int) -> npt.NDArray[np.int64]:
        """The ordinals below ``num_rows`` that are absent, ascending."""
        present = np.zeros(num_rows, dtype=bool)
        ordinals = self.ordinals()
        present[ordinals[ordinals < num_rows]] = True
        return np.flatnonzero(~present)

    def append(self, records: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Log one unit of work with a single write. Rows that are there already, unchanged, are skipped.

        Raises:
            RunFailed: an ordinal is there with another row (determinism check).
            ValueError: an ordinal is negative or above 10^9.
        """
        lines: dict[int, bytes] = {}
        for ordinal, record in records:
            if not 0 <= ordinal <= _MAX_ORDINAL:
                raise ValueError(f"ordinal {ordinal} is not between 0 and {_MAX_ORDINAL}")
            line = encode_line(ordinal, record)
            known = lines.get(ordinal) or (self._line(ordinal) if ordinal in self else None)
            if known is None:
                lines[ordinal] = line
            elif not is_same_row(known, line):
                raise self._different(ordinal)
        if self._failed_flush is not None:
            raise self._failed_flush
        if not lines:
            return
        mark = b""
        if self._marked_to < self._flushed_to:
            mark = encode_line(FLUSHED, self._flushed_to)
            self._marked_to = self._flushed_to
        with self._writing:
            offset = self._file.write(mark + b"".join(lines.values())) + len(mark)
        for ordinal, line in lines.items():
            self._index(ordinal, offset)
            offset += len(line)
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self.flush()
        elif self._timer is None:  # the next unit may be minutes away
            self._timer = threading.Timer(FLUSH_SECONDS, self._flush_waiting)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Force everything to disk."""
        with self._writing:
            self._stop_timer()
            self._file.fsync()
            self._flushed_to = self._file.size
            self._flushed_at = time.monotonic()

    def _flush_waiting(self) -> None:
        with self._writing:
            if self._timer is threading.current_thread():
                try:
                    self.flush()
                except ReasonrunError:  # kept by ``Files``, which refuses the next write of the attempt
                    pass
                except Exception as error:  # here nobody would hear it
                    self._failed_flush = error

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def read(self, ordinal: int) -> dict[str, Any]:
        """One row. Raises KeyError when it is absent, RunFailed when its line has been damaged since."""
        if ordinal not in self:
            raise KeyError(ordinal)
        line = self._line(ordinal)
        if ordinal_of(line) != ordinal:
            raise self._damage(int(self._offsets[ordinal]))
        row: dict[str, Any] = record_of(line)
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in the order of their ordinals, one at a time."""
        for ordinal in self.ordinals():
            yield self.read(int(ordinal))

    def cut(self, first: int, set_aside: Callable[[str], Path]) -> None:
        """Set aside row ``first`` and everything that was logged after it. Raises KeyError when it is absent."""
        if first not in self:
            raise KeyError(first)
        offset = int(self._offsets[first])
        with self._writing:
            self._stop_timer()
            self._file.close()
        self._cut_file(offset, set_aside(f"{self.path.name}.from-{first}"))
        self._file = self._files.append(self.path, "wal")
        self._offsets[self._offsets >= offset] = -1
        self._num_rows = int(np.sum(self._offsets >= 0))
        self._flushed_to = self._marked_to = offset

    def close(self) -> None:
        """Flush and give the descriptors back. Calling it twice does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            try:
                self.flush()
            finally:
                self._file.close()

    def abandon(self) -> None:
        """Give the descriptors back without a flush: after a failure, or when the log is no longer needed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with self._writing:
                self._stop_timer()
                self._file.close()

    def _line(self, ordinal: int) -> bytes:
        offset, parts = int(self._offsets[ordinal]), []
        with self._files.explaining(self.path):
            while True:
                part = os.pread(self._descriptor, _READ_BYTES, offset)
                end = part.find(b"\n")
                parts.append(part if end < 0 else part[: end + 1])
                if end >= 0 or not part:
                    return b"".join(parts)
                offset += len(part)

    def _index(self, ordinal: int, offset: int) -> None:
        if ordinal >= len(self._offsets):
            grown = np.full(max(ordinal + 1, 2 * len(self._offsets)), -1, dtype=np.int64)
            grown[: len(self._offsets)] = self._offsets
            self._offsets = grown
        self._num_rows += int(self._offsets[ordinal] < 0)
        self._offsets[ordinal] = offset

    def _recover(self, set_aside: Callable[[str], Path]) -> None:
        """Index the file; cut off what a crash left at its end."""
        size = self.path.stat().st_size
        end = self._scan()
        if end < size:
            self._cut_file(end, set_aside(f"{self.path.name}.tail-{end}"))

    def _cut_file(self, end: int, aside: Path) -> None:
        with self._files.explaining(self.path), open(self.path, "rb") as file:
            file.seek(end)
            tail = file.read()
        self._files.write_atomic(aside, tail, "json")
        self._files.point("wal.before_truncate")
        self._files.truncate(self.path, end)

    def _scan(self) -> int:
        """Index every good line and return the offset where the usable part ends."""
        with self._files.explaining(self.path):
            extent = examine_log(self.path, self._add_scanned, stop_at_damage=True)
        if extent.damaged:
            raise self._damage(extent.damaged[0])
        return extent.end

    def _add_scanned(self, ordinal: int, line: bytes, offset: int) -> None:
        if ordinal in self and not is_same_row(self._line(ordinal), line):
            raise self._different(ordinal)
        self._index(ordinal, offset)

    def _damage(self, offset: int) -> RunFailed:
        return RunFailed(
            f"{self.path} is damaged at byte {offset}: a line in the middle does not match its checksum.",
            hint=self._redo_hint,
        )

    def _different(self, ordinal: int) -> RunFailed:
        return RunFailed(
            f"{self.path}: row {ordinal} was computed twice with different results (determinism check).",
            hint="something that is not part of the row's key changed its result; " + self._redo_hint,
        )


def repair(path: Path, files: Files, set_aside: Callable[[str], Path]) -> int:
    """Rewrite a damaged log with the lines that verify; the original is kept aside first.

    Returns:
        The number of lines that were given up.
    """
    places: dict[int, int] = {}
    differing: set[int] = set()
    num_lost = 0
    with files.explaining(path), open(path, "rb") as log, open(path, "rb") as earlier:
        for line, offset in _lines(log):
            ordinal = ordinal_of(line)
            if ordinal is None:
                num_lost += 1
            elif ordinal != FLUSHED:  # marks count bytes of the old file
                earlier.seek(places.setdefault(ordinal, offset))
                if places[ordinal] != offset and not is_same_row(earlier.readline(), line):
                    differing.add(ordinal)
                    num_lost += 1
    num_lost += len(differing)  # nobody knows which one is right
    kept = {offset for ordinal, offset in places.items() if ordinal not in differing}
    _copy(path, files, set_aside(f"{path.name}.damaged"), lambda offset: True)
    _copy(path, files, path, kept.__contains__)
    return num_lost


def _lines(log: BinaryIO) -> Iterator[tuple[bytes, int]]:
    offset = 0
    for line in log:
        yield line, offset
        offset += len(line)


def _copy(path: Path, files: Files, target: Path, keep: Callable[[int], bool]) -> None:
    """Write the lines of a log whose offsets ``keep`` accepts to a file that appears complete."""
    new = files.create(target, "json")
    try:
        with files.explaining(path), open(path, "rb") as log:
            for line, offset in _lines(log):
                if keep(offset):
                    new.write(line)
        new.commit()
    finally:
        new.close()


def _open_to_read(path: Path, files: Files) -> int:
    is_new = not path.exists()
    with files.explaining(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    if is_new:
        files.sync_folder(path.parent)
    return descriptor
