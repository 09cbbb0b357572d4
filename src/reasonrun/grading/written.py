"""``written-1``: whether a model wrote anything; for texts that curation reads, such as a teacher's step."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from reasonrun.grading.number import GradeItem
from reasonrun.records import Problem, Score
from reasonrun.settings import Settings as SettingsBase


class WrittenGrader:
    """Value 1 for a text that is there and whole."""

    id = "written-1"
    Settings = SettingsBase

    def __init__(self, settings: SettingsBase | None = None) -> None:
        self.settings = settings or SettingsBase()

    def grade(self, problem: Problem, text: str, *, truncated: bool) -> Score:
        """Reasons: written; and with value None empty, truncated: the text cannot be used, whatever it is for."""
        reason = "truncated" if truncated else "written" if text.strip() else "empty"
        return Score(value=1.0 if reason == "written" else None, reason=reason, grader=self.id)

    def close(self) -> None:
        """Nothing to give back."""

    def grade_many(self, items: Iterable[GradeItem]) -> Generator[Score]:
        """Verdicts in the order of ``items``."""
        for problem, text, truncated in items:
            yield self.grade(problem, text, truncated=truncated)
