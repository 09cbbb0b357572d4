"""Sets of records: exact round trips, memory-mapped caches, index arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from reasonrun import sets
from reasonrun.errors import RunFailed
from reasonrun.records import (
    Graded,
    Message,
    PreferenceExample,
    Problem,
    Record,
    Rollout,
    Sampling,
    Score,
    Segment,
    SFTExample,
)
from reasonrun.sets import Rows, arrow_schema, to_arrow_rows

texts = st.one_of(
    st.text(st.characters(codec=None), max_size=8),  # lone surrogates and NUL included
    st.sampled_from(
        ["", "\0", "\ud800", "\ud83d\ude00", "😀", "\ufdd0", "\ufdd0d800", "\\ud800", "\ufdd0\ud800\ufdd0"]
    ),
)
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
floats = st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | floats | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
messages = st.lists(st.builds(Message, role=st.sampled_from(["user", "assistant"]), content=texts), max_size=2).map(
    tuple
)
segments = st.builds(
    Segment,
    token_ids=token_ids,
    src=st.sampled_from(["model", "hint"]),
    loss=st.booleans(),
    weight=floats,
    step=st.integers(-(2**63), 2**63 - 1),
)
rollouts = st.builds(
    Rollout,
    id=texts,
    problem_id=texts,
    index=st.integers(0, 9),
    parent_id=st.none() | texts,
    kind=texts,
    messages=messages,
    prompt_ids=token_ids,
    segments=st.lists(segments, max_size=3).map(tuple),
    text=texts,
    finish_reason=st.sampled_from(["stop", "length"]),
    logps=st.none() | st.lists(floats, max_size=3).map(tuple),
    policy=texts,
    sampling=st.builds(Sampling, stop=st.lists(texts, max_size=2).map(tuple), logprobs=st.booleans()),
    seed=st.integers(0, 2**63 - 1),
)
scores = st.builds(Score, value=st.none() | floats, answer=st.none() | texts, reason=texts, grader=texts)
problems = st.builds(
    Problem,
    id=texts,
    task=texts,
    split=texts,
    messages=messages,
    reference=texts,
    meta=st.dictionaries(texts, json_values, max_size=2),
)


class Leaf(Record):
    flag: bool | None
    name: Literal["a", "b"] = "a"


class Tree(Record):
    """Every combination that the project's own records leave out."""

    leaf: Leaf | None
    leaves: tuple[Leaf | None, ...] | None = None
    nested: tuple[tuple[int, ...], ...] = ()
    words: list[str]
    free: list[dict[str, JsonValue]]


leaves = st.builds(Leaf, flag=st.none() | st.booleans(), name=st.sampled_from(["a", "b"]))
trees = st.builds(
    Tree,
    leaf=st.none() | leaves,
    leaves=st.none() | st.lists(st.none() | leaves, max_size=3).map(tuple),
    nested=st.lists(token_ids, max_size=3).map(tuple),
    words=st.lists(texts, max_size=2),
    free=st.lists(st.dictionaries(texts, json_values, max_size=1), max_size=2),
)


def shards(folder: Path, record_type: type[Record], records: Sequence[Record], size: int) -> list[Path]:
    """Parquet files of ``size`` rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, max(len(records), 1), size):
        paths.append(folder / f"rows-{start:05d}.parquet")
        batch = to_arrow_rows(record_type, records[start : start + size])
        pq.write_table(pa.Table.from_batches([batch]), paths[-1])
    return paths


def score(i: int) -> Score:
    return Score(value=i / 2, answer=None if i % 3 else str(i), reason="correct" if i % 2 else "wrong", grader="g-1")


def rollout(i: int, num_tokens: int = 3) -> Rollout:
    return Rollout(
        id=f"r{i}",
        problem_id=f"p{i // 4}",
        index=i % 4,
        kind="plain",
        messages=(Message(role="user", content=f"What is {i}?"),),
        prompt_ids=(1, 2, i),
        segments=(Segment(token_ids=tuple(range(i, i + num_tokens)), src="model", loss=True),),
        text=f"text {i}",
        finish_reason="stop",
        policy="d",
        sampling=Sampling(temperature=0.5),
        seed=2**62 + i,
    )


@pytest.fixture(params=[5, 2_000])
def small_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets that span many batches, and sets in one."""
    monkeypatch.setattr(sets, "BATCH_ROWS", request.param)


@pytest.mark.parametrize(
    ("record_type", "records"),
    [
        (Rollout, rollouts),
        (Graded, st.builds(Graded, rollout=rollouts, score=scores)),
        (Problem, problems),
        (Tree, trees),
    ],
    ids=["rollout", "graded", "problem", "tree"],
)
def test_records_come_back_equal(
    record_type: type[Record], records: st.SearchStrategy[Record], tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(records, max_size=6), st.integers(0, 6), st.integers(0, 6))
    def check(rows: list[Record], start: int, stop: int) -> None:
        in_memory = Rows.of(record_type, rows)
        assert list(in_memory) == rows
        assert list(in_memory[start:stop]) == rows[start:stop]
        assert [type(row) for row in in_memory] == [record_type] * len(rows)
        assert list(in_memory.take(range(len(rows))[::-1])) == rows[::-1]

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(records, max_size=6))
    def check_files(rows: list[Record]) -> None:
        folder = tmp_path_factory.mktemp("shards")
        assert list(Rows.load(record_type, shards(folder, record_type, rows, 4), folder / "derived")) == rows

    check()
    check_files()


def test_the_schema_follows_the_annotations() -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    tokens = pa.list_(pa.field("element", pa.int32()))
    assert arrow_schema(Problem).field("messages").type == pa.list_(pa.field("element", message))
    assert {field.name: field.type for field in arrow_schema(Problem)} == {
        "id": pa.string(),
        "task": pa.string(),
        "split": pa.string(),
        "messages": pa.list_(pa.field("element", message)),
        "reference": pa.string(),
        "meta": pa.string(),
    }
    segment = [
        ("token_ids", tokens),
        ("src", pa.string()),
        ("loss", pa.bool_()),
        ("weight", pa.float64()),
        ("step", pa.int64()),
    ]
    assert arrow_schema(SFTExample).field("segments").type == pa.list_(pa.field("element", pa.struct(segment)))
    assert arrow_schema(PreferenceExample).field("chosen_ids").type == tokens
    assert arrow_schema(Score).field("value").type == pa.float64()
    with pytest.raises(OverflowError):
        to_arrow_rows(
            PreferenceExample,
            [PreferenceExample(problem_id="", rollout_ids=(), prefix_ids=(2**31,), chosen_ids=(), rejected_ids=())],
        )


def test_annotations_without_a_column_are_refused() -> None:
    class Wide(Record):
        value: int | str

    class Free(Record):
        value: dict[str, int] | None

    for record_type, where in ((Wide, "Wide.value"), (Free, "Free.value")):
        with pytest.raises(TypeError, match=where):
            arrow_schema(record_type)


@pytest.mark.usefixtures("small_batches")
def test_index_arrays_select_and_order_rows(tmp_path: Path) -> None:
    records = [rollout(i) for i in range(23)]
    paths = shards(tmp_path, Rollout, records, 9)
    for rows in (Rows.of(Rollout, records), Rows.load(Rollout, paths, tmp_path / "derived")):
        assert len(rows) == 23 and rows[22] == records[22] and rows[-23] == records[0]
        wanted = [22, 0, 7, 7, 13, 1]
        taken = rows.take(wanted)
        assert list(taken) == [records[i] for i in wanted] and taken[2] == records[7]
        assert taken.column("id") == [f"r{i}" for i in wanted]
        assert taken.column("seed").tolist() == [2**62 + i for i in wanted]
        again = taken.take(np.array([True, False, False, True, True, False]))
        assert again.column("id") == ["r22", "r7", "r13"]
        assert again.column("messages") == [records[i].messages for i in (22, 7, 13)]
        assert rows[20:].column("id") == ["r20", "r21", "r22"] and rows[:0].column("id") == [] and list(rows[:0]) == []
        for wrong in (23, -24):
            with pytest.raises(IndexError):
                rows[wrong]
        with pytest.raises(IndexError):
            rows.take([23])


@pytest.mark.usefixtures("small_batches")
def test_columns_are_arrays_for_numbers_and_lists_otherwise() -> None:
    graded = [Graded(rollout=rollout(i), score=score(i)) for i in range(11)]
    rows = Rows.of(Graded, graded)
    index = rows.column("rollout.index")
    assert index.dtype == np.int64 and index.tolist() == [i % 4 for i in range(11)]
    temperature = rows.column("rollout.sampling.temperature")
    assert temperature.dtype == np.float64 and temperature.tolist() == [0.5] * 11
    assert rows.column("rollout.sampling.logprobs").tolist() == [False] * 11
    assert rows.column("score.value") == [i / 2 for i in range(11)]
    assert rows.column("score.answer") == [None if i % 3 else str(i) for i in range(11)]
    assert rows.column("score") == [row.score for row in graded]
    assert rows.column("rollout.id") == [f"r{i}" for i in range(11)]
    parts = list(rows[1:].parts())
    assert len(parts) == math.ceil(10 / sets.BATCH_ROWS) and [row for part in parts for row in part] == graded[1:]
    leaves = [Tree(leaf=leaf, words=[], free=[]) for leaf in (None, Leaf(flag=True), None, Leaf(flag=None))]
    assert Rows.of(Tree, leaves).column("leaf.flag") == [None, True, None, None]
    assert Rows.of(Tree, leaves)[1:].column("leaf.name") == ["a", None, "a"]
    with pytest.raises(KeyError, match=r"Graded has no field 'score\.x'"):
        rows.column("score.x")
    assert Rows.of(Graded, []).column("rollout.index").tolist() == []


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_or_stale_cache_is_built_again(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    records = [rollout(i) for i in range(20)]
    paths = shards(tmp_path, Rollout, records, 10)
    cache_dir = tmp_path / "derived"
    assert list(Rows.load(Rollout, paths, cache_dir)) == records
    (cache,) = cache_dir.glob("*.arrow")
    built = cache.stat().st_ino
    assert list(Rows.load(Rollout, paths, cache_dir)) == records
    assert cache.stat().st_ino == built  # used as it is
    damage(cache)
    assert list(Rows.load(Rollout, paths, cache_dir)) == records
    (note,) = cache_dir.glob("*.json")
    damage(note)
    assert list(Rows.load(Rollout, paths, cache_dir)) == records
    changed = records[:10] + [rollout(i + 100) for i in range(10, 20)]
    shards(tmp_path, Rollout, changed, 10)
    assert list(Rows.load(Rollout, paths, cache_dir)) == changed
    assert len(list(cache_dir.iterdir())) == 2


def test_digests_decide_when_they_are_known(tmp_path: Path) -> None:
    paths = shards(tmp_path, Score, [score(1)], 10)
    assert Rows.load(Score, paths, tmp_path / "derived", digests=["a"])[0] == score(1)
    (cache,) = (tmp_path / "derived").glob("*.arrow")
    built = cache.stat().st_ino
    os.utime(paths[0], (1, 1))
    Rows.load(Score, paths, tmp_path / "derived", digests=["a"])
    assert cache.stat().st_ino == built
    shards(tmp_path, Score, [score(2)], 10)
    assert Rows.load(Score, paths, tmp_path / "derived", digests=["b"])[0] == score(2)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path, Score, [score(i) for i in range(20)], 10)
    truncate(paths[1])
    with pytest.raises(RunFailed, match=r"rows-00010\.parquet cannot be read") as caught:
        Rows.load(Score, paths, tmp_path / "derived")
    assert "--redo" in caught.value.hint
    assert list((tmp_path / "derived").iterdir()) == []


def test_a_loaded_set_stays_in_the_mapped_file(tmp_path: Path) -> None:
    paths = shards(tmp_path, Rollout, [rollout(i, num_tokens=2_000) for i in range(500)], 500)
    Rows.load(Rollout, paths, tmp_path / "derived")
    before = pa.total_allocated_bytes()
    rows = Rows.load(Rollout, paths, tmp_path / "derived")
    assert len(rows) == 500 and rows.column("index").sum() == 750
    assert pa.total_allocated_bytes() - before < 100_000  # the token ids alone are 4 MB
