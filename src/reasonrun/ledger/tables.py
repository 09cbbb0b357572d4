"""Sealed tables: records as Parquet shards whose bytes depend on the records alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from reasonrun.columns import arrow_schema, to_arrow_rows
from reasonrun.ledger.files import FileEntry, Files
from reasonrun.records import Record

SHARD_ROWS = 50_000
ROW_GROUP_ROWS = 2_000


def shard_name(table: str, number: int) -> str:
    return f"{table}-{number:05d}.parquet"


def write_shards(
    folder: Path, table: str, record_type: type[Record], rows: Iterable[Record], files: Files
) -> dict[str, FileEntry]:
    """Write ``rows`` in the given order, at least one shard, holding one row group in memory at a time.

    Returns:
        Size and hash of each shard, by file name.
    """
    written: dict[str, FileEntry] = {}
    remaining = iter(rows)
    while True:
        first = list(islice(remaining, ROW_GROUP_ROWS))
        if not first and written:
            return written
        name = shard_name(table, len(written))
        groups = chain([first], _groups(islice(remaining, SHARD_ROWS - len(first))))
        written[name] = _write_shard(folder / name, record_type, groups, files)


def _groups(rows: Iterator[Record]) -> Iterator[list[Record]]:
    while group := list(islice(rows, ROW_GROUP_ROWS)):
        yield group


def _write_shard(path: Path, record_type: type[Record], groups: Iterable[list[Record]], files: Files) -> FileEntry:
    sink: Any = files.create(path, "seal")
    writer = pq.ParquetWriter(sink, arrow_schema(record_type), compression="zstd", write_page_checksum=True)
    try:
        for group in groups:
            writer.write_batch(to_arrow_rows(record_type, group), row_group_size=ROW_GROUP_ROWS)
        writer.close()
        entry: FileEntry = sink.commit()
        return entry
    finally:
        sink.close()
        writer.close()
