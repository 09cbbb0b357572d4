"""The corpus of bad input: files as people make them, and what the command line must say about each.

``corpus/recipes/NAME.yaml`` or ``corpus/data/TASK/NAME.*`` is the input, ``NAME.expected`` beside it what must come of it:

- the first line is the exit code;
- a line that begins with ``$ `` holds the arguments, ``{file}`` for the input, where they are not the usual ones;
- a line that begins with ``! `` is a text that must not appear;
- every other line must appear within a line of the output, in this order.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 3.0  # of the processor, on a busy machine too; the aim is one
TERMINAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What an ``.expected`` file asks for."""

    exit_code: int
    arguments: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    never: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended in this process."""

    exit_code: int
    out: str
    err: str
    seconds: float  # of the processor
    imported: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        return self.out + self.err


def cases(folder: Path) -> dict[str, Path]:
    """The ``.expected`` files by the name of their input."""
    return {path.stem: path for path in sorted(folder.glob("*.expected"))}


def input_of(expected: Path) -> Path:
    """The file, or folder, that an ``.expected`` file is about."""
    (found,) = [path for path in expected.parent.glob(f"{expected.stem}.*") if path != expected]
    return found


def read_expected(path: Path) -> Expected:
    """The parts of an ``.expected`` file."""
    first, *rest = path.read_text("utf-8").splitlines()
    commands = [line[2:] for line in rest if line.startswith("$ ")]
    return Expected(
        exit_code=int(first),
        # a backslash escape stands for a character that no editor shows
        arguments=[word.encode().decode("unicode_escape") for word in shlex.split(commands[0])] if commands else [],
        lines=[line for line in rest if not line.startswith(("$ ", "! "))],
        never=[line[2:] for line in rest if line.startswith("! ")],
    )


def place(source: Path, target: Path) -> None:
    """Copy an input to where the command looks for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def reasonrun(*arguments: str) -> Done:
    """Run the command line in this process, as ``python -m reasonrun`` would."""
    from reasonrun.cli.main import main

    out, err, before = io.StringIO(), io.StringIO(), set(sys.modules)
    begin, code = time.process_time(), 0
    with (
        mock.patch.object(sys, "argv", ["reasonrun", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    seconds = time.process_time() - begin
    imported = frozenset({"torch", "transformers", "trl", "vllm"} & (set(sys.modules) - before))
    return Done(exit_code=code, out=out.getvalue(), err=err.getvalue(), seconds=seconds, imported=imported)


def missing_line(expected: Expected, text: str) -> str:
    """The first expected line that does not follow the ones before it; empty when all do."""
    waiting = iter(text.splitlines())
    return next((wanted for wanted in expected.lines if not any(wanted in line for line in waiting)), "")


def assert_as_expected(expected: Expected, done: Done) -> None:
    """Exit code, lines, and what holds of every refusal: quick, readable, no traceback, nothing heavy imported."""
    assert done.exit_code == expected.exit_code, done.text
    assert not missing_line(expected, done.text), f"{missing_line(expected, done.text)}\n--- is not in\n{done.text}"
    assert not [text for text in expected.never if text in done.text], done.text
    assert "Traceback" not in done.text
    assert not TERMINAL.search(done.text), ascii(TERMINAL.search(done.text))
    assert not done.imported
    assert done.seconds < SECONDS
