"""Ways in which a run directory comes to harm: on the disk, or by somebody who also mends the checksums."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reasonrun.ledger.files import FileEntry, Files
from reasonrun.ledger.seals import Seal, read_seal, write_seal


def flip(path: Path, place: int = -30) -> None:
    """Turn one bit of a file; its size and its time stay."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> None:
    """Make the seal of a step fit what its files are now, and change what it remembers."""
    seal = read_seal(folder)
    assert seal is not None
    content = json.loads(json.dumps(seal.content))
    change(content)
    entries = {name: _entry(folder / name) for name in seal.files}
    write_seal(folder, Seal(entries, content), Files(), "ok")


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, Files().hash(path))


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Write a Parquet file again with other rows."""
    table = pq.read_table(path)
    rows = change(table.to_pylist())
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
