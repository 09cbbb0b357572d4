"""Crash states: what may be on disk after power is lost at any moment of a recorded run.

The model, deliberately weaker than what ext4 (data=ordered) and xfs give, so that the ledger leans on neither:

- fsync of a file makes all bytes and truncations of that file so far durable, and nothing else: not its name.
- fsync of a folder makes the changes of its entries so far durable, and nothing else: not its own name in its parent.
- Bytes that were not flushed may be there, be missing, be torn at any byte, read as NUL in the whole of their length or
  in any sector, or be there while bytes written before them read as NUL. Each file decides for itself. A truncation that
  was not flushed may be lost.
- Changes of names that were not flushed may be lost one by one, in any order and in any combination, except that a
  change never survives without the earlier changes of the same names, and that a rename is one change: no moment shows
  both names or neither, in one folder or between two, and it is durable only when both folders are flushed.
- The device keeps what it reported as flushed, and does not change bytes that nobody writes. Freed blocks never show
  through as foreign bytes. The modification time of a file may be on disk without its bytes.

A kill without loss of power is the state in which nothing is lost.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recorded_disk import ROOT, Claim, Data, Flush, Names, Operation, apply_data

SECTOR = 64
"""Bytes that survive or vanish together; far below the 512 of a disk, so that small files have several."""

Change = tuple[int, Names]
Write = tuple[int, Data]


@dataclass(frozen=True)
class CrashState:
    """One tree of files that a crash may leave.

    Attributes:
        files: content by relative path.
        folders: relative paths of all folders.
        num_operations: how many operations of the record had been asked for.
        how: what was lost, in words.
        is_kill: nothing was lost but the process.
    """

    files: dict[str, bytes]
    folders: frozenset[str]
    num_operations: int
    how: str
    is_kill: bool

    @property
    def key(self) -> str:
        """Equal for equal trees."""
        whole = hashlib.sha256()
        for name in sorted(self.folders):
            whole.update(name.encode() + b"/\0")
        for name, content in sorted(self.files.items()):
            whole.update(name.encode() + b"\0%d\0" % len(content) + content)
        return whole.hexdigest()

    def write(self, root: Path) -> None:
        """Put the tree on a real disk, below an existing folder."""
        for name in sorted(self.folders):
            os.mkdir(root / name)
        for name, content in self.files.items():
            descriptor = os.open(root / name, os.O_WRONLY | os.O_CREAT, 0o666)
            os.write(descriptor, content)
            os.close(descriptor)


class Moment:
    """A prefix of the record, split into what is durable and what may be lost."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self.num_operations = len(operations)
        self._names: list[Change] = []
        self._writes: list[Write] = []
        flushed_at: dict[int, int] = {}
        for number, operation in enumerate(operations):
            if isinstance(operation, Flush):
                flushed_at[operation.inode] = number
            elif isinstance(operation, Names):
                self._names.append((number, operation))
            elif isinstance(operation, Data):
                self._writes.append((number, operation))
        self.loose_names = self._loose_names(flushed_at)
        self.loose_writes = [
            (number, write) for number, write in self._writes if flushed_at.get(write.inode, -1) < number
        ]

    def _loose_names(self, flushed_at: dict[int, int]) -> list[Change]:
        """Changes that nothing durable builds on and whose folders were not all flushed since."""
        loose: list[Change] = []
        needed: set[tuple[int, str]] = set()
        for number, change in reversed(self._names):
            keys = {(folder, name) for folder, name, _ in change.changes}
            if all(flushed_at.get(folder, -1) > number for folder, _ in keys) or keys & needed:
                needed |= keys
            else:
                loose.append((number, change))
        return loose[::-1]

    def state(
        self,
        lost_names: frozenset[int] = frozenset(),
        spoil: Callable[[int, Data], Data | None] = lambda number, write: write,
        how: str = "",
    ) -> CrashState:
        """The tree when the loose changes in ``lost_names`` and all that builds on them never reached the disk, and every
        loose write is replaced by what ``spoil`` makes of it (None: it is lost)."""
        entries: dict[int, dict[str, int]] = {ROOT: {}}
        blocked: set[tuple[int, str]] = set()
        for number, change in self._names:
            keys = {(folder, name) for folder, name, _ in change.changes}
            if number in lost_names or keys & blocked:
                blocked |= keys
                continue
            for folder, name, inode in change.changes:
                if inode is None:
                    entries.setdefault(folder, {}).pop(name, None)
                else:
                    entries.setdefault(folder, {})[name] = inode
                    if change.call == "mkdir":
                        entries.setdefault(inode, {})
        contents = self._contents(spoil)
        files: dict[str, bytes] = {}
        folders: set[str] = set()
        waiting = [("", ROOT)]
        while waiting:
            path, inode = waiting.pop()
            for name, child in entries[inode].items():
                if child in entries:
                    folders.add(path + name)
                    waiting.append((f"{path}{name}/", child))
                else:
                    files[path + name] = bytes(contents.get(child, b""))
        return CrashState(files, frozenset(folders), self.num_operations, how, how == "killed")

    def _contents(self, spoil: Callable[[int, Data], Data | None]) -> dict[int, bytearray]:
        loose = {number for number, _ in self.loose_writes}
        contents: dict[int, bytearray] = {}
        for number, write in self._writes:
            done = spoil(number, write) if number in loose else write
            if done is not None:
                apply_data(contents.setdefault(write.inode, bytearray()), done)
        return contents

    def must_survive(self, number: int) -> set[int]:
        """The loose changes without which the change ``number`` cannot be on disk, itself among them."""
        wanted = {(folder, name) for folder, name, _ in dict(self._names)[number].changes}
        kept = {number}
        for earlier, change in reversed(self._names):
            keys = {(folder, name) for folder, name, _ in change.changes}
            if earlier < number and keys & wanted:
                wanted |= keys
                kept.add(earlier)
        return kept


def crash_states(
    operations: Sequence[Operation], rng: random.Random, *, num_before: int = 0, thorough: Callable[[str], bool]
) -> Iterator[CrashState]:
    """States at every prefix of a record; trees repeat.

    Args:
        operations: the record.
        rng: chooses the mixed losses.
        num_before: how many operations only describe what was there when the record began.
        thorough: whether the write that a path's file just got is torn at every byte.
    """
    for length in range(num_before + 1, len(operations) + 1):
        if isinstance(operations[length - 1], Claim) and length < len(operations):
            continue
        moment = Moment(operations[:length])
        yield moment.state(how="killed")
        yield from _lost_names(moment, rng)
        yield from _lost_bytes(moment, rng, thorough, is_new=isinstance(operations[length - 1], Data))
        yield from _mixed(moment, rng)


def _lost_names(moment: Moment, rng: random.Random) -> Iterator[CrashState]:
    loose = [number for number, _ in moment.loose_names]
    if not loose:
        return
    yield moment.state(frozenset(loose), how="no loose name survives")
    yield moment.state(frozenset(loose), _nothing, how="nothing loose survives")
    for number in loose[-6:]:
        yield moment.state(frozenset({number}), how=f"change of names {number} is lost")
        kept = moment.must_survive(number)
        alone = frozenset(set(loose) - kept)
        yield moment.state(alone, how=f"of the loose names only change {number} survives")
        yield moment.state(alone, _nothing, how=f"of all that is loose only change {number} survives")


def _lost_bytes(
    moment: Moment, rng: random.Random, thorough: Callable[[str], bool], is_new: bool
) -> Iterator[CrashState]:
    if not moment.loose_writes:
        return
    yield moment.state(spoil=_nothing, how="no loose byte survives")
    yield moment.state(spoil=_zeroed, how="all loose bytes read as NUL")
    for number, _ in moment.loose_writes[-3:]:
        yield moment.state(spoil=_only(number, _hollow), how=f"the middle of write {number} reads as NUL")
    number, last = moment.loose_writes[-1]
    yield moment.state(spoil=_only(number, _zeroed), how="the last write reads as NUL")
    if len(moment.loose_writes) > 1:
        yield moment.state(spoil=_all_but(number, _zeroed), how="all but the last loose write read as NUL")
        yield moment.state(spoil=_all_but(number, _nothing), how="all but the last loose write are lost")
        earlier = rng.choice(moment.loose_writes[:-1])[0]
        yield moment.state(spoil=_only(earlier, _zeroed), how=f"write {earlier} reads as NUL")
        yield moment.state(spoil=_only(earlier, _nothing), how=f"write {earlier} is lost")
    size = len(last.data or b"")
    if is_new and size > 1:
        written = moment.state().files
        name = next((path for path, content in written.items() if last.data and content.endswith(last.data)), "")
        cuts = range(1, size) if thorough(name) else sorted({1, size // 2, size - 1, rng.randrange(1, size)})
        for cut in cuts:
            yield moment.state(spoil=_only(number, _torn(cut)), how=f"the last write is torn at byte {cut}")
        for cut in sorted({size // 2, rng.randrange(1, size)}):
            yield moment.state(
                spoil=_only(number, _hollow_after(cut)), how=f"the last write reads as NUL from {cut} on"
            )
        for _ in range(2):
            start = rng.randrange(0, size, SECTOR)
            yield moment.state(
                spoil=_only(number, _without_sector(start)), how=f"a sector at byte {start} reads as NUL"
            )


def _mixed(moment: Moment, rng: random.Random) -> Iterator[CrashState]:
    """Every loose change and write decides for itself."""
    if len(moment.loose_names) + len(moment.loose_writes) < 2:
        return
    for _ in range(2):
        lost = frozenset(number for number, _ in moment.loose_names if rng.random() < 0.5)
        fates = {number: rng.choice([_whole, _nothing, _zeroed, _half, _hollow]) for number, _ in moment.loose_writes}
        yield moment.state(lost, lambda number, write, fates=fates: fates[number](number, write), how="mixed losses")


Spoil = Callable[[int, Data], Data | None]


def _whole(number: int, write: Data) -> Data | None:
    return write


def _nothing(number: int, write: Data) -> Data | None:
    return None


def _zeroed(number: int, write: Data) -> Data | None:
    return write if write.data is None else Data(write.inode, write.offset, bytes(len(write.data)))


def _half(number: int, write: Data) -> Data | None:
    return _torn(len(write.data or b"") // 2)(number, write)


def _hollow(number: int, write: Data) -> Data | None:
    """A part in the middle reads as NUL: begin and end, by which formats recognise themselves, are there."""
    if write.data is None:
        return write
    start, stop = (len(write.data) * tenths // 10 for tenths in (6, 8))
    return Data(write.inode, write.offset, write.data[:start] + bytes(stop - start) + write.data[stop:])


def _only(chosen: int, spoil: Spoil) -> Spoil:
    return lambda number, write: spoil(number, write) if number == chosen else write


def _all_but(chosen: int, spoil: Spoil) -> Spoil:
    return lambda number, write: write if number == chosen else spoil(number, write)


def _torn(cut: int) -> Spoil:
    return lambda number, write: write if write.data is None else Data(write.inode, write.offset, write.data[:cut])


def _hollow_after(cut: int) -> Spoil:
    def spoil(number: int, write: Data) -> Data | None:
        if write.data is None:
            return write
        return Data(write.inode, write.offset, write.data[:cut] + bytes(len(write.data) - cut))

    return spoil


def _without_sector(start: int) -> Spoil:
    def spoil(number: int, write: Data) -> Data | None:
        if write.data is None:
            return write
        stop = min(start + SECTOR, len(write.data))
        return Data(write.inode, write.offset, write.data[:start] + bytes(stop - start) + write.data[stop:])

    return spoil
