"""Writes down what the ledger really asks of the operating system: the record from which crash states are made.

It stands between ``Files`` and the system calls, not inside ``Files``, so that a broken ``Files`` cannot hide what it
leaves out. Every file below one folder is followed as an inode: names, bytes written, truncations, flushes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = 0
"""The inode of the folder that is followed."""


@dataclass(frozen=True)
class Names:
    """One atomic change of folder entries: (folder, name, inode or None) each. A rename changes two."""

    changes: tuple[tuple[int, str, int | None], ...]
    call: str


@dataclass(frozen=True)
class Data:
    """Bytes written to an inode at an offset; with ``data=None`` its size becomes ``offset``."""

    inode: int
    offset: int
    data: bytes | None


@dataclass(frozen=True)
class Flush:
    """fsync of a file or folder that returned."""

    inode: int


@dataclass(frozen=True)
class Claim:
    """What the ledger declared safe: a call returned after which ``what`` must survive."""

    kind: str
    what: Any


Operation = Names | Data | Flush | Claim


@dataclass
class Inode:
    """Live state of one file (``content``) or folder (``entries``)."""

    entries: dict[str, int] | None = None
    content: bytearray = field(default_factory=bytearray)


class ProcessGone(BaseException):
    """Stands for SIGKILL: nothing that the process does from here on reaches the disk."""


class RecordedDisk:
    """Follows every operation below ``root`` from construction on.

    Attributes:
        operations: what was asked for and done, in order.
        kill_at: the process dies when the record has this many operations; 0 for never.

    Args:
        root: an existing folder; what is in it already counts as safely on disk.
        monkeypatch: puts the system calls back.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations: list[Operation] = []
        self.kill_at = 0
        self._root = os.path.realpath(root)
        self._inodes: dict[int, Inode] = {ROOT: Inode(entries={})}
        self._opened: dict[int, int] = {}
        self._real: dict[str, Callable[..., Any]] = {}
        self._follow_existing(Path(self._root), ROOT)
        self.num_before = len(self.operations)
        for name in ("open", "write", "pwrite", "ftruncate", "fsync", "rename", "replace", "mkdir", "rmdir", "link"):
            self._patch(monkeypatch, name, getattr(self, f"_{name}"))
        for name in ("unlink", "remove"):
            self._patch(monkeypatch, name, self._unlink)
        self._real_io_open = io.open
        monkeypatch.setattr("io.open", self._io_open)
        monkeypatch.setattr("builtins.open", self._io_open)

    def claim(self, kind: str, what: Any) -> None:
        self.operations.append(Claim(kind, what))

    def _live(self) -> None:
        if self.kill_at and len(self.operations) >= self.kill_at:
            raise ProcessGone

    def _patch(self, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Callable[..., Any]) -> None:
        self._real[name] = getattr(os, name)
        monkeypatch.setattr(os, name, replacement)

    def _follow_existing(self, folder: Path, inode: int) -> None:
        for path in sorted(folder.iterdir()):
            content = None if path.is_dir() else path.read_bytes()
            child = self._new(inode, path.name, content is None, "mkdir" if content is None else "create")
            if content is None:
                self._follow_existing(path, child)
            elif content:
                self._change(Data(child, 0, content))
            self.operations.append(Flush(child))
        self.operations.append(Flush(inode))

    # What is where.

    def _parts(self, path: Any, dir_fd: int | None = None) -> list[str] | None:
        """Path below the root, or None when it lies elsewhere."""
        if isinstance(path, int):
            return None
        text = os.fspath(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        folder, name = os.path.split(os.path.abspath(text))
        whole = os.path.join(os.path.realpath(folder), name)
        if whole != self._root and not whole.startswith(self._root + "/"):
            return None
        return [part for part in whole[len(self._root) :].split("/") if part]

    def _inode(self, parts: list[str]) -> int:
        inode = ROOT
        for part in parts:
            entries = self._inodes[inode].entries
            assert entries is not None
            inode = entries[part]
        return inode

    def _exists(self, parts: list[str]) -> bool:
        with suppress(KeyError):
            self._inode(parts)
            return True
        return False

    def _new(self, folder: int, name: str, is_folder: bool, call: str) -> int:
        inode = len(self._inodes)
        self._inodes[inode] = Inode(entries={} if is_folder else None)
        self._rename_entries(Names(((folder, name, inode),), call))
        return inode

    def _rename_entries(self, operation: Names) -> None:
        self.operations.append(operation)
        for folder, name, inode in operation.changes:
            entries = self._inodes[folder].entries
            assert entries is not None
            if inode is None:
                del entries[name]
            else:
                entries[name] = inode

    def _change(self, operation: Data) -> None:
        self.operations.append(operation)
        apply_data(self._inodes[operation.inode].content, operation)

    def _written_elsewhere(self, parts: list[str]) -> None:
        """Take up a file that a library wrote by system calls of its own: all of it, never flushed."""
        if parts and not self._exists(parts):
            path = os.path.join(self._root, *parts)
            inode = self._new(self._inode(parts[:-1]), parts[-1], False, "create")
            with self._real_io_open(path, "rb") as file:
                self._change(Data(inode, 0, file.read()))

    # The system calls.

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & (os.O_CREAT | os.O_TRUNC):
            self._live()
        parts = self._parts(path, dir_fd)
        descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._opened.pop(descriptor, None)
        if parts is None:
            return descriptor
        if flags & os.O_CREAT and not self._exists(parts):
            self._new(self._inode(parts[:-1]), parts[-1], False, "create")
        if not flags & os.O_CREAT:
            self._written_elsewhere(parts)
        inode = self._opened[descriptor] = self._inode(parts)
        if flags & os.O_TRUNC and self._inodes[inode].content:
            self._change(Data(inode, 0, None))
        return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        inode = self._opened.get(descriptor)
        if inode is not None:
            self._live()
        # Every file of the ledger is written from its end on: new ones, and logs opened for appending.
        written: int = self._real["write"](descriptor, data)
        if inode is not None:
            self._change(Data(inode, len(self._inodes[inode].content), bytes(data)[:written]))
        return written

    def _pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        self._live()
        written: int = self._real["pwrite"](descriptor, data, offset)
        if descriptor in self._opened:
            self._change(Data(self._opened[descriptor], offset, bytes(data)[:written]))
        return written

    def _ftruncate(self, descriptor: int, size: int) -> None:
        self._live()
        self._real["ftruncate"](descriptor, size)
        if descriptor in self._opened:
            self._change(Data(self._opened[descriptor], size, None))

    def _fsync(self, descriptor: int) -> None:
        """The real flush is left out: it takes most of the time and the machine stays up."""
        if descriptor in self._opened:
            self._live()
            self.operations.append(Flush(self._opened[descriptor]))

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._live()
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        parts = self._parts(path, dir_fd)
        if parts:
            self._new(self._inode(parts[:-1]), parts[-1], True, "mkdir")

    def _rename(self, source: Any, target: Any) -> None:
        self._live()
        old, new = self._parts(source), self._parts(target)
        if old is not None:
            self._written_elsewhere(old)
        self._real["rename"](source, target)
        assert (old is None) == (new is None), "a rename into or out of the folder that is followed"
        if old is not None and new is not None:
            inode = self._inode(old)
            removal = (self._inode(old[:-1]), old[-1], None)
            self._rename_entries(Names((removal, (self._inode(new[:-1]), new[-1], inode)), "rename"))

    def _replace(self, source: Any, target: Any) -> None:
        self._rename(source, target)

    def _link(self, source: Any, target: Any) -> None:
        self._live()
        self._real["link"](source, target)
        old, new = self._parts(source), self._parts(target)
        if old is not None and new is not None:
            self._rename_entries(Names(((self._inode(new[:-1]), new[-1], self._inode(old)),), "link"))

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._live()
        parts = self._parts(path, dir_fd)
        self._real["unlink"](path, dir_fd=dir_fd)
        self._forget(parts, "unlink")

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._live()
        parts = self._parts(path, dir_fd)
        self._real["rmdir"](path, dir_fd=dir_fd)
        self._forget(parts, "rmdir")

    def _forget(self, parts: list[str] | None, call: str) -> None:
        if parts and self._exists(parts):
            self._rename_entries(Names(((self._inode(parts[:-1]), parts[-1], None),), call))

    def _io_open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        """What workers write with ``open``: the same calls, with Python's own buffers above them."""
        parts = self._parts(file)
        if parts is None:
            return self._real_io_open(file, mode, *args, **options)
        if not set(mode) & set("wxa+"):
            reader = self._real_io_open(file, mode, *args, **options)
            self._written_elsewhere(parts)
            self._opened[reader.fileno()] = self._inode(parts)
            return reader
        assert mode in ("w", "wb", "a", "ab"), mode
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if "a" in mode else os.O_TRUNC)
        raw = io.BufferedWriter(_Raw(os.open(file, flags, 0o666)))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")


class _Raw(io.RawIOBase):
    """An open file whose writes pass through ``os.write``."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def apply_data(content: bytearray, operation: Data) -> None:
    """Do one write or truncation to the bytes of a file; what lies between two writes reads as NUL."""
    end = operation.offset + len(operation.data or b"")
    if operation.data is None:
        del content[operation.offset :]
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if operation.data is not None:
        content[operation.offset : end] = operation.data
