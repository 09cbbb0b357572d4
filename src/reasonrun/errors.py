"""Errors that a user meets, one class per exit code.

Each message says what is wrong, where, what is allowed, and what to do next. The command line prints the message
without a traceback; every other exception is a bug of ours and shows its traceback.
"""

from __future__ import annotations


class ReasonrunError(Exception):
    """A problem that the user can act on.

    Args:
        message: what is wrong and where, one or more lines.
        hint: the cheapest next step, shown on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RunFailed(ReasonrunError):
    """The run cannot go on: a worker died again and again, a loss became non-finite, committed data is damaged."""

    exit_code = 1


class OutOfMemory(RunFailed):
    """Training in several processes that cannot halve its forward passes by itself; less at a time may fit."""


class RecipeError(ReasonrunError):
    """The recipe, the command line or an input file is wrong; nothing was started."""

    exit_code = 2


class EnvironmentProblem(ReasonrunError):
    """Something outside the recipe is missing: a package, a model, a device, disk space."""

    exit_code = 3


class RunConflict(ReasonrunError):
    """The run directory belongs to another process, another recipe or other code."""

    exit_code = 4


class Finding(ReasonrunError):
    """The experiment ended with a result that is not a model: nothing to learn from, a failed gate, collapse.

    Args:
        message: what was found.
        evidence: the counts that show it, by reason.
        hint: the next step.
    """

    exit_code = 5

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

    exit_code = 75

    def __init__(self, message: str, *, exit_code: int = 75, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
