"""Files on a node that does not see the run directory: a cache by content, and folders that a trainer writes into.

Like ``actor``, this module is sent by value and imports nothing but the standard library. Every entry has a lock file:
held alone by the process that fills it, shared by those that use it, so that what nobody uses can be removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import uuid
from pathlib import Path

_NUM_UNUSED_KEPT = 3
_OUT = "out-"

Listing = list[tuple[str, int, int]]
"""Relative name, bytes and time of change in nanoseconds of every file; the name is empty when the path is a file."""


def list_files(path: str) -> Listing:
    """What is at ``path``, sorted by name; nothing when it does not exist. Links count as what they lead to."""
    top = Path(path)
    found = []
    for file in [top] if top.is_file() else sorted(top.rglob("*")):
        try:
            status = file.stat()
        except FileNotFoundError:
            continue  # removed while we looked
        if stat.S_ISREG(status.st_mode):
            name = "" if file == top else str(file.relative_to(top))
            found.append((name, status.st_size, status.st_mtime_ns))
    return found


class NodeFiles:
    """The node's side of ``shipping``. ``root`` is the cache folder, empty for one of this user's in the temporary folder."""

    def __init__(self) -> None:
        self._locks: dict[str, int] = {}

    def listing(self, path: str) -> Listing:
        return list_files(path)

    def read_token(self, path: str) -> str:
        """The content of a small file, empty when it is not there."""
        try:
            return Path(path).read_text("utf-8")
        except OSError:
            return ""

    def open_entry(self, root: str, key: str) -> tuple[str, bool]:
        """The folder of an entry, and whether it is complete; if not, it is the caller's to fill and ``finish``."""
        top = _top(root)
        self._tidy(top)
        folder, partial = top / key, top / f"{key}.partial"
        if key in self._locks:
            return str(folder), True
        lock = os.open(top / f"{key}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        os.utime(lock)
        # Shared locks are kept only on complete entries: whoever waits for the sole one waits for another filler.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not folder.is_dir():
            fcntl.flock(lock, fcntl.LOCK_UN)
            fcntl.flock(lock, fcntl.LOCK_EX)
        self._locks[key] = lock
        if folder.is_dir():
            fcntl.flock(lock, fcntl.LOCK_SH)
            return str(folder), True
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        return str(partial), False

    def put(self, path: str, offset: int, data: bytes) -> None:
        """Write a part of a file, which need not exist yet."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(descriptor)

    def finish(self, root: str, key: str) -> str:
        """Give a filled entry its name; the folder."""
        top = _top(root)
        partial, folder = top / f"{key}.partial", top / key
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        partial.rename(folder)
        fcntl.flock(self._locks[key], fcntl.LOCK_SH)
        return str(folder)

    def make_out(self, root: str) -> str:
        """An empty folder for what a trainer writes; removed some time after ``forget``, or after this process."""
        top = _top(root)
        self._tidy(top)
        key = _OUT + uuid.uuid4().hex
        lock = os.open(top / f"{key}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        self._locks[key] = lock
        (top / key).mkdir()
        return str(top / key)

    def get(self, path: str, offset: int, size: int) -> bytes:
        """A part of a file."""
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def forget(self) -> None:
        """Say that nothing shipped so far is used any more."""
        while self._locks:
            os.close(self._locks.popitem()[1])

    def _tidy(self, top: Path) -> None:
        """Remove what nobody uses, except the entries used last."""
        unused = []
        for lock_path in top.glob("*.lock"):
            lock = os.open(lock_path, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unused.append((lock_path.name.startswith(_OUT), -os.fstat(lock).st_mtime, lock_path, lock))
            except BlockingIOError:
                os.close(lock)
        kept = _NUM_UNUSED_KEPT
        for is_out, _, lock_path, lock in sorted(unused):
            folder = lock_path.with_suffix("")
            if is_out or kept <= 0:
                shutil.rmtree(folder, ignore_errors=True)
            kept -= folder.is_dir()
            shutil.rmtree(folder.with_name(folder.name + ".partial"), ignore_errors=True)
            if not folder.exists() and is_out:
                lock_path.unlink(missing_ok=True)
            os.close(lock)


def _top(root: str) -> Path:
    top = Path(root or Path(tempfile.gettempdir()) / f"reasonrun-{os.getuid()}")
    top.mkdir(parents=True, exist_ok=True, mode=0o700)
    if top.stat().st_uid != os.getuid():
        raise PermissionError(f"{top} belongs to another user; name a folder of your own with launcher.cache_dir")
    return top
