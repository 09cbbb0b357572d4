"""What has been exported: the mark in ``derived/wandb.json``, and W&B's own file where it says more.

The mark is written after a row was handed to W&B, so it can be ahead of W&B's file (buffered, then killed) or behind it
(killed in between). The file of the last session settles it: a new session begins after the last history entry in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FORMAT = 1
_BLOCK = 32768
_HEADER = struct.Struct("<IHB")  # CRC-32, length, type: the log format of LevelDB
_FILE_HEADER = 7  # ":W&B", a magic number, a version
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far the export is. Rows are lines of ``metrics.jsonl``, points are W&B history steps.

    ``session_dir`` (relative to the run directory) holds what the last session wrote, from point ``first_point`` on;
    ``is_clean`` says that W&B took all of it. ``rows`` are digests of the exported lines. ``processes`` are (pid, start
    time) of the session's own processes. ``superseded`` are W&B runs whose rows the run has made again since.
    """

    run_id: str
    mode: str = ""
    num_rows: int = 0
    num_points: int = 0
    rows: tuple[str, ...] = ()
    session_dir: str = ""
    first_point: int = 0
    is_clean: bool = False
    processes: tuple[tuple[int, float], ...] = ()
    superseded: tuple[str, ...] = field(default=())

    def with_row(self, position: int, line: bytes, num_points: int) -> Mark:
        """The mark after the row at ``position`` is exported. Digests of rows further down stay, to be compared."""
        known = self.rows if position < len(self.rows) else (*self.rows, row_digest(line))
        return replace(self, num_rows=max(self.num_rows, position + 1), num_points=num_points, rows=known)

    def contradicts(self, lines: Sequence[bytes]) -> bool:
        """Whether an exported row has since been made again with another content (a step was redone)."""
        return any(known != row_digest(line) for known, line in zip(self.rows, lines, strict=False))


def row_digest(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def mark_path(run_dir: Path) -> Path:
    return run_dir / "derived" / "wandb.json"


def read_mark(run_dir: Path) -> Mark | None:
    """The mark; None when nothing was exported or the file cannot be read (it is only a cache of what W&B holds)."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        value: dict[str, Any] = json.loads(mark_path(run_dir).read_bytes())
        if value.pop("format") == FORMAT:
            value |= {key: tuple(value[key]) for key in ("rows", "superseded")}
            return Mark(**value | {"processes": tuple((int(pid), float(began)) for pid, began in value["processes"])})
    return None


def write_mark(run_dir: Path, mark: Mark) -> None:
    """Replace the mark. Not synced to disk: after a power cut W&B's file settles what is missing."""
    path = mark_path(run_dir)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"format": FORMAT, **asdict(mark)}) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def next_point(run_dir: Path, mark: Mark) -> int:
    """The first W&B step that no session has written."""
    files = sorted((run_dir / mark.session_dir).glob("run-*.wandb")) if mark.session_dir else []
    if not files:
        return mark.num_points
    steps = [step for path in files for step in history_steps(path)]
    return max([mark.first_point, *(step + 1 for step in steps)])


def history_steps(path: Path) -> Iterator[int]:
    """W&B steps of the history entries in a ``run-*.wandb`` file, up to the first torn record."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
    from wandb.proto import wandb_internal_pb2

    for data in _log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(data)
        except DecodeError:
            return
        if record.HasField("history"):
            yield int(record.history.step.num)


def _log_records(data: bytes) -> Iterator[bytes]:
    position, parts = _FILE_HEADER, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        payload = data[position + _HEADER.size : position + _HEADER.size + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(payload) < length:
            return
        position += _HEADER.size + length
        parts = payload if kind in (_FULL, _FIRST) else parts + payload
        if kind in (_FULL, _LAST):
            yield parts
