"""``step-verdict-1``: the first wrong step that a model names.

The text after the heading is a list of verdicts, one for each step. A judge whose verdict cannot be read has failed as a
grader, so its value is None; nothing is held against the solution that it looked at.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable

from reasonrun.grading.number import GradeItem
from reasonrun.prompts.step_verdict import HEADING
from reasonrun.records import Problem, Score
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

_HEADING = re.compile(rf"^[ \t#*_]*{HEADING}\b[ \t:*_]*", re.IGNORECASE | re.MULTILINE)
_VERDICT = re.compile(r"\b(?P<wrong>incorrect|not correct)\b|\b(?P<neutral>neutral)\b|\bcorrect\b", re.IGNORECASE)
_STEPS = re.compile(r"\bsteps?\W{0,3}(\d+)(?:\s*(?:-|–|,|&|and|to|or)\s*(?:steps?\W{0,3})?(\d+))?", re.IGNORECASE)
_BARE_NUMBER = re.compile(r"\W*(\d+)\b")
_MAX_DIGITS = 4


class VerdictSettings(SettingsBase):
    """How verdicts are read."""

    neutral_is_error: bool = setting(
        False,
        Effect.SEMANTIC,
        "Take a neutral step for the wrong one, as the released pipeline does; else pass it over.",
    )


class StepVerdictGrader:
    """Reads a judge's list of verdicts; ``Score.answer`` is the number of the first wrong step, with the value 1."""

    id = "step-verdict-1"
    Settings = VerdictSettings

    def __init__(self, settings: VerdictSettings | None = None) -> None:
        self.settings = settings or VerdictSettings()

    def grade(self, problem: Problem, text: str, *, truncated: bool) -> Score:
        """Reasons: wrong_step; and with value None nothing_wrong, neutral (and nothing worse), no_verdict, no_heading,
        several_steps (in one item), no_number, empty, truncated."""
        found = "truncated" if truncated else self._first_wrong(text)
        if isinstance(found, str):
            return Score(value=None, reason=found, grader=self.id)
        return Score(value=1.0, answer=str(found), reason="wrong_step", grader=self.id)

    def _first_wrong(self, text: str) -> int | str:
        headings = list(_HEADING.finditer(text))
        if not headings:
            return "no_heading" if text.strip() else "empty"
        reason = "no_verdict"
        for item in re.split(r"[;\n]", text[headings[-1].end() :]):
            for verdict in _VERDICT.finditer(item):
                if verdict["wrong"] or (verdict["neutral"] and self.settings.neutral_is_error):
                    return _number(item)
                if reason != "neutral":
                    reason = "neutral" if verdict["neutral"] else "nothing_wrong"
        return reason

    def close(self) -> None:
        """Nothing to give back."""

    def grade_many(self, items: Iterable[GradeItem]) -> Generator[Score]:
        """Verdicts in the order of ``items``."""
        for problem, text, truncated in items:
            yield self.grade(problem, text, truncated=truncated)


def _number(item: str) -> int | str:
    """The one step that an item of the list speaks of."""
    mentions = {number for match in _STEPS.finditer(item) for number in match.groups() if number}
    bare = _BARE_NUMBER.match(item)
    if not mentions and bare:
        mentions = {bare[1]}
    if len(mentions) > 1:
        return "several_steps"
    digits = next(iter(mentions), "")
    return int(digits) if 0 < len(digits) <= _MAX_DIGITS and int(digits) else "no_number"
