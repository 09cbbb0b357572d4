"""Whether what an unfinished step has so far can be gone on from: its logs of rows and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from reasonrun.errors import EnvironmentProblem, RunFailed
from reasonrun.ledger.damage import Damage, Finding, Note, Remedy
from reasonrun.ledger.files import Files
from reasonrun.ledger.seals import damaged_files, read_seal
from reasonrun.ledger.steps import CHECKPOINTS, is_scratch, own_entries, wal_name
from reasonrun.ledger.wal_lines import examine_log, is_same_row

_MAX_OFFSETS = 5  # that a message names


def check_open_step(path: Path, name: str, files: Files, *, deep: bool) -> Iterator[Finding]:
    """What is wrong with the logs and checkpoints of a step that was begun and is not committed."""
    folder = path / "steps" / name
    for entry in own_entries(folder):
        if entry.suffix == ".jsonl" and is_scratch(entry):
            with suppress(FileNotFoundError):  # the step was committed meanwhile
                yield from _check_log(path, name, entry)
    for checkpoint in sorted((folder / CHECKPOINTS).glob("*")):
        yield from _check_checkpoint(path, checkpoint, files, deep=deep)


def of_later_version(where: str, error: EnvironmentProblem, step: str = "") -> Damage:
    """A seal that only a later version of reasonrun can read: nothing of it is moved."""
    what = f"cannot be read: {error.message.rstrip('.')}; {error.hint}"
    return Damage(path=where, what=what, promise="G1", remedy="restore", step=step)


def _check_log(path: Path, name: str, log: Path) -> Iterator[Finding]:
    first_places: dict[int, int] = {}
    twice: list[int] = []
    where = log.relative_to(path).as_posix()

    with open(log, "rb") as earlier:

        def on_row(ordinal: int, line: bytes, offset: int) -> None:
            earlier.seek(first_places.setdefault(ordinal, offset))
            if first_places[ordinal] != offset and not is_same_row(earlier.readline(), line):
                twice.append(offset)

        extent = examine_log(log, on_row)
    # Rows of a table stand for themselves; a trainer's log belongs to the checkpoint that it was committed with.
    remedy: Remedy = "log" if log.name == wal_name("rows") else "redo"
    if extent.damaged:
        what = f"has {_lines(extent.damaged)} in the middle that do not match their checksums"
        yield Damage(path=where, what=what, promise="G5", remedy=remedy, step=name)
    if twice:
        what = f"holds rows a second time with other results, in {_lines(tuple(twice))}"
        yield Damage(path=where, what=what, promise="G2", remedy=remedy, step=name)
    if not extent.damaged and extent.end < extent.size:
        size = extent.size - extent.end
        what = f"ends with {size} bytes, from byte {extent.end} on, that a stop tore; the next attempt sets them aside"
        yield Note(path=where, what=what)


def _lines(offsets: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, offsets[:_MAX_OFFSETS]))
    more = f" and {len(offsets) - _MAX_OFFSETS} more" if len(offsets) > _MAX_OFFSETS else ""
    return f"{len(offsets)} line{'s' if len(offsets) > 1 else ''} (at byte {shown}{more})"


def _check_checkpoint(path: Path, checkpoint: Path, files: Files, *, deep: bool) -> Iterator[Finding]:
    where = checkpoint.relative_to(path).as_posix()
    try:
        seal = read_seal(checkpoint)
        if seal is None:
            yield Note(path=where, what="is a checkpoint that was being removed; it is not read", stale=True)
            return
        problems = [f"{file} {problem}" for file, problem in damaged_files(checkpoint, seal, files, deep=deep)]
    except EnvironmentProblem as error:
        yield of_later_version(where, error)
        return
    except RunFailed:
        problems = ["its seal does not match its own digest"]
    for problem in problems:
        what = f"is a checkpoint of which {problem}; training would go on from an earlier one"
        yield Damage(path=where, what=what, promise="G5", remedy="aside")
