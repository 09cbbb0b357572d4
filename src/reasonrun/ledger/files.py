"""Every file operation of the ledger, in one small object that tests can replace, watch or break."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.errors import RunFailed
from reasonrun.ledger.disk_errors import NO_LINKS, explained
from reasonrun.ledger.faults import Faults, FileKind

_CHUNK_BYTES = 1 << 20


def encode_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """JSON as UTF-8 bytes on which ``decode_json`` is exact, lone surrogates included.

    Escapes would join two lone surrogates into one character on reading, so they are written as their three bytes.
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys, separators=separators)
    return text.encode("utf-8", "surrogatepass")


def decode_json(data: bytes) -> Any:
    """The inverse of ``encode_json``. Raises ValueError when ``data`` is not JSON, or nested too deeply to be read."""
    try:
        return json.loads(data.decode("utf-8", "surrogatepass"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hex SHA-256 of one file."""

    size: int
    sha256: str


class Files:
    """File operations that survive ``kill -9`` and loss of power, with a named fault point at every dangerous moment.

    A failed fsync ends the attempt: the kernel may have dropped the data and a second fsync would report success
    (Rebello et al., USENIX ATC 2020), so every later write through the same object is refused.
    """

    def __init__(self, faults: Faults | None = None, *, durable: bool = True) -> None:
        """``durable=False`` skips every flush to disk: for a rehearsal in a folder that is thrown away."""
        self.faults = Faults.from_environment() if faults is None else faults
        self._durable = durable
        self._failed_fsync = ""

    def point(self, name: str) -> None:
        """Pass a fault point that lies between two operations."""
        with self.explaining(Path(name)):
            self.faults.hit(name)

    @contextmanager
    def explaining(self, path: Path) -> Iterator[None]:
        """Turn an operating-system error about ``path`` into a message with a next step."""
        if self._failed_fsync:
            raise RunFailed(self._failed_fsync, hint="the same command continues from what is safely on disk")
        try:
            yield
        except OSError as error:
            raise explained(error, path) from error

    def mkdir(self, path: Path) -> None:
        """Make a folder and its parents, durably. Nothing happens when it exists."""
        if not path.is_dir():
            self.mkdir(path.parent)
            with self.explaining(path):
                path.mkdir(exist_ok=True)
            self.sync_folder(path.parent)

    def create(self, path: Path, kind: FileKind) -> NewFile:
        """Start a file that appears under its name, complete, when ``commit`` is called on it."""
        self.mkdir(path.parent)
        return NewFile(self, path, kind)

    def write_atomic(self, path: Path, data: bytes, kind: FileKind) -> FileEntry:
        """Write a whole file: temporary, fsync, rename, fsync of the folder."""
        new = self.create(path, kind)
        try:
            new.write(data)
            return new.commit()
        finally:
            new.close()

    def append(self, path: Path, kind: str) -> AppendFile:
        """Open a file for appending; it is made, durably, when it does not exist."""
        self.mkdir(path.parent)
        return AppendFile(self, path, kind)

    def move(self, source: Path, target: Path) -> None:
        """Rename a file or folder, durably. Across file systems a folder is copied under a temporary name first."""
        self.mkdir(target.parent)
        with self.explaining(target):
            try:
                os.rename(source, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self._copy(source, target)
                self.remove(source)
        self.sync_folder(target.parent)
        self.sync_folder(source.parent)

    def _copy(self, source: Path, target: Path) -> None:
        temporary = target.with_name(target.name + ".tmp")
        self.remove(temporary)
        shutil.copytree(source, temporary) if source.is_dir() else shutil.copy2(source, temporary)
        self.entries(temporary)
        os.rename(temporary, target)

    def link(self, source: Path, target: Path) -> FileEntry:
        """Give a committed file a second name, durably, or copy it where the disk refuses links.

        Its final name at once: what writes there next would cut a temporary one to nothing, and ``source`` with it.
        """
        self.mkdir(target.parent)
        self.remove(target)
        with self.explaining(target):
            try:
                os.link(source, target)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                self._copy(source, target)
        self.sync_folder(target.parent)
        return self._settled(target)

    def remove(self, path: Path) -> None:
        """Delete a file or a folder tree; nothing happens when it is not there."""
        with self.explaining(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to ``size`` bytes, durably."""
        with self.explaining(path):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.ftruncate(descriptor, size)
                self.fsync(descriptor, path)
            finally:
                os.close(descriptor)

    def entries(self, folder: Path, point: str = "") -> dict[str, FileEntry]:
        """Force every file of a tree to disk and return size and hash of each, by path relative to ``folder``.

        Args:
            folder: a folder, or one file.
            point: fault point passed after each file.
        """
        found = {folder.name: self._settled(folder)} if folder.is_file() else {}
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(parent) / name
                found[path.relative_to(folder).as_posix()] = self._settled(path)
                if point:
                    self.point(point)
            self.sync_folder(Path(parent))
        return dict(sorted(found.items()))

    def _settled(self, path: Path) -> FileEntry:
        with self.explaining(path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                self.fsync(descriptor, path)
            finally:
                os.close(descriptor)
        return FileEntry(path.stat().st_size, self.hash(path))

    def read(self, path: Path) -> bytes:
        """All bytes of a file."""
        with self.explaining(path):
            return path.read_bytes()

    def hash(self, path: Path) -> str:
        """Hex SHA-256 of a file."""
        with self.explaining(path), open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        with self.explaining(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.fsync(descriptor, path)
            finally:
                os.close(descriptor)

    def fsync(self, descriptor: int, path: Path, point: str = "") -> None:
        """Flush one descriptor to disk; a failure ends every later write through this object."""
        try:
            if point:
                self.faults.hit(point)
            if self._durable:
                os.fsync(descriptor)
        except OSError as error:
            self._failed_fsync = f"{path} could not be flushed to disk ({error.strerror}); this attempt writes no more."
            raise


class NewFile:
    """A file under construction; a binary sink that also hashes what passes."""

    def __init__(self, files: Files, path: Path, kind: FileKind) -> None:
        self._files, self.path, self._kind = files, path, kind
        self._temporary = path.with_name(path.name + ".tmp")
        self._hash, self._size, self.closed = hashlib.sha256(), 0, False
        with files.explaining(path):
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: bytes) -> int:
        """Append bytes. After ``close`` they are ignored, so that a library may tidy up behind a failure."""
        if self.closed:
            return len(data)
        with self._files.explaining(self.path):
            _write_all(self._files, self._descriptor, bytes(data), f"{self._kind}.mid_write")
        self._hash.update(data)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Give the descriptor back; without ``commit`` the file never appears."""
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)

    def commit(self) -> FileEntry:
        """Make the file durable and visible under its name."""
        with self._files.explaining(self.path):
            self._files.fsync(self._descriptor, self.path, f"{self._kind}.before_fsync")
            self.close()
            self._files.faults.hit(f"{self._kind}.before_rename")
            os.rename(self._temporary, self.path)
            self._files.sync_folder(self.path.parent)
            self._files.faults.hit(f"{self._kind}.after_rename")
        return FileEntry(self._size, self._hash.hexdigest())


class AppendFile:
    """A file that only grows. After a failed write it refuses more: a torn line must stay the last one."""

    def __init__(self, files: Files, path: Path, kind: str) -> None:
        self._files, self.path, self._kind, self._broken = files, path, kind, False
        is_new = not path.exists()
        with files.explaining(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self.size = os.fstat(self._descriptor).st_size
        if is_new:
            files.sync_folder(path.parent)

    def write(self, data: bytes) -> int:
        """Append ``data`` with one system call and return the offset where it begins."""
        if self._broken:
            raise RunFailed(f"{self.path} could not be written before; this attempt writes no more to it.")
        offset = self.size
        self._broken = True
        with self._files.explaining(self.path):
            _write_all(self._files, self._descriptor, data, f"{self._kind}.mid_write")
        self._broken = False
        self.size += len(data)
        return offset

    def fsync(self) -> None:
        with self._files.explaining(self.path):
            self._files.fsync(self._descriptor, self.path, f"{self._kind}.before_fsync")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_all(files: Files, descriptor: int, data: bytes, point: str) -> None:
    """Write every byte; half of them before ``point`` when something is armed there."""
    rest = memoryview(data)
    if files.faults.armed(point):
        rest = rest[os.write(descriptor, rest[: len(rest) // 2]) :]
    files.faults.hit(point)
    while len(rest) > 0:
        rest = rest[os.write(descriptor, rest) :]
