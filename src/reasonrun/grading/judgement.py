"""``judgement-1``: what a judge decided, read from the end of what it wrote.

The completion alone is read, never the prompt, and the decision must be its end: a marker quoted from the judged response
decides nothing unless the judge stops right after it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import Literal

from reasonrun.grading.number import GradeItem
from reasonrun.records import Problem, Score
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

Decision = Literal["score", "choice", "yes_no"]
"""What a judge decides: a score from 1 to 5, the better one of A and B, or yes or no."""

MARKER = "[RESULT]"
LOWEST, HIGHEST = 1, 5

_MARKER = re.compile(r"\[\s*result\s*\]", re.IGNORECASE)
_ENDS = {
    "score": re.compile(r"([1-5])(?:\s*/\s*5|\s+out of 5)?", re.IGNORECASE),
    "choice": re.compile(r"([AB])", re.IGNORECASE),
    "yes_no": re.compile(r"(yes|no)", re.IGNORECASE),
}
_BEFORE, _AFTER = " \t\r\n:*_`([", " \t\r\n*_`)]."  # marks around a decision that do not change it
_LABEL = {"score": "score", "choice": "response", "yes_no": ""}  # may stand before it
_LONGEST_END = 80  # characters after the marker that can still be a decision


class JudgementSettings(SettingsBase):
    """What is read, and what for."""

    decision: Decision = setting("score", Effect.SEMANTIC, "score (1 to 5), choice (A or B) or yes_no.")
    of_others: bool = setting(
        False,
        Effect.SEMANTIC,
        "The decision is the verdict on something else. False compares it with the item's own gold decision.",
    )


class JudgementGrader:
    """Reads decisions. As a verifier of judges it compares them with the item's reference; ``of_others`` makes each one
    the verdict on what was judged."""

    id = "judgement-1"
    Settings = JudgementSettings

    def __init__(self, settings: JudgementSettings | None = None) -> None:
        self.settings = settings or JudgementSettings()

    def grade(self, problem: Problem, text: str, *, truncated: bool) -> Score:
        """``answer`` is the decision: ``1`` to ``5``, ``A`` or ``B``, ``yes`` or ``no``.

        Reasons of a judge's failure: truncated, no_answer (no marker), unparseable (no decision at the end). It is
        incorrect (value 0), but no verdict (value None) with ``of_others``.

        Against gold: correct or wrong. A gold score may be a mean over annotators: the nearest score is correct, both
        beside a half. Items without gold, such as the two sides of a pair, give the reason ``read`` and the value 1.

        With ``of_others`` the value is the score on a scale from 0 (lowest) to 1 (highest), 1 for A and yes, 0 for B and
        no; the reason is ``read``.
        """
        found, reason = (None, "truncated") if truncated else read_decision(text, self.settings.decision)
        if found is None:
            return Score(value=None if self.settings.of_others else 0.0, reason=reason, grader=self.id)
        if self.settings.of_others:
            return Score(value=scaled(found), answer=found, reason="read", grader=self.id)
        if not problem.reference:
            return Score(value=1.0, answer=found, reason="read", grader=self.id)
        correct = self._equal(found, problem.reference)
        if correct is None:
            return Score(value=None, answer=found, reason="unreadable_reference", grader=self.id)
        return Score(value=float(correct), answer=found, reason="correct" if correct else "wrong", grader=self.id)

    def _equal(self, found: str, gold: str) -> bool | None:
        if self.settings.decision != "score":
            return found.casefold() == gold.casefold()
        try:
            return abs(int(found) - float(gold)) <= 0.5
        except ValueError:
            return None

    def close(self) -> None:
        """Nothing to give back."""

    def grade_many(self, items: Iterable[GradeItem]) -> Generator[Score]:
        """Verdicts in the order of ``items``."""
        for problem, text, truncated in items:
            yield self.grade(problem, text, truncated=truncated)


def read_decision(text: str, decision: Decision) -> tuple[str | None, str]:
    """The decision after the last marker, if nothing else follows it, and the reason: read, no_answer or unparseable.

    ``4``, ``4/5``, ``4 out of 5``, ``Score: **4**`` and ``(4).`` are the score 4; ``four``, ``4.5``, ``45`` and
    ``4 because …`` are none.
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None, "no_answer"
    end = text[markers[-1].end() :].strip(_AFTER).lstrip(_BEFORE)
    if end.casefold().startswith(_LABEL[decision]):
        end = end[len(_LABEL[decision]) :].lstrip(_BEFORE)
    match = _ENDS[decision].fullmatch(end) if len(end) <= _LONGEST_END else None
    if match is None:
        return None, "unparseable"
    return (match[1].upper() if decision == "choice" else match[1].lower()), "read"


def scaled(decision: str) -> float:
    """A decision as a number from 0 to 1."""
    if decision.isdigit():
        return (int(decision) - LOWEST) / (HIGHEST - LOWEST)
    return float(decision in ("A", "yes"))
