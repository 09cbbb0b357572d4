"""The write-ahead log: torn tails, damage, holes, determinism, memory."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reasonrun.errors import EnvironmentProblem, RunFailed
from reasonrun.ledger.faults import Faults, InjectedFault
from reasonrun.ledger.files import AppendFile, Files
from reasonrun.ledger.wal import Wal, repair
from reasonrun.ledger.wal_lines import encode_line

Open = Callable[..., Wal]


@pytest.fixture
def open_wal(tmp_path: Path) -> Open:
    def open_it(files: Files | None = None) -> Wal:
        return Wal(tmp_path / "wal.jsonl", files or Files(Faults()), lambda name: tmp_path / "aside" / name, "redo it")

    return open_it


def fill(open_wal: Open, num_rows: int) -> None:
    wal = open_wal()
    for ordinal in range(num_rows):
        wal.append([(ordinal, {"text": f"row {ordinal}"})])
    wal.close()


def test_a_line_is_crc_space_compact_json(open_wal: Open, tmp_path: Path) -> None:
    wal = open_wal()
    wal.append([(3, {"a": 1, "b": [True, None]})])
    wal.close()
    body = b'[3,{"a":1,"b":[true,null]}]'
    assert (tmp_path / "wal.jsonl").read_bytes() == b"%08x " % zlib.crc32(body) + body + b"\n"


def test_rows_read_back_exactly_in_any_order(open_wal: Open) -> None:
    rows: dict[int, dict[str, Any]] = {
        5: {"text": "lone \ud83d and pair \ud83d\ude00, not 😀, NUL \0, line\nbreak \u2028"},
        0: {"number": 1e-320, "nested": {"z": 1, "a": [2**80]}},
        2000: {"long": "x" * 100_000},
    }
    wal = open_wal()
    wal.append(list(rows.items()))
    for reader in (wal, open_wal()):
        assert len(reader) == 3
        assert {ordinal: reader.read(ordinal) for ordinal in rows} == rows
        assert list(reader.read(0)["nested"]) == ["z", "a"]
        assert list(reader.rows()) == [rows[0], rows[5], rows[2000]]
        assert reader.missing(7).tolist() == [1, 2, 3, 4, 6]
        assert 5 in reader and 4 not in reader and -1 not in reader
        with pytest.raises(KeyError):
            reader.read(4)
        reader.close()


def test_a_unit_is_one_write_and_flushes_are_seconds_apart(
    open_wal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    wal = open_wal()
    writes: list[bytes] = []
    flushes: list[float] = []
    real_write, real_fsync = os.write, AppendFile.fsync
    monkeypatch.setattr("os.write", lambda fd, data: (writes.append(bytes(data)), real_write(fd, data))[1])
    monkeypatch.setattr(AppendFile, "fsync", lambda self: (flushes.append(clock[0]), real_fsync(self))[1])
    for unit, seconds in enumerate((100.5, 101.9, 102.1, 103.0, 104.0, 104.2)):
        clock[0] = seconds
        wal.append([(3 * unit + i, {"i": i}) for i in range(3)])
    assert len(writes) == 6
    assert flushes == [102.1, 104.2]
    assert b"".join(writes) == (tmp_path / "wal.jsonl").read_bytes()
    monkeypatch.undo()
    wal.close()


def test_a_row_that_no_other_follows_reaches_the_disk_within_the_same_time(
    open_wal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonrun.ledger.wal.FLUSH_SECONDS", 0.05)
    flushed = threading.Event()
    wal = open_wal()
    wal.append([(0, {"n": 0})])
    wal.flush()
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda descriptor: (real(descriptor), flushed.set())[0])
    wal.append([(1, {"n": 1})])
    assert flushed.wait(10), "the row waits for another one"
    wal.append([(2, {"n": 2})])
    wal.abandon()
    flushed.clear()
    assert not flushed.wait(0.2), "a log that was given up is still flushed"


def test_a_flush_that_fails_while_nobody_waits_stops_the_next_write(
    open_wal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonrun.ledger.wal.FLUSH_SECONDS", 0.05)
    wal = open_wal(Files(Faults("wal.before_fsync", "EIO")))
    wal.append([(0, {"n": 0})])
    deadline = time.monotonic() + 10
    while not wal._files._failed_fsync and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RunFailed, match="could not be flushed"):
        wal.append([(1, {"n": 1})])
    wal.abandon()


@pytest.mark.parametrize("num_cut", [1, 5, 20])
def test_a_torn_tail_is_set_aside_and_cut_off(open_wal: Open, tmp_path: Path, num_cut: int) -> None:
    fill(open_wal, 4)
    path = tmp_path / "wal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-num_cut])
    wal = open_wal()
    assert path.read_bytes() == b"".join(lines[:3])
    assert [file.read_bytes() for file in (tmp_path / "aside").iterdir()] == [lines[3][:-num_cut]]
    wal.append([(3, {"text": "row 3"})])
    assert path.read_bytes().endswith(lines[3]) and len(wal) == 4
    wal.close()


def test_whatever_ends_a_flush_that_nobody_waits_for_is_raised_at_the_next_row(
    open_wal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonrun.ledger.wal.FLUSH_SECONDS", 0.05)
    wal = open_wal(Files(Faults("wal.before_fsync", "exception")))
    wal.append([(0, {"n": 0})])
    deadline = time.monotonic() + 5
    while wal._failed_flush is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(InjectedFault):
        wal.append([(1, {"n": 1})])
    wal.abandon()


@pytest.mark.parametrize("position", [0, 3, 8, 12, -1])
def test_damage_in_the_middle_names_file_offset_and_way_out(open_wal: Open, tmp_path: Path, position: int) -> None:
    fill(open_wal, 4)
    path = tmp_path / "wal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    offset = len(lines[0])
    damaged = bytearray(lines[1])
    damaged[position] ^= 1
    path.write_bytes(lines[0] + bytes(damaged) + b"".join(lines[2:]))
    before = path.read_bytes()
    with pytest.raises(RunFailed, match=f"byte {offset}") as caught:
        open_wal()
    assert str(path) in str(caught.value) and caught.value.hint == "redo it"
    assert path.read_bytes() == before  # never a guess
    # A damaged line end takes the next line with it.
    num_lost = repair(path, Files(Faults()), lambda name: tmp_path / "aside" / name)
    assert (tmp_path / "aside" / "wal.jsonl.damaged").read_bytes() == before
    wal = open_wal()
    kept = [0, 2, 3] if position != -1 else [0, 3]
    assert num_lost == 1 and wal.ordinals().tolist() == kept
    assert wal.read(3) == {"text": "row 3"}
    wal.close()


def test_a_row_that_stands_there_twice_with_two_results_is_given_up(open_wal: Open, tmp_path: Path) -> None:
    fill(open_wal, 2)
    path = tmp_path / "wal.jsonl"
    first = path.read_bytes().splitlines(keepends=True)[0]
    with path.open("ab") as log:
        log.write(first + encode_line(1, {"text": "other"}) + encode_line(2, {"text": "new"}) + first[:-4])
    assert repair(path, Files(Faults()), lambda name: tmp_path / "aside" / name) == 3
    wal = open_wal()
    assert wal.ordinals().tolist() == [0, 2] and wal.read(2) == {"text": "new"}
    wal.close()


def test_a_hole_of_unflushed_blocks_is_set_aside_but_a_hole_in_flushed_rows_is_damage(
    open_wal: Open, tmp_path: Path
) -> None:
    path = tmp_path / "wal.jsonl"
    wal = open_wal()
    wal.append([(0, {"n": 0})])
    wal.flush()
    ends = [path.stat().st_size]
    for ordinal in (1, 2, 3):  # the first of these lines carries the mark of the flush
        wal.append([(ordinal, {"n": ordinal})])
        ends.append(path.stat().st_size)
    wal.abandon()
    whole = path.read_bytes()

    def with_hole(start: int, stop: int) -> bytes:
        return whole[:start] + b"\0" * (stop - start) + whole[stop:]

    path.write_bytes(with_hole(ends[1], ends[2] - 1))  # power went before row 2 reached the disk, row 3 had
    wal = open_wal()
    assert wal.ordinals().tolist() == [0, 1]
    assert path.read_bytes() == whole[: ends[1]]
    assert [file.read_bytes() for file in (tmp_path / "aside").iterdir()] == [
        with_hole(ends[1], ends[2] - 1)[ends[1] :]
    ]
    wal.close()
    path.write_bytes(with_hole(0, ends[0] - 1))
    with pytest.raises(RunFailed, match="byte 0"):
        open_wal()


def test_the_same_row_again_is_ignored_and_another_one_is_refused(open_wal: Open, tmp_path: Path) -> None:
    wal = open_wal()
    wal.append([(0, {"a": 1, "b": 2}), (0, {"b": 2, "a": 1})])
    wal.flush()
    size = (tmp_path / "wal.jsonl").stat().st_size
    wal.append([(0, {"b": 2, "a": 1})])
    for unit in ([(1, {}), (0, {"a": 1, "b": 3})], [(2, {"x": 1}), (2, {"x": 2})]):
        with pytest.raises(RunFailed, match="determinism check"):
            wal.append(unit)
    assert (tmp_path / "wal.jsonl").stat().st_size == size and len(wal) == 1
    wal.close()
    body = b'[0,{"a":9}]'
    with open(tmp_path / "wal.jsonl", "ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(body), body))
    with pytest.raises(RunFailed, match="row 0 was computed twice"):
        open_wal()


def test_a_full_disk_tears_at_most_the_last_unit_and_the_next_attempt_goes_on(open_wal: Open) -> None:
    wal = open_wal(Files(Faults("wal.mid_write", "ENOSPC", 3)))
    wal.append([(0, {"n": 0})])
    wal.append([(1, {"n": 1})])
    with pytest.raises(EnvironmentProblem, match="No space left"):
        wal.append([(2, {"n": 2}), (3, {"n": 3})])
    with pytest.raises(RunFailed):  # a line after a torn one would be damage in the middle
        wal.append([(4, {"n": 4})])
    wal.abandon()
    wal = open_wal()
    assert wal.missing(4).tolist() in ([2, 3], [3])
    wal.append([(2, {"n": 2}), (3, {"n": 3})])
    assert [row["n"] for row in wal.rows()] == [0, 1, 2, 3]
    wal.close()


def test_a_million_rows_cost_eight_megabytes(open_wal: Open) -> None:
    wal = open_wal()
    wal._index(999_999, 0)
    assert wal._offsets.dtype == np.int64
    assert wal._offsets.nbytes == 8_000_000
    wal.close()
    with pytest.raises(ValueError, match="ordinal -1"):
        wal.append([(-1, {})])


def test_cutting_sets_the_later_rows_aside_and_they_may_come_out_otherwise(open_wal: Open, tmp_path: Path) -> None:
    wal = open_wal()
    for ordinal in range(6):
        wal.append([(ordinal, {"text": f"row {ordinal}"})])
        wal.flush()  # so that marks of what is on disk stand between the rows
    wal.cut(4, lambda name: tmp_path / "aside" / name)
    assert list(wal.ordinals()) == [0, 1, 2, 3] and len(wal) == 4
    wal.append([(4, {"text": "another"}), (5, {"text": "other"}), (6, {"text": "new"})])
    wal.close()
    (aside,) = (tmp_path / "aside").iterdir()
    assert aside.read_bytes().count(b"row 4") == aside.read_bytes().count(b"row 5") == 1
    again = open_wal()
    assert [row["text"] for row in again.rows()] == ["row 0", "row 1", "row 2", "row 3", "another", "other", "new"]
    with pytest.raises(KeyError):
        again.cut(7, lambda name: tmp_path / "aside" / name)
    again.close()
