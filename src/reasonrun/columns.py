"""Records as Arrow columns and back: the schema comes from the annotations, the round trip is exact.

``str`` and ``Literal`` of strings become string, ``int`` int64, ``float`` double, ``bool`` bool, ``tuple[int, ...]``
(token ids) list of int32, other tuples and lists a list, a nested record a struct, ``dict`` and other free JSON a
string of JSON; ``X | None`` is X with nulls. Arrow strings must be valid UTF-8, so a lone surrogate (which decoding
broken model output can give) is stored as U+FDD0, a Unicode noncharacter, and four hex digits.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import JsonValue

from reasonrun.records import Record

Kind = Literal["int", "float", "bool", "str", "json", "list", "record"]

_ESCAPE = "\ufdd0"
_TO_ESCAPE = re.compile("[\ud800-\udfff\ufdd0]")
_ESCAPED = re.compile("\ufdd0([0-9a-f]{4})")
_NUMPY = {pa.int64(): np.int64, pa.int32(): np.int32, pa.float64(): np.float64, pa.bool_(): np.bool_}
_SCALARS: dict[Any, Kind] = {int: "int", float: "float", bool: "bool", str: "str"}


@dataclass(frozen=True)
class Column:
    """How one annotation is stored."""

    name: str
    kind: Kind
    type: pa.DataType
    is_optional: bool
    item: Column | None = None  # of a list
    container: Callable[[list[Any]], Any] = list  # of a list: tuple or list
    record_type: type[Record] | None = None
    fields: tuple[Column, ...] = ()  # of a record


@lru_cache(maxsize=64)
def columns_of(record_type: type[Record]) -> tuple[Column, ...]:
    """One column per field, in declaration order. Raises TypeError for an annotation that has no column type."""
    return tuple(
        _column(field.annotation, name, f"{record_type.__name__}.{name}")
        for name, field in record_type.model_fields.items()
    )


def arrow_schema(record_type: type[Record]) -> pa.Schema:
    """The Arrow schema of a record type, without metadata. Raises TypeError as ``columns_of`` does."""
    return pa.schema([pa.field(column.name, column.type) for column in columns_of(record_type)])


def to_arrow_rows(record_type: type[Record], records: Sequence[Record]) -> pa.RecordBatch:
    """A batch with one row per record. Raises pyarrow.ArrowInvalid or OverflowError for an integer out of range."""
    arrays = [
        _encode(column, [record.__dict__[column.name] for record in records]) for column in columns_of(record_type)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=arrow_schema(record_type))


def from_arrow_rows(record_type: type[Record], batch: pa.RecordBatch) -> list[Any]:
    """The records of a batch that ``to_arrow_rows`` made. They are built without validating them again."""
    columns = columns_of(record_type)
    values = [decode_column(column, batch.column(i)) for i, column in enumerate(columns)]
    return _build(record_type, columns, values, batch.num_rows)


def decode_column(column: Column, array: pa.Array) -> list[Any]:
    """Python values of one Arrow array."""
    if column.kind == "list":
        values = _decode_lists(column, array)
    elif column.kind == "record":
        assert column.record_type is not None
        children = [decode_column(field, array.field(i)) for i, field in enumerate(column.fields)]
        values = _build(column.record_type, column.fields, children, len(array))
    elif column.kind in ("str", "json"):
        values = [text if text is None or _ESCAPE not in text else _unescape(text) for text in array.to_pylist()]
        if column.kind == "json":
            values = [None if text is None else json.loads(text) for text in values]
        return values
    else:
        return list(array.to_pylist()) if array.null_count else list(as_numpy(column, array).tolist())
    if array.null_count:
        present = _bits(array.buffers()[0], array.offset, len(array)).tolist()
        values = [value if is_there else None for value, is_there in zip(values, present, strict=True)]
    return values


def as_numpy(column: Column, array: pa.Array) -> npt.NDArray[Any]:
    """An array of numbers or truth values without nulls, zero-copy for numbers.

    Arrow's own ``to_numpy`` imports pandas where it is installed, which takes half a second.
    """
    if column.kind == "bool":
        return _bits(array.buffers()[1], array.offset, len(array))
    return np.frombuffer(array.buffers()[1] or b"", _NUMPY[array.type])[array.offset : array.offset + len(array)]


def _bits(buffer: pa.Buffer, offset: int, length: int) -> npt.NDArray[np.bool_]:
    data = np.frombuffer(buffer or b"", np.uint8)[offset // 8 : (offset + length + 7) // 8]
    return np.unpackbits(data, bitorder="little")[offset % 8 :][:length].astype(np.bool_)


def _decode_lists(column: Column, array: pa.ListArray) -> list[Any]:
    assert column.item is not None
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1].tolist()
    first = offsets[0]
    flat = decode_column(column.item, array.values.slice(first, offsets[-1] - first))
    return [column.container(flat[start - first : end - first]) for start, end in pairwise(offsets)]


def _build(record_type: type[Record], columns: Sequence[Column], values: list[list[Any]], num_rows: int) -> list[Any]:
    names = [column.name for column in columns]
    if not names:
        return [record_type() for _ in range(num_rows)]
    construct, fields_set = record_type.model_construct, set(names)
    return [construct(set(fields_set), **dict(zip(names, row, strict=True))) for row in zip(*values, strict=True)]


def _encode(column: Column, values: list[Any]) -> pa.Array:
    """An Arrow array built from buffers; ``pa.array`` imports pandas where it is installed, half a second."""
    present = np.fromiter((value is not None for value in values), np.bool_, len(values))
    validity = None if present.all() else pa.py_buffer(np.packbits(present, bitorder="little").tobytes())
    if column.kind == "list":
        assert column.item is not None
        flat = [item for value in values if value is not None for item in value]
        buffers = [validity, _offsets(0 if value is None else len(value) for value in values)]
        arrays = [_encode(column.item, flat)]
    elif column.kind == "record":
        buffers = [validity]
        arrays = [
            _encode(field, [None if value is None else value.__dict__[field.name] for value in values])
            for field in column.fields
        ]
    elif column.kind in ("json", "str"):
        texts = [b"" if value is None else _text(column, value) for value in values]
        return pa.Array.from_buffers(
            column.type, len(values), [validity, _offsets(map(len, texts)), pa.py_buffer(b"".join(texts))]
        )
    else:
        numbers: npt.NDArray[Any] = np.array(
            [0 if value is None else value for value in values], dtype=_NUMPY[column.type]
        )
        data = np.packbits(numbers, bitorder="little") if column.kind == "bool" else numbers
        return pa.Array.from_buffers(column.type, len(values), [validity, pa.py_buffer(data.tobytes())])
    return pa.Array.from_buffers(column.type, len(values), buffers, children=arrays)


def _offsets(lengths: Iterable[int]) -> pa.Buffer:
    ends = np.cumsum([0, *lengths], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise OverflowError("a batch of records holds more than 2^31 bytes or items in one field")
    return pa.py_buffer(ends.astype(np.int32).tobytes())


def _text(column: Column, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False) if column.kind == "json" else value
    return (text if text.isascii() else _TO_ESCAPE.sub(_escape, text)).encode()


def _escape(match: re.Match[str]) -> str:
    return f"{_ESCAPE}{ord(match[0]):04x}"


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def _column(annotation: Any, name: str, where: str) -> Column:
    if annotation is JsonValue or annotation in (Any, object) or get_origin(annotation) is dict or annotation is dict:
        return Column(name, "json", pa.string(), False)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _optional(arguments, name, where)
    if annotation in _SCALARS:
        kind = _SCALARS[annotation]
        return Column(name, kind, _arrow_type(kind), False)
    if origin is Literal and all(isinstance(value, str) for value in arguments):
        return Column(name, "str", pa.string(), False)
    if origin is list or (origin is tuple and len(arguments) == 2 and arguments[1] is ...):
        item = _column(arguments[0], "element", where)
        item_type = pa.int32() if item.kind == "int" and origin is tuple else item.type
        list_type = pa.list_(pa.field("element", item_type))
        item = Column(
            "element", item.kind, item_type, item.is_optional, item.item, item.container, item.record_type, item.fields
        )
        return Column(name, "list", list_type, False, item, origin)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        fields = columns_of(annotation)
        struct = pa.struct([pa.field(field.name, field.type) for field in fields])
        return Column(name, "record", struct, False, record_type=annotation, fields=fields)
    raise TypeError(f"{where}: {annotation} has no column type; see reasonrun.columns for those that have")


def _optional(arguments: tuple[Any, ...], name: str, where: str) -> Column:
    present = [argument for argument in arguments if argument is not type(None)]
    if len(present) != 1:
        raise TypeError(f"{where}: a union of {len(present)} types has no column type; only X | None has")
    column = _column(present[0], name, where)
    if column.kind == "json":
        raise TypeError(f"{where}: optional free JSON is ambiguous, because null is a JSON value; drop the '| None'")
    return Column(
        name, column.kind, column.type, True, column.item, column.container, column.record_type, column.fields
    )


def _arrow_type(kind: Kind) -> pa.DataType:
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}[kind]
