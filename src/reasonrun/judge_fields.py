"""The fields of one row of a file of judge items: texts, rubric, gold scores, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reasonrun.grading.judgement import HIGHEST, LOWEST, MARKER, read_decision
from reasonrun.prompts.judge import Rubric
from reasonrun.row_faults import check_row


class Fields:
    """The fields of one row. What is wrong with them is added to ``faults``; a faulty text is read as empty."""

    def __init__(self, fields: Mapping[str, Any], faults: list[str]) -> None:
        self.fields, self.faults = fields, faults

    def text(self, name: str) -> str:
        """A field that must hold text."""
        if fault := check_row(self.fields, {name: str}):
            self.faults.append(fault)
            return ""
        return tidy(self.fields[name])

    def optional(self, name: str) -> str:
        """A field that may be absent, null or blank."""
        blank = self.fields.get(name) is None or (isinstance(self.fields[name], str) and not self.fields[name].strip())
        return "" if blank else self.text(name)

    def rubric(self, criteria: str, descriptions: Sequence[str]) -> Rubric:
        """The rubric of five fields of descriptions, from score 1 on."""
        one, two, three, four, five = (self.text(name) for name in descriptions)
        return Rubric(criteria=self.text(criteria), descriptions=(one, two, three, four, five))

    def gold(self, score: str, feedback: str) -> dict[str, Any]:
        """``gold_score``: the mean of the field ``score``, a number or several. ``gold_rationale``: the judgement whose own
        score is nearest to it, the first of several. Both are left out when ``score`` is empty or faulty."""
        if not score:
            return {}
        values = self._list(score)
        numbers = [number for value in values if (number := self._number(score, value)) is not None]
        if not values or len(numbers) < len(values):
            return {}
        mean = math.fsum(numbers) / len(numbers)
        if self.fields.get(feedback) in (None, "", []):
            return {"gold_score": mean}
        texts = self._list(feedback)
        if len(texts) != len(numbers) or not all(isinstance(text, str) and text.strip() for text in texts):
            self.faults.append(f"field {feedback!r} must hold a text for each score, of which there are {len(numbers)}")
            return {}
        own, text = min(zip(numbers, texts, strict=True), key=lambda pair: abs(pair[0] - mean))
        said, reason = read_decision(text, "score")
        if reason != "no_answer" and said != f"{own:g}":
            self.faults.append(f"field {feedback!r} holds {MARKER}, and what follows is not its score {own:g}")
            return {}
        if said is not None:
            text = text[: text.upper().rindex("[")]
        rationale = f"{text.strip()} {MARKER} {own:g}" if own.is_integer() else ""
        return {"gold_score": mean, "gold_rationale": rationale}

    def _list(self, name: str) -> list[Any]:
        if self.fields.get(name) in (None, []):
            missing = check_row(self.fields, {name: object})
            self.faults.append(
                missing or f"field {name!r} is empty, as it is not in all rows; score_field names another"
            )
            return []
        value = self.fields[name]
        return value if isinstance(value, list) else [value]

    def _number(self, name: str, value: Any) -> float | None:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.faults.append(f"field {name!r} is not a number: {value!r:.40}")
        elif not LOWEST <= number <= HIGHEST:
            self.faults.append(f"field {name!r} is {number:g}, a score is {LOWEST} to {HIGHEST}")
        else:
            return number
        return None


def tidy(text: str) -> str:
    """The text without blank lines around it and blanks behind it."""
    # a first line may be indented on purpose
    return text.rstrip().lstrip("\r\n")
