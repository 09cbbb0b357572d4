"""``symbolic-1``: the stated answer and the reference are mathematically equal.

Equal text and equal numbers are decided here, at full speed; only the rest goes to math-verify in the pool.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reasonrun.grading.answers import (
    BOXED,
    compile_markers,
    find_answer,
    last_boxed,
    normalise,
    read_number,
    recorded,
    write_number,
)
from reasonrun.grading.limits import refusal
from reasonrun.grading.number import ExtractionSettings, GradeItem
from reasonrun.grading.pool import SymbolicPool, Ticket
from reasonrun.records import Problem, Score
from reasonrun.settings import Effect, setting

_WINDOW = 4_096  # verdicts that may wait behind one slow pair, so that order costs neither memory nor idle workers
_UNGRADED = frozenset({"deadline", "memory", "crash", "too_large", "unreadable_reference"})
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]$]|\$")
_SPACES = re.compile(r"\s+|\\[,;:! ]|\\(?:left|right)(?![a-z])")


class SymbolicSettings(ExtractionSettings):
    """Extraction, and what one comparison may cost."""

    markers: tuple[str, ...] = setting(
        (BOXED, r"####", r"[Tt]he (?:final )?answer is"),
        Effect.SEMANTIC,
        "Patterns that announce the answer, in order of preference; boxed stands for \\boxed{…}.",
        min_length=1,
    )
    cpu_seconds: float = setting(5.0, Effect.SEMANTIC, "CPU time for one pair before it counts as ungraded.", gt=0)
    memory_mib: int = setting(1024, Effect.SEMANTIC, "Address space of one grading process in MiB.", ge=256)
    num_workers: int = setting(0, Effect.OPERATIONAL, "Grading processes; 0 takes one per core, at most 8.", ge=0)


@dataclass(frozen=True)
class _Waiting:
    answer: str
    ticket: Ticket


class SymbolicGrader:
    """Grades mathematical expressions. Holds a pool of processes once it has needed one; ``close`` ends them."""

    id = "symbolic-1"
    Settings = SymbolicSettings

    def __init__(self, settings: SymbolicSettings | None = None) -> None:
        self.settings = settings or SymbolicSettings()
        self._patterns = compile_markers(self.settings.markers)
        self._pool: SymbolicPool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # processes stay here; the copy starts its own

    def grade(self, problem: Problem, text: str, *, truncated: bool) -> Score:
        """Verdict on one completion. Reasons: those of ``number-1``, and with value None ``deadline``, ``memory``,
        ``crash``, ``too_large`` (the answer names a number that cannot be computed)."""
        return next(self.grade_many([(problem, text, truncated)]))

    def grade_many(self, items: Iterable[GradeItem]) -> Generator[Score]:
        """Verdicts in the order of ``items``; several pairs are compared at a time."""
        waiting: deque[Score | _Waiting] = deque()
        for problem, text, truncated in items:
            waiting.append(self._begin(problem, text, truncated))
            if len(waiting) > 1 or isinstance(waiting[0], _Waiting):
                self._started_pool().pump(0.0)
            yield from self._finished(waiting, num_left=_WINDOW)
        yield from self._finished(waiting, num_left=0)

    def close(self) -> None:
        """End the grading processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _finished(self, waiting: deque[Score | _Waiting], *, num_left: int) -> Iterator[Score]:
        """Take what is decided from the front, and wait while more than ``num_left`` are there."""
        while waiting:
            head = waiting[0]
            if isinstance(head, _Waiting):
                if head.ticket.reason is None and len(waiting) <= num_left:
                    return
                head = self._verdict(head.answer, self._started_pool().wait(head.ticket))
            waiting.popleft()
            yield head

    def _begin(self, problem: Problem, text: str, truncated: bool) -> Score | _Waiting:
        if truncated:
            return self._verdict(None, "truncated")
        if not math_source(problem.reference):
            return self._verdict(None, "unreadable_reference")
        answer = find_answer(text, self._patterns, last_number=self.settings.last_number)
        if answer is None:
            return self._verdict(None, "no_answer")
        reason = quick_reason(problem.reference, answer)
        if reason is not None:
            return self._verdict(answer, reason)
        ticket = self._started_pool().submit(math_source(problem.reference), math_source(answer))
        return _Waiting(answer=answer, ticket=ticket)

    def _verdict(self, answer: str | None, reason: str) -> Score:
        value = None if reason in _UNGRADED else float(reason == "correct")
        number = None if answer is None else read_number(answer, units=False)
        spelling = answer if number is None else write_number(number)
        return Score(
            value=value,
            answer=None if spelling is None else recorded(spelling),
            reason=reason,
            grader=self.id,
        )

    def _started_pool(self) -> SymbolicPool:
        if self._pool is None:
            self._pool = SymbolicPool(
                num_workers=self.settings.num_workers or min(8, _num_cores()),
                cpu_seconds=self.settings.cpu_seconds,
                memory_mib=self.settings.memory_mib,
            )
        return self._pool


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quick_reason(reference: str, answer: str) -> str | None:
    """The reason that needs no algebra, or None: equal or different numbers, equal text, refused by the filter."""
    gold, stated = read_number(reference, units=False), read_number(answer, units=False)
    if gold is not None and stated is not None:
        return "correct" if gold == stated else "wrong"
    if len(answer) <= len(reference) + 1_000 and normalise_math(answer) == normalise_math(reference):
        return "correct"
    if refusal(reference) is not None:
        return "unreadable_reference"
    return refusal(answer)


@lru_cache(maxsize=16_384)
def math_source(text: str) -> str:
    """The LaTeX of ``text`` without box, maths delimiters and full stop; spaces stay, they end TeX commands."""
    return _DELIMITERS.sub("", last_boxed(text) or text).strip(" \t\r\n.")


@lru_cache(maxsize=16_384)
def normalise_math(text: str) -> str:
    """``normalise`` without any space: one spelling for LaTeX that differs only in typography."""
    return _SPACES.sub("", normalise(text))
