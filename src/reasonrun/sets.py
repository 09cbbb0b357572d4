"""Sets of records: a memory-mapped Arrow table and row indexes; a record object is made when somebody asks for it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reasonrun.columns import Column, arrow_schema, as_numpy, columns_of, decode_column, from_arrow_rows, to_arrow_rows
from reasonrun.errors import EnvironmentProblem, RunFailed
from reasonrun.records import Record, digest

__all__ = ["Rows", "arrow_schema", "to_arrow_rows"]

R = TypeVar("R", bound=Record)

BATCH_ROWS = 2_000
_GATHER_ROWS = 256
_CACHE_FORMAT = 1


class Rows(Generic[R]):
    """An ordered set of records of one type.

    It costs 8 bytes a row at most; the rows stay in the mapped file (``load``) or in Arrow memory (``of``).
    """

    def __init__(
        self, record_type: type[R], batches: Sequence[pa.RecordBatch], indexes: npt.NDArray[np.int64] | None = None
    ) -> None:
        self.record_type = record_type
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)], dtype=np.int64)
        self._indexes = indexes

    @classmethod
    def of(cls, record_type: type[R], records: Iterable[R]) -> Rows[R]:
        """A set in memory."""
        remaining, batches = iter(records), []
        while group := list(islice(remaining, BATCH_ROWS)):
            batches.append(to_arrow_rows(record_type, group))
        return cls(record_type, batches)

    @classmethod
    def load(
        cls, record_type: type[R], parquet_paths: Sequence[Path], cache_dir: Path, digests: Sequence[str] | None = None
    ) -> Rows[R]:
        """The rows of sealed Parquet shards, read through an Arrow IPC cache that is rebuilt when missing or stale.

        Args:
            record_type: what the rows are.
            parquet_paths: the shards, in order.
            cache_dir: where caches live; everything in it may be deleted at any time.
            digests: SHA-256 of each shard, if known; otherwise a shard is recognised by name, size and time.

        Raises:
            RunFailed: a shard is damaged or holds other columns.
            EnvironmentProblem: there is no space for the cache.
        """
        return cls(record_type, _cached(record_type, [Path(path) for path in parquet_paths], Path(cache_dir), digests))

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._indexes is None else len(self._indexes)

    def __iter__(self) -> Iterator[R]:
        for start in range(0, len(self), _GATHER_ROWS):
            yield from self._gather(self._positions(start, min(start + _GATHER_ROWS, len(self))))

    @overload
    def __getitem__(self, key: int) -> R: ...
    @overload
    def __getitem__(self, key: slice) -> Rows[R]: ...
    def __getitem__(self, key: int | slice) -> R | Rows[R]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return self.take(np.arange(len(self))[key])
            return type(self)(self.record_type, self._batches, self._positions(start, max(start, stop)))
        position = key + len(self) if key < 0 else key
        if not 0 <= position < len(self):
            raise IndexError(f"row {key} of a set of {len(self)}")
        return self._gather(self._positions(position, position + 1))[0]

    def take(self, indexes: Sequence[int] | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]) -> Rows[R]:
        """The rows at ``indexes`` (or where a mask is true), in that order, sharing the memory. Raises IndexError."""
        wanted = np.asarray(indexes)
        if wanted.dtype != np.bool_:
            wanted = wanted.astype(np.int64)
        chosen = self._positions(0, len(self))[wanted]
        return type(self)(self.record_type, self._batches, chosen)

    def column(self, name: str) -> Any:
        """One field of every row; dots reach into nested records (``score.value``).

        Returns:
            A NumPy array for ``int``, ``float`` and ``bool``, else (strings, optional and composite fields) a list.

        Raises:
            KeyError: there is no such field.
        """
        path = _path(self.record_type, name)
        is_array = path[-1][1].kind in ("int", "float", "bool") and not any(column.is_optional for _, column in path)
        parts, order = [], []
        for batch, local, places in self._grouped(self._positions(0, len(self))):
            array = _pick(_descend(batch, path), local)
            parts.append(as_numpy(path[-1][1], array) if is_array else decode_column(path[-1][1], array))
            order.append(places)
        if is_array:
            kind = {"int": np.int64, "float": np.float64, "bool": np.bool_}[path[-1][1].kind]
            result: npt.NDArray[Any] = np.empty(len(self), dtype=kind)
            for places, part in zip(order, parts, strict=True):
                result[places] = part
            return result
        values: list[Any] = [None] * len(self)
        for places, part in zip(order, parts, strict=True):
            for place, value in zip(places.tolist(), part, strict=True):
                values[place] = value
        return values

    def parts(self) -> Iterator[Rows[R]]:
        """The set in consecutive pieces of at most ``BATCH_ROWS`` rows, for work in flat memory."""
        for start in range(0, len(self), BATCH_ROWS):
            yield self[start : start + BATCH_ROWS]

    def _positions(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.arange(start, stop) if self._indexes is None else self._indexes[start:stop]

    def _grouped(
        self, positions: npt.NDArray[np.int64]
    ) -> Iterator[tuple[pa.RecordBatch, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """The touched batches, with the rows wanted of each and their places in the answer."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1
        for places in np.split(order, cuts) if len(positions) else []:
            number = int(numbers[places[0]])
            yield self._batches[number], positions[places] - self._starts[number], places

    def _gather(self, positions: npt.NDArray[np.int64]) -> list[R]:
        records: list[Any] = [None] * len(positions)
        for batch, local, places in self._grouped(positions):
            part = _pick(batch, local)
            for place, record in zip(places.tolist(), from_arrow_rows(self.record_type, part), strict=True):
                records[place] = record
        return records


def _pick(rows: Any, local: npt.NDArray[np.int64]) -> Any:
    """The rows ``local`` of a batch or array; a run of rows is a view."""
    if len(local) == 1 or bool(np.all(np.diff(local) == 1)):
        return rows.slice(int(local[0]), len(local))
    return rows.take(pa.Array.from_buffers(pa.int64(), len(local), [None, pa.py_buffer(local)]))


def _path(record_type: type[Record], name: str) -> list[tuple[int, Column]]:
    """Position and column at each level of a dotted name."""
    fields, path = columns_of(record_type), []
    for part in name.split("."):
        found = [(i, column) for i, column in enumerate(fields) if column.name == part]
        if not found:
            raise KeyError(f"{record_type.__name__} has no field {name!r}")
        path += found
        fields = found[0][1].fields
    return path


def _descend(batch: pa.RecordBatch, path: list[tuple[int, Column]]) -> pa.Array:
    array = batch.column(path[0][0])
    for i, _ in path[1:]:
        array = array.field(i)  # null where its parent is: columns are written so
    return array


def _cached(
    record_type: type[Record], paths: list[Path], cache_dir: Path, digests: Sequence[str] | None
) -> list[pa.RecordBatch]:
    """The batches of an up-to-date cache file.

    A cache is trusted while its size and time are those it had when it was finished and its shards are the same.
    """
    cache_path, note_path, key = _cache_of(record_type, paths, cache_dir, digests)
    batches = _read_cache(cache_path, note_path, key)
    if batches is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _build_cache(record_type, paths, cache_path, note_path, key)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise EnvironmentProblem(
                f"No space left for the cache {cache_path}. Nothing that was committed is damaged.",
                hint=f"free space (all of {cache_dir} may be deleted); the same command then continues",
            ) from error
        batches = _read_cache(cache_path, note_path, key)
    if batches is None:
        raise RunFailed(f"The cache {cache_path} changes while it is read.", hint="run the same command again")
    return batches


def _cache_of(
    record_type: type[Record], paths: list[Path], cache_dir: Path, digests: Sequence[str] | None
) -> tuple[Path, Path, dict[str, Any]]:
    """Cache file, the note that vouches for it, and what the note must say."""
    name = digest([record_type.__name__, *(os.path.relpath(path, cache_dir) for path in paths)])
    key = {"format": _CACHE_FORMAT, "schema": str(arrow_schema(record_type)), "shards": _shard_keys(paths, digests)}
    return cache_dir / f"{name}.arrow", cache_dir / f"{name}.json", key


def _shard_keys(paths: list[Path], digests: Sequence[str] | None) -> list[list[Any]]:
    if digests is not None:
        return [[path.name, sha256] for path, sha256 in zip(paths, digests, strict=True)]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _read_cache(cache_path: Path, note_path: Path, key: dict[str, Any]) -> list[pa.RecordBatch] | None:
    try:
        status, note = cache_path.stat(), json.loads(note_path.read_bytes())
        if note != {"key": key, "size": status.st_size, "mtime_ns": status.st_mtime_ns}:
            return None
        reader = pa.ipc.open_file(pa.memory_map(str(cache_path)))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, ValueError):  # pyarrow.ArrowInvalid is a ValueError
        return None


def _build_cache(
    record_type: type[Record], paths: list[Path], cache_path: Path, note_path: Path, key: dict[str, Any]
) -> None:
    """Write the cache, one batch in memory at a time, and the note that vouches for it after it."""
    temporary = cache_path.with_name(f"{cache_path.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, arrow_schema(record_type)) as writer:
            for path in paths:
                for batch in read_shard(path, arrow_schema(record_type)):
                    writer.write_batch(batch)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())  # size and time, which the note goes by, may be on disk before the rows are
        status = temporary.stat()
        note = {"key": key, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        os.replace(temporary, cache_path)
        temporary.write_text(json.dumps(note), encoding="utf-8")
        os.replace(temporary, note_path)
    finally:
        temporary.unlink(missing_ok=True)


def differing_cache(record_type: type[Record], parquet_paths: Sequence[Path], cache_dir: Path) -> Path | None:
    """The cache of these shards when it would be trusted and holds other rows than they do; None when all is well.

    Raises:
        RunFailed: a shard is damaged.
    """
    cache_path, note_path, key = _cache_of(record_type, list(parquet_paths), cache_dir, None)
    batches = _read_cache(cache_path, note_path, key)
    if batches is None:
        return None
    sealed = (batch for path in parquet_paths for batch in read_shard(path, arrow_schema(record_type)))
    return None if all(_is_equal(*pair) for pair in zip_longest(batches, sealed)) else cache_path


def _is_equal(cached: pa.RecordBatch | None, sealed: pa.RecordBatch | None) -> bool:
    if cached is None or sealed is None:
        return False
    try:
        cached.validate(full=True)  # reading offsets that point anywhere could end the process
    except ValueError:
        return False
    return bool(cached.equals(sealed)) or repr(cached.to_pylist()) == repr(sealed.to_pylist())  # NaN is not itself


def read_shard(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of one sealed shard, in batches of ``BATCH_ROWS``. Raises RunFailed when it is damaged."""
    import pyarrow.parquet as pq  # a set in memory does not need it

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                yield batch if batch.schema.equals(schema) else batch.cast(schema)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunFailed(
            f"Committed data is damaged: {path} cannot be read ({error}).",
            hint="run the same command with --redo and the name of the step that made it",
        ) from error
