"""Durable steps: one that is committed hands back its result, one that is open is filled and committed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrun.errors import RunFailed
from reasonrun.ledger.files import Files, decode_json, encode_json
from reasonrun.ledger.fingerprints import as_json
from reasonrun.ledger.quarantine import Quarantine
from reasonrun.ledger.seals import OK_NAME, Seal, read_seal, verify_files, write_seal
from reasonrun.records import Record, digest

if TYPE_CHECKING:
    from reasonrun.ledger.tables import TableWriter
    from reasonrun.ledger.wal import Wal

STEP_NAME = "step.json"
CHECKPOINTS = "checkpoints"
STEP_FOLDERS = frozenset({"adapter", "candidates", "model", "optimizer", CHECKPOINTS})
"""Folders that belong to a step itself; every other sub-folder of a step folder is a nested step."""

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".tmp")


def check_step_name(name: str) -> None:
    """Raises ValueError unless ``name`` can be a folder path that does not collide with a step's own files."""
    for part in name.split("/"):
        if not _COMPONENT.fullmatch(part) or part in STEP_FOLDERS or part.endswith(_FILE_SUFFIXES):
            raise ValueError(
                f"{name!r} cannot name a step: each part between slashes is letters, digits and ._=,+- and begins with "
                f"a letter or digit; {', '.join(sorted(STEP_FOLDERS))} and the endings "
                f"{', '.join(_FILE_SUFFIXES)} are taken"
            )


def _check_component(name: str, what: str) -> None:
    if not _COMPONENT.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name {what}: letters, digits and ._=,+- are allowed, beginning with the former"
        )


def own_entries(folder: Path) -> list[Path]:
    """Files and folders of this step, nested steps left out; ``_OK.json`` first."""
    present = folder.iterdir() if folder.is_dir() else []
    paths = [path for path in present if path.is_file() or path.name in STEP_FOLDERS or _is_temporary(path)]
    return sorted(paths, key=lambda path: (path.name != OK_NAME, path.name))


def _is_temporary(path: Path) -> bool:
    return path.name.endswith(".tmp")


def wal_name(table: str) -> str:
    return "wal.jsonl" if table == "rows" else f"wal-{table}.jsonl"


def is_scratch(path: Path) -> bool:
    """Whether an entry of a step folder leaves when the step is committed."""
    is_wal = path.name == "wal.jsonl" or (path.name.startswith("wal-") and path.name.endswith(".jsonl"))
    return is_wal or path.name == CHECKPOINTS or _is_temporary(path)


def tidy(folder: Path, files: Files) -> None:
    """Remove what only an unfinished step needs, durably: a finished run is never tidied again."""
    scratch = [path for path in own_entries(folder) if is_scratch(path)]
    for path in scratch:
        files.remove(path)
    if scratch:
        files.sync_folder(folder)


def redo_hint(name: str) -> str:
    return f"run the same command with --redo {name}: what is there goes to quarantine and the step is made again"


@dataclass(frozen=True)
class Committed:
    """The result of a finished step. Its files never change."""

    name: str
    path: Path
    seal: Seal
    files: Files

    @property
    def result(self) -> Any:
        """The JSON value that was committed with the step."""
        return self.seal.content["result"]

    @property
    def fingerprint_digest(self) -> str:
        return str(self.seal.content["fingerprint"])

    @property
    def digest(self) -> str:
        """Digest of what the step produced: names and SHA-256 of its files, and its result; not of its fingerprint."""
        hashes = {name: entry.sha256 for name, entry in self.seal.files.items() if name != STEP_NAME}
        return digest({"files": hashes, "result": self.result})

    def table_paths(self, table: str = "rows") -> list[Path]:
        """The Parquet shards of a table, in order. Raises KeyError when the step has no such table."""
        pattern = re.compile(re.escape(table) + r"-\d{5}\.parquet")
        names = sorted(name for name in self.seal.files if pattern.fullmatch(name))
        if not names:
            raise KeyError(f"step {self.name} has no table {table!r}")
        return [self.path / name for name in names]

    def folder(self, name: str) -> Path:
        """An adopted folder, such as ``model``. Raises KeyError when the step has none of this name."""
        if not any(path.startswith(f"{name}/") for path in self.seal.files):
            raise KeyError(f"step {self.name} has no folder {name!r}")
        return self.path / name

    def json(self, name: str) -> Any:
        """A value that ``put_json`` stored. Raises KeyError when there is none of this name."""
        if f"{name}.json" not in self.seal.files:
            raise KeyError(f"step {self.name} has no value {name!r}")
        return decode_json(self.files.read(self.path / f"{name}.json"))

    def verify(self, *, deep: bool = False) -> None:
        """Compare the files with the seal: sizes, and SHA-256 too when ``deep``. Raises RunFailed."""
        verify_files(self.path, self.seal, self.files, deep=deep, hint=redo_hint(self.name))


class OpenStep:
    """A step at work. Nothing of it counts until ``commit``; what a crash leaves behind is used or set aside.

    Made by ``RunDir.step``, after ``step.json`` is on disk.
    """

    def __init__(
        self, name: str, run_path: Path, fingerprint_digest: str, files: Files, quarantine: Quarantine
    ) -> None:
        self.name, self.path = name, run_path / "steps" / name
        self._run_path, self._fingerprint_digest = run_path, fingerprint_digest
        self._files, self._quarantine = files, quarantine
        self._wals: dict[str, Wal] = {}
        self._entries = files.entries(self.path / STEP_NAME)

    def wal(self, table: str = "rows") -> Wal:
        """The log of rows of an unfinished table, with what earlier attempts left in it."""
        from reasonrun.ledger.wal import Wal  # numpy is slow to import, and a finished run needs no log

        _check_component(table, "a table")
        if table not in self._wals:
            hint = f"`reasonrun repair {self._run_path}` keeps the rows that verify; or {redo_hint(self.name)}"
            self._wals[table] = Wal(self.path / wal_name(table), self._files, self._aside, hint)
        return self._wals[table]

    def rewind(self, table: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Set aside the logged rows of a table, which came in the order of their ordinals, from the first one that ``keep``
        refuses on: what follows the checkpoint that work goes on from is made again, and may come out otherwise."""
        wal = self.wal(table)
        first = None
        for ordinal in reversed(wal.ordinals().tolist()):
            if keep(wal.read(ordinal)):
                break
            first = ordinal
        if first is not None:
            wal.cut(first, self._aside)

    def seal_table(self, table: str, record_type: type[Record], rows: Iterable[Record]) -> int:
        """Write a table's final Parquet shards ``<table>-00000.parquet`` … in the given order, in flat memory.

        Returns:
            The number of rows.
        """
        with self.table(table, record_type) as writer:
            for row in rows:
                writer.append(row)
        return writer.num_rows

    @contextmanager
    def table(self, table: str, record_type: type[Record]) -> Iterator[TableWriter]:
        """A table to append rows to, for a step that fills several at once; sealed when the block ends well."""
        from reasonrun.ledger.tables import TableWriter  # pyarrow is slow to import, and a finished run seals nothing

        _check_component(table, "a table")
        with TableWriter(self.path, table, record_type, self._files) as writer:
            yield writer
        self._entries |= writer.entries

    def put_json(self, name: str, value: Any) -> None:
        """Store a JSON value as ``<name>.json``. Raises ValueError for a name that is taken."""
        _check_component(name, "a value")
        if f"{name}.json" == STEP_NAME:
            raise ValueError(f"{name!r} cannot name a value of a step: {STEP_NAME} is taken")
        data = encode_json(as_json(value), indent=1, sort_keys=True) + b"\n"
        self._entries[f"{name}.json"] = self._files.write_atomic(self.path / f"{name}.json", data, "json")

    def adopt_folder(self, source: Path, name: str) -> Path:
        """Move a finished folder of this attempt into the step.

        Args:
            source: the folder; nobody may write to it any more.
            name: ``model``, ``optimizer`` or ``candidates``, or a path that begins so (``candidates/0300``).

        Returns:
            Where it is now.
        """
        if name.split("/")[0] not in STEP_FOLDERS - {CHECKPOINTS} or not all(
            map(_COMPONENT.fullmatch, name.split("/"))
        ):
            raise ValueError(f"{name!r} cannot name a folder of a step; allowed: {', '.join(sorted(STEP_FOLDERS))}")
        target = self.path / name
        entries = self._files.entries(source, "adopt.mid_file")
        if target.exists():
            self._quarantine.set_aside([target])
        self._files.point("adopt.before_rename")
        self._files.move(source, target)
        self._files.point("adopt.after_rename")
        self._entries |= {f"{name}/{path}": entry for path, entry in entries.items()}
        return target

    def adopt_checkpoint(self, source: Path, number: int) -> Path:
        """Commit an intermediate checkpoint (``number`` rises with progress) and remove older ones.

        The folder is sealed before it moves, so that it appears under ``checkpoints/<number>/`` complete or not at all.
        """
        entries = self._files.entries(source, "ckpt.mid_file")
        write_seal(source, Seal(entries, {"number": number}), self._files, "ckpt")
        target = self.path / CHECKPOINTS / str(number)
        if target.exists():
            self._quarantine.set_aside([target])
        self._files.point("ckpt.before_adopt")
        self._files.move(source, target)
        self._files.point("ckpt.after_adopt")
        for older in self._checkpoints():
            if int(older.name) < number:
                self._files.remove(older / OK_NAME)
                self._files.remove(older)
        return target

    def latest_checkpoint(self) -> tuple[Path, int] | None:
        """The furthest checkpoint whose files all match their SHA-256; damaged ones are passed over."""
        for path in sorted(self._checkpoints(), key=lambda path: -int(path.name)):
            with suppress(RunFailed):
                seal = read_seal(path)
                if seal is not None:
                    verify_files(path, seal, self._files, deep=True)
                    return path, int(path.name)
        return None

    def _checkpoints(self) -> list[Path]:
        folder = self.path / CHECKPOINTS
        return [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []

    def commit(self, result: dict[str, Any]) -> Committed:
        """Seal the step with ``result`` (JSON). Only what this attempt sealed, put or adopted belongs to it.

        Earlier leftovers go to quarantine; logs and checkpoints leave once ``_OK.json`` is on disk.
        """
        self.abandon()
        stale = self._stale()
        if stale:
            self._quarantine.set_aside(stale)
        seal = Seal(
            dict(sorted(self._entries.items())), {"fingerprint": self._fingerprint_digest, "result": as_json(result)}
        )
        write_seal(self.path, seal, self._files, "ok")
        self._files.point("commit.before_cleanup")
        tidy(self.path, self._files)
        return Committed(self.name, self.path, seal, self._files)

    def borrow(self, other: Committed) -> None:
        """Take the files of ``other``, which another run made from the same fingerprint; to be committed with its result.

        Raises:
            RunFailed: a file is missing or damaged; the step is still open and is to be made here.
        """
        other.verify()
        entries = {name: entry for name, entry in other.seal.files.items() if name != STEP_NAME}
        for name, entry in entries.items():
            self._files.point("borrow.before_link")
            if self._files.link(other.path / name, self.path / name) != entry:
                raise RunFailed(f"Committed data is damaged: {other.path / name} does not match its SHA-256.")
            self._files.point("borrow.after_link")
        self._entries |= entries

    def _stale(self) -> list[Path]:
        """Files that an earlier attempt left and this one did not make again."""
        kept = [path for path in own_entries(self.path) if not is_scratch(path)]
        inside = [path for folder in kept if folder.is_dir() for path in sorted(folder.rglob("*"))]
        present = [path for path in [*kept, *inside] if path.is_file()]
        return [path for path in present if path.relative_to(self.path).as_posix() not in self._entries]

    def abandon(self) -> None:
        """Give open logs back without committing; what they hold is used by the next attempt."""
        for wal in self._wals.values():
            wal.abandon()
        self._wals.clear()

    def close(self) -> None:
        """Flush and close open logs: an orderly stop."""
        for wal in self._wals.values():
            wal.close()
        self._wals.clear()

    def _aside(self, name: str) -> Path:
        return self._quarantine.new_folder() / "steps" / self.name / name
