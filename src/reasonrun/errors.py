"""Errors that a user meets, one class per exit code, and the table of all exit codes.

Each message says what is wrong, where, what is allowed, and what to do next. The command line prints the message
without a traceback; every other exception is a bug of ours and shows its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended; ``EXIT_CODES`` says what each means and what to do then."""

    DONE = 0
    FAILED = 1
    RECIPE = 2
    ENVIRONMENT = 3
    CONFLICT = 4
    FINDING = 5
    STOPPED = 75
    INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitMeaning:
    """One exit code. ``label`` is the word before the message; ``remedies`` have the cheapest first."""

    label: str
    meaning: str
    remedies: tuple[str, ...]


EXIT_CODES = {
    ExitCode.DONE: ExitMeaning(
        label="done",
        meaning="The command did what it was asked to do. For a run that was finished before, that is nothing.",
        remedies=(),
    ),
    ExitCode.FAILED: ExitMeaning(
        label="error",
        meaning="The run cannot go on: a worker died again and again, a loss became non-finite, committed data is damaged;"
        " or, with a traceback, there is a bug in reasonrun or in a class of your own.",
        remedies=(
            "read the message: it names the step, the request or the file",
            "the same command goes on from what is committed; that helps when the cause lay outside the run",
            "the logs of the workers are in attempts/<n>/ of the run directory",
            "a damaged step is made again by --redo STEP",
        ),
    ),
    ExitCode.RECIPE: ExitMeaning(
        label="error",
        meaning="The recipe, the command line or an input file is wrong. Nothing was started.",
        remedies=(
            "the message names file, line and column, the nearest key and what is allowed",
            "reasonrun check RECIPE shows all mistakes at once",
            "reasonrun explain KEY says what a field takes",
        ),
    ),
    ExitCode.ENVIRONMENT: ExitMeaning(
        label="error",
        meaning="Something outside the recipe is missing or taken: a package, a model, a device, disk space, a cluster.",
        remedies=(
            "the message says what is missing and the command that gets it",
            "reasonrun doctor shows what this machine has",
            "the same command goes on once it is there; nothing committed is lost",
        ),
    ),
    ExitCode.CONFLICT: ExitMeaning(
        label="error",
        meaning="The run directory belongs to a process that is running, to another recipe or to other code.",
        remedies=(
            "take the change back: the message names the step and the fields that differ",
            "--run NEW begins another run with the change and leaves this one alone",
            "--redo STEP sets that step and what depends on it aside and makes them again",
            "--prune, where fewer rounds or steps are asked for than are committed",
            "--accept-code keeps rows that other code made",
            "where another process owns the directory, wait for it or stop it; its pid is in the message",
        ),
    ),
    ExitCode.FINDING: ExitMeaning(
        label="finding",
        meaning="The experiment ended with something to say: nothing to learn from, a failed gate, a collapse, corrections"
        " that only repeat. What was measured is kept, and so is the best model.",
        remedies=(
            "the message holds the counts; reasonrun samples RUN shows the rows behind them",
            "the same command says the same without work; change the recipe to try something else",
            "preflight=report starts a run in spite of what its preflight found",
        ),
    ),
    ExitCode.STOPPED: ExitMeaning(
        label="stopped",
        meaning="A signal, a time limit, a spending limit or a server that is away stopped the run. What is committed is safe.",
        remedies=("the same command continues it",),
    ),
    ExitCode.INTERRUPTED: ExitMeaning(
        label="stopped",
        meaning="Ctrl-C stopped the run. What is committed is safe; after a second Ctrl-C it is too.",
        remedies=("the same command continues it",),
    ),
}


class ReasonrunError(Exception):
    """A problem that the user can act on.

    Args:
        message: what is wrong and where, one or more lines.
        hint: the cheapest next step, shown on a line of its own.
    """

    exit_code: int = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RunFailed(ReasonrunError):
    """The run cannot go on: a worker died again and again, a loss became non-finite, committed data is damaged."""

    exit_code: int = ExitCode.FAILED


class OutOfMemory(RunFailed):
    """Training in several processes that cannot halve its forward passes by itself; less at a time may fit."""


class RecipeError(ReasonrunError):
    """The recipe, the command line or an input file is wrong; nothing was started."""

    exit_code: int = ExitCode.RECIPE


class EnvironmentProblem(ReasonrunError):
    """Something outside the recipe is missing: a package, a model, a device, disk space."""

    exit_code: int = ExitCode.ENVIRONMENT


class RunConflict(ReasonrunError):
    """The run directory belongs to another process, another recipe or other code."""

    exit_code: int = ExitCode.CONFLICT


class Finding(ReasonrunError):
    """The experiment ended with a result that is not a model: nothing to learn from, a failed gate, collapse.

    Args:
        message: what was found.
        evidence: the counts that show it, by reason.
        hint: the next step.
    """

    exit_code: int = ExitCode.FINDING

    def __init__(self, message: str, *, evidence: dict[str, int | float] | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.evidence = evidence or {}

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  {reason}: {count}" for reason, count in sorted(self.evidence.items())]
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


class Stopped(ReasonrunError):
    """A signal asked the run to stop, or a server that it needs is away; the same command continues it.

    Exit 75, 130 for Ctrl-C.
    """

    exit_code: int = ExitCode.STOPPED

    def __init__(self, message: str, *, exit_code: int = ExitCode.STOPPED, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
