"""Sealed tables: records as Parquet shards whose bytes depend on the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq

from reasonrun.columns import arrow_schema, to_arrow_rows
from reasonrun.ledger.files import FileEntry, Files
from reasonrun.records import Record

SHARD_ROWS = 50_000
ROW_GROUP_ROWS = 2_000


def shard_name(table: str, number: int) -> str:
    return f"{table}-{number:05d}.parquet"


class TableWriter:
    """A table written row by row, one row group in memory at a time; at least one shard, complete when it closes.

    Use it as a context manager: leaving it by an exception takes back the shard that was not finished.
    ``entries`` are size and hash of each finished shard, by file name.
    """

    def __init__(self, folder: Path, table: str, record_type: type[Record], files: Files) -> None:
        self.entries: dict[str, FileEntry] = {}
        self.num_rows = 0
        self._folder, self._table, self._record_type, self._files = folder, table, record_type, files
        self._group: list[Record] = []
        self._sink: Any = None
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._group or not self.num_rows:
                    self._write_group()
                self._finish_shard()
        finally:
            self._close_shard()

    def append(self, row: Record) -> None:
        self._group.append(row)
        self.num_rows += 1
        is_full = self.num_rows % SHARD_ROWS == 0
        if is_full or len(self._group) == ROW_GROUP_ROWS:
            self._write_group()
        if is_full:
            self._finish_shard()

    def _write_group(self) -> None:
        if self._writer is None:
            self._sink = self._files.create(self._folder / self._shard(), "seal")
            self._writer = pq.ParquetWriter(
                self._sink, arrow_schema(self._record_type), compression="zstd", write_page_checksum=True
            )
        self._writer.write_batch(to_arrow_rows(self._record_type, self._group), row_group_size=ROW_GROUP_ROWS)
        self._group = []

    def _finish_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.entries[self._shard()] = self._sink.commit()
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._sink.close()
            self._writer.close()
            self._sink = self._writer = None

    def _shard(self) -> str:
        return shard_name(self._table, len(self.entries))
