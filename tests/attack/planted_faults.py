"""Ways to break the ledger that tests on a healthy machine do not notice. Each is one plausible mistake."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reasonrun.ledger import seals, steps, tables, wal_lines
from reasonrun.ledger.files import AppendFile, FileEntry, Files, NewFile, decode_json
from reasonrun.ledger.seals import OK_NAME
from reasonrun.ledger.steps import OpenStep
from reasonrun.ledger.wal import Wal


def no_flush_before_the_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file gets its name while its bytes are in memory only."""

    def commit(self: NewFile) -> FileEntry:
        self.close()
        os.rename(self._temporary, self.path)
        self._files.sync_folder(self.path.parent)
        return FileEntry(self._size, self._hash.hexdigest())

    monkeypatch.setattr(NewFile, "commit", commit)


def no_flush_of_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are never flushed."""
    monkeypatch.setattr(Files, "sync_folder", lambda self, path: None)


def written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written under their final names, without a temporary one."""
    real = NewFile.__init__

    def begin(self: NewFile, files: Files, path: Path, kind: Any) -> None:
        real(self, files, path, kind)
        os.rename(self._temporary, path)
        self._temporary = path

    monkeypatch.setattr(NewFile, "__init__", begin)


def seal_before_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """``_OK.json`` is not last: values of a step are written after it."""
    real_put, real_seal = OpenStep.put_json, seals.write_seal
    late: list[tuple[Path, bytes]] = []

    def put(self: OpenStep, name: str, value: Any) -> None:
        real_put(self, name, value)
        path = self.path / f"{name}.json"
        late.append((path, path.read_bytes()))
        path.unlink()

    def seal(folder: Path, content: Any, files: Files, kind: Any) -> None:
        real_seal(folder, content, files, kind)
        while late:
            files.write_atomic(*late.pop(), "json")

    monkeypatch.setattr(OpenStep, "put_json", put)
    monkeypatch.setattr(steps, "write_seal", seal)


def seal_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """``_OK.json`` vouches for a table whose bytes are flushed only after it."""
    real = tables.TableWriter._finish_shard
    monkeypatch.setattr(tables.TableWriter, "_finish_shard", lambda self: _without_file_flush(real, self))


def _without_file_flush(real: Any, writer: Any) -> None:
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(Files, "fsync", lambda self, descriptor, path, point="": None)
        real(writer)


def log_without_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log believes every line that ends."""

    def ordinal(line: bytes) -> int | None:
        number = line[10 : line.find(b",")]
        return int(number) if number.lstrip(b"-").isdigit() else None

    monkeypatch.setattr(wal_lines, "ordinal_of", ordinal)


def torn_tail_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn line is passed over and stays in the log; new rows are written behind it."""

    def recover(self: Wal, set_aside: Any) -> None:
        self._scan()

    monkeypatch.setattr(Wal, "_recover", recover)


def truncated_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torn tail is cut off in the middle of the last good line."""
    real = Wal._cut_file
    monkeypatch.setattr(Wal, "_cut_file", lambda self, end, aside: real(self, max(0, end - 7), aside))


def truncated_at_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log with a torn tail is begun again."""
    real = Wal._scan

    def scan(self: Wal) -> int:
        end = real(self)
        if end < self.path.stat().st_size:
            self._offsets[:] = -1
            self._num_rows = 0
            return 0
        return end

    monkeypatch.setattr(Wal, "_scan", scan)


def log_never_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing the log does nothing."""
    monkeypatch.setattr(AppendFile, "fsync", lambda self: None)


def log_removed_before_the_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a step goes before ``_OK.json`` is there."""
    real = steps.write_seal

    def seal(folder: Path, content: Any, files: Files, kind: Any) -> None:
        steps.tidy(folder, files)
        real(folder, content, files, kind)

    monkeypatch.setattr(steps, "write_seal", seal)


def folder_adopted_unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker wrote is moved into the step without being flushed."""
    monkeypatch.setattr(Files, "_settled", lambda self, path: FileEntry(path.stat().st_size, self.hash(path)))


def older_checkpoint_removed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint goes before the next one is there."""
    real = OpenStep.adopt_checkpoint

    def adopt(self: OpenStep, source: Path, number: int) -> Path:
        for older in self._checkpoints():
            shutil.rmtree(older)
            self._files.sync_folder(older.parent)
        return real(self, source, number)

    monkeypatch.setattr(OpenStep, "adopt_checkpoint", adopt)


def checkpoint_copied_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is copied to its final name, seal and all, instead of moved."""

    def move(self: Files, source: Path, target: Path) -> None:
        self.mkdir(target.parent)
        for path in [source, *sorted(source.rglob("*"))]:
            new = target / path.relative_to(source)
            new.mkdir() if path.is_dir() else new.write_bytes(path.read_bytes())
        self.entries(target)
        shutil.rmtree(source)

    monkeypatch.setattr(Files, "move", move)


def seal_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seal is trusted without its digest, and written without a flush."""

    def read(folder: Path, *, hint: str = "") -> seals.Seal | None:
        path = folder / OK_NAME
        if not path.is_file():
            return None
        value = decode_json(path.read_bytes())
        return seals.Seal({n: FileEntry(e["size"], e["sha256"]) for n, e in value["files"].items()}, value["content"])

    for module in ("run_dir", "steps", "catalogue", "seals"):
        monkeypatch.setattr(f"reasonrun.ledger.{module}.read_seal", read)
    no_flush_before_the_rename(monkeypatch)


def scratch_removed_unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a committed step is removed, but not durably; it is back in a run that counts as finished."""

    def tidy(folder: Path, files: Files) -> None:
        for path in steps.own_entries(folder):
            if steps.is_scratch(path):
                files.remove(path)

    for module in ("run_dir", "steps"):
        monkeypatch.setattr(f"reasonrun.ledger.{module}.tidy", tidy)


def cache_unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of a cache of rows vouches for bytes that may not be on disk."""
    calls = {name: getattr(os, name) for name in ("fspath", "path", "replace", "getpid")}
    monkeypatch.setattr("reasonrun.sets.os", SimpleNamespace(**calls, fsync=lambda descriptor: None))


def names_of_the_dead_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt builds on names that a killed one left in memory."""
    monkeypatch.setattr("reasonrun.ledger.attempts.settle_names", lambda run_path, files: None)


BEFORE_POWER_LOSS = (
    no_flush_before_the_rename,
    no_flush_of_folders,
    written_in_place,
    seal_before_the_data,
    seal_before_the_table,
    log_without_checksums,
    truncated_in_the_middle,
    truncated_at_the_first_row,
    log_never_flushed,
    log_removed_before_the_seal,
    folder_adopted_unflushed,
    older_checkpoint_removed_first,
    checkpoint_copied_under_its_name,
    seal_unchecked,
    scratch_removed_unflushed,
    cache_unflushed,
)
"""Mistakes that one loss of power shows."""
