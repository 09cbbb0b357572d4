"""``number-1``: the stated answer and the reference are the same number, exactly."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable

from pydantic import field_validator

from reasonrun.grading.answers import BOXED, compile_markers, find_answer, read_number, recorded, write_number
from reasonrun.records import Problem, Score
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

GradeItem = tuple[Problem, str, bool]
"""What a grader is asked about: problem, completion text, whether the completion was cut off."""


class ExtractionSettings(SettingsBase):
    """How the stated answer is found."""

    markers: tuple[str, ...] = setting(
        (r"####", BOXED, r"[Tt]he (?:final )?answer is"),
        Effect.SEMANTIC,
        "Patterns that announce the answer, in order of preference; boxed stands for \\boxed{…}.",
        min_length=1,
    )
    last_number: bool = setting(
        False, Effect.SEMANTIC, "Without any marker, take the last number of the text; only for untrained formats."
    )

    @field_validator("markers")
    @classmethod
    def _compiles(cls, markers: tuple[str, ...]) -> tuple[str, ...]:
        for marker in markers:
            try:
                pattern = re.compile("" if marker == BOXED else marker)
            except re.error as error:
                raise ValueError(f"marker {marker!r} is no valid regular expression: {error}") from None
            if marker != BOXED and pattern.match(""):
                raise ValueError(f"marker {marker!r} matches the empty text, so it would announce an answer everywhere")
        return markers


class NumberGrader:
    """Exact comparison of numbers after typographic normalisation; fast enough to run in the supervisor."""

    id = "number-1"
    Settings = ExtractionSettings

    def __init__(self, settings: ExtractionSettings | None = None) -> None:
        self.settings = settings or ExtractionSettings()
        self._patterns = compile_markers(self.settings.markers)

    def grade(self, problem: Problem, text: str, *, truncated: bool) -> Score:
        """Verdict on one completion. Reasons: correct, wrong, truncated, no_answer, unparseable (all a policy's), and
        unreadable_reference with value None. ``answer`` is the number in its one spelling, for majority votes."""
        if truncated:
            return Score(value=0.0, reason="truncated", grader=self.id)
        reference = read_number(problem.reference)
        if reference is None:
            return Score(value=None, reason="unreadable_reference", grader=self.id)
        answer = find_answer(text, self._patterns, last_number=self.settings.last_number)
        if answer is None:
            return Score(value=0.0, reason="no_answer", grader=self.id)
        number = read_number(answer)
        if number is None:
            return Score(value=0.0, answer=recorded(answer), reason="unparseable", grader=self.id)
        correct = number == reference
        return Score(
            value=float(correct),
            answer=recorded(write_number(number)),
            reason="correct" if correct else "wrong",
            grader=self.id,
        )

    def close(self) -> None:
        """Nothing to give back."""

    def grade_many(self, items: Iterable[GradeItem]) -> Generator[Score]:
        """Verdicts in the order of ``items``."""
        for problem, text, truncated in items:
            yield self.grade(problem, text, truncated=truncated)
