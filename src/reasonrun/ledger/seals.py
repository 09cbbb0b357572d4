"""``_OK.json``: the file that makes a folder count. It is written last, and nothing without it is ever read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reasonrun
from reasonrun.errors import EnvironmentProblem, RunFailed
from reasonrun.ledger.faults import FileKind
from reasonrun.ledger.files import FileEntry, Files, decode_json, encode_json
from reasonrun.records import digest

OK_NAME = "_OK.json"
FORMAT = 1
"""Version of the run directory's format."""


@dataclass(frozen=True)
class Seal:
    """What an ``_OK.json`` says: the files of a folder by relative path, and what the step wants remembered."""

    files: Mapping[str, FileEntry]
    content: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Digest of everything that the seal says; stored in it, so that a damaged seal is recognised."""
        return digest({"files": _plain(self.files), "content": self.content})


def write_seal(folder: Path, seal: Seal, files: Files, kind: FileKind) -> None:
    """Seal ``folder``. Every file named in ``seal`` must be durable already."""
    value = {
        "format": FORMAT,
        "reasonrun": reasonrun.__version__,
        "digest": seal.digest,
        "files": _plain(seal.files),
        "content": seal.content,
    }
    files.write_atomic(folder / OK_NAME, encode_json(value, indent=1, sort_keys=True) + b"\n", kind)


def read_seal(folder: Path, *, hint: str = "") -> Seal | None:
    """The seal of ``folder``; None when there is none.

    Raises:
        RunFailed: the seal is damaged.
        EnvironmentProblem: a later version of reasonrun wrote it.
    """
    path = folder / OK_NAME
    if not path.is_file():
        return None
    try:
        value = decode_json(path.read_bytes())
        seal = _vouched_for(value)
        if seal is not None and 1 <= value["format"] <= FORMAT:
            return seal
        # Its digest is computed otherwise in a later format; where it holds, the number alone was changed.
        if seal is None and value["format"] > FORMAT:
            raise EnvironmentProblem(
                f"{path} has format {value['format']} (reasonrun {value['reasonrun']}); this version reads up to "
                f"{FORMAT}.",
                hint=f"use reasonrun {value['reasonrun']} or later for this run",
            )
    except (ValueError, KeyError, TypeError):
        pass
    raise RunFailed(f"{path} is damaged: its content does not match its own digest.", hint=hint)


def _vouched_for(value: Any) -> Seal | None:
    """The seal in the present form; None when its own digest does not hold."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        entries = {name: FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in value["files"].items()}
        seal = Seal(entries, value["content"])
        if seal.digest == value["digest"]:
            return seal
    return None


def verify_files(folder: Path, seal: Seal, files: Files, *, deep: bool, hint: str = "") -> None:
    """Compare the files of a sealed folder with its seal.

    Args:
        folder: the sealed folder.
        seal: what it should hold.
        files: does the reading.
        deep: read everything and compare SHA-256; otherwise sizes only.
        hint: the way out, for the message.

    Raises:
        RunFailed: a file is missing or differs; the message names the first one.
    """
    for name, problem in damaged_files(folder, seal, files, deep=deep):
        raise RunFailed(f"Committed data is damaged: {folder / name} {problem}.", hint=hint)


def damaged_files(folder: Path, seal: Seal, files: Files, *, deep: bool) -> Iterator[tuple[str, str]]:
    """Relative path of each sealed file that is missing or differs, and in which way; see ``verify_files``."""
    for name, entry in seal.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            yield name, "is missing"
        elif size != entry.size:
            yield name, f"has {size} bytes instead of {entry.size}"
        elif deep and files.hash(path) != entry.sha256:
            yield name, "does not match its SHA-256"


def _plain(entries: Mapping[str, FileEntry]) -> dict[str, dict[str, Any]]:
    return {name: asdict(entry) for name, entry in sorted(entries.items())}
