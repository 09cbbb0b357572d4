"""Whether a run directory is as it was written: identity, seals, checksums, fingerprints, attempts. Reads and writes nothing.

What rows mean is checked by ``report/row_checks.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from reasonrun.errors import EnvironmentProblem, ReasonrunError, RunFailed
from reasonrun.ledger.attempts import ATTEMPT_NAME
from reasonrun.ledger.catalogue import RUN_NAME, StepState, identity_digest, listed_inputs, step_inputs, step_states
from reasonrun.ledger.damage import Damage, Finding, Note, Promise
from reasonrun.ledger.files import Files, decode_json
from reasonrun.ledger.open_step_checks import check_open_step, of_later_version
from reasonrun.ledger.seals import FORMAT, OK_NAME, Seal, damaged_files, read_seal
from reasonrun.ledger.steps import STEP_NAME, Committed, is_scratch, own_entries
from reasonrun.records import digest


def verify_ledger(path: Path, files: Files, *, deep: bool) -> Iterator[Finding]:
    """Everything that is wrong with the files of a run, finished or not.

    Args:
        path: a run directory.
        files: does the reading.
        deep: read every sealed file and compare SHA-256; otherwise sizes only.
    """
    yield from _check_identity(path)
    states = step_states(path)
    for name, state in states.items():
        record = list(_check_record(path, name))
        yield from record
        if state == "committed":
            yield from _check_committed(path, name, files, deep=deep)
        elif not record:
            yield from check_open_step(path, name, files, deep=deep)
    yield from _check_inputs(path, states)
    yield from _check_root(path, files)
    yield from _check_attempts(path)
    yield from _leftovers(path)


def _check_identity(path: Path) -> Iterator[Damage]:
    def damaged(what: str, promise: Promise = "G5") -> Damage:
        return Damage(path=RUN_NAME, what=what, promise=promise, remedy="restore")

    try:
        value = decode_json((path / RUN_NAME).read_bytes())
        identity, written_by = value["identity"], value["format"]
    except FileNotFoundError:
        yield damaged("is missing: which recipe the steps were made from is not known")
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield damaged(f"cannot be read ({error})")
        return
    if not isinstance(written_by, int) or not 1 <= written_by <= FORMAT:
        yield damaged(f"has format {written_by}; this version reads up to {FORMAT}", "G1")
    unknown = sorted(value.keys() - {"format", "digest", "identity"})
    if unknown or not isinstance(identity, dict):
        yield damaged(f"holds {', '.join(unknown)}, which no build writes" if unknown else "holds no recipe", "G7")
    elif "digest" in value and value["digest"] != identity_digest(identity):  # the first builds wrote none
        yield damaged("does not match its own digest: the recipe in it was changed", "G7")


def _check_record(path: Path, name: str) -> Iterator[Damage]:
    """``step.json``: readable, and of this step."""
    record_path = path / "steps" / name / STEP_NAME
    where = record_path.relative_to(path).as_posix()
    try:
        value = decode_json(record_path.read_bytes())
        stored = value["name"]
        listed_inputs(value["fingerprint"])
    except FileNotFoundError:
        return  # a sealed file: reported with the seal
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Damage(path=where, what=f"is no step record ({error})", promise="G5", remedy="redo", step=name)
        return
    if stored != name:
        what = f"is the record of step {stored}: the folder was moved or exchanged"
        yield Damage(path=where, what=what, promise="G7", remedy="redo", step=name)


def _check_committed(path: Path, name: str, files: Files, *, deep: bool) -> Iterator[Finding]:
    folder = path / "steps" / name
    inside = f"steps/{name}"

    def damaged(file: str, what: str) -> Damage:
        return Damage(path=f"{inside}/{file}", what=what, promise="G5", remedy="redo", step=name)

    try:
        seal = read_seal(folder)
    except RunFailed:
        yield damaged(OK_NAME, "does not match its own digest")
        return
    except EnvironmentProblem as error:
        yield of_later_version(f"{inside}/{OK_NAME}", error, name)
        return
    if seal is None:
        return  # moved while this was read
    for file, entry in seal.files.items():
        try:
            problems = list(damaged_files(folder, Seal({file: entry}, {}), files, deep=deep))
        except ReasonrunError as error:
            problems = [(file, f"cannot be read ({error.message})")]
        for _, problem in problems:
            yield damaged(file, problem)
    with suppress(OSError, ValueError, KeyError, TypeError):
        if digest(decode_json((folder / STEP_NAME).read_bytes())["fingerprint"]) != seal.content["fingerprint"]:
            yield damaged(STEP_NAME, "holds another fingerprint than the one that was sealed")
    yield from _unsealed(path, folder, seal)


def _unsealed(path: Path, folder: Path, seal: Seal) -> Iterator[Finding]:
    """Files beside the sealed ones: what a stop left, or what somebody put there."""
    for entry in own_entries(folder):
        where = entry.relative_to(path).as_posix()
        if is_scratch(entry):
            if not entry.name.endswith(".tmp"):
                yield Note(path=where, what="is left from before the step was committed; the next attempt removes it")
            continue
        found = [entry] if entry.is_file() else [inner for inner in sorted(entry.rglob("*")) if inner.is_file()]
        for file in found:
            if file.name != OK_NAME and file.relative_to(folder).as_posix() not in seal.files:
                yield _foreign(file, file.relative_to(path).as_posix())
    yield from _foreign_folders(path, folder)


def _foreign(file: Path, where: str) -> Finding:
    if file.name.startswith("."):  # of a file manager, or of a network file system
        return Note(path=where, what="is a hidden file in a committed step; it is not read")
    what = "stands in a committed step that was sealed without it"
    return Damage(path=where, what=what, promise="G5", remedy="aside")


def _foreign_folders(path: Path, folder: Path) -> Iterator[Note]:
    """Folders that are neither a step's own nor lead to a nested step, and hold something."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not entry.is_dir() or entry in own_entries(folder):
            continue
        inside = [file for file in entry.rglob("*") if file.is_file()]
        if inside and not any(file.name.removesuffix(".tmp") in (STEP_NAME, OK_NAME) for file in inside):
            where = entry.relative_to(path).as_posix()
            yield Note(path=where, what="is a folder that no step has; it is not read", stale=True)


def _check_inputs(path: Path, states: Mapping[str, StepState]) -> Iterator[Finding]:
    """Every step was made from steps that are committed."""
    readers = defaultdict(list)
    for name, state in states.items():
        gone = [source for source in step_inputs(path, name) if states.get(source) != "committed"]
        if state == "committed":
            for source in gone:
                readers[source].append(name)
        elif gone:
            what = f"was begun and reads {gone[0]}, which is not committed"
            yield Note(path=f"steps/{name}", what=what, stale=True, step=name)
    for source, names in readers.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = f"is not committed, although {names[0]}{others} was made from it: its files are gone"
        yield Damage(path=f"steps/{source}", what=what, promise="G5", remedy="redo", step=source)


def _check_root(path: Path, files: Files) -> Iterator[Damage]:
    try:
        seal = read_seal(path)
        named: dict[str, str] = {} if seal is None else dict(seal.content["steps"])
    except (RunFailed, KeyError, TypeError, ValueError):
        yield Damage(path=OK_NAME, what="does not match its own digest", promise="G1", remedy="aside")
        return
    except EnvironmentProblem as error:
        yield of_later_version(OK_NAME, error)
        return
    for name, expected in named.items():
        folder = path / "steps" / name
        with suppress(RunFailed, EnvironmentProblem):  # reported with the step
            step = read_seal(folder)
            if step is None:
                what = "is not committed, although the run finished with it"
                yield Damage(path=f"steps/{name}", what=what, promise="G5", remedy="redo", step=name)
            elif Committed(name, folder, step, files).digest != expected:
                what = "seals other bytes than those that the run finished with"
                yield Damage(path=f"steps/{name}", what=what, promise="G5", remedy="redo", step=name)


def _check_attempts(path: Path) -> Iterator[Damage]:
    attempts = path / "attempts"
    for folder in sorted(attempts.iterdir()) if attempts.is_dir() else []:
        record = folder / ATTEMPT_NAME
        if not folder.name.isdigit():
            continue
        try:
            value: Any = decode_json(record.read_bytes())
            problem = "" if isinstance(value, dict) and "pid" in value else "is no record of an attempt"
        except FileNotFoundError:  # a process that died at once leaves an empty folder, or a temporary file
            worked = [entry for entry in folder.iterdir() if not entry.name.endswith(".tmp")]
            problem = "is missing, although the attempt did some work" if worked else ""
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        if problem:
            where = record.relative_to(path).as_posix()
            yield Damage(path=where, what=f"{problem}: which code it ran is not known", promise="G7", remedy="aside")


def _leftovers(path: Path) -> Iterator[Note]:
    """Temporary files of processes that were stopped while they wrote."""
    found = [*path.glob("*.tmp"), *path.glob("attempts/*/*.tmp"), *(path / "steps").rglob("*.tmp")]
    inside = [entry for entry in found if not any(parent in found for parent in entry.parents)]
    for entry in sorted(inside):
        where = entry.relative_to(path).as_posix()
        yield Note(path=where, what="was left by a process that was stopped while it wrote", stale=True)
