"""Grading by a specification: plain settings in, verdicts out, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

from reasonrun.grading.number import ExtractionSettings, GradeItem, NumberGrader
from reasonrun.grading.symbolic import SymbolicGrader, SymbolicSettings
from reasonrun.records import Score

GraderSpec = ExtractionSettings | SymbolicSettings
"""Settings that say which grader: ``NumberGrader.Settings`` or ``SymbolicGrader.Settings``."""


def build_grader(spec: GraderSpec) -> NumberGrader | SymbolicGrader:
    """The grader that ``spec`` describes."""
    return SymbolicGrader(spec) if isinstance(spec, SymbolicSettings) else NumberGrader(spec)


def grade_rollouts(spec: GraderSpec, items: Iterable[GradeItem]) -> Iterator[Score]:
    """Grade (problem, text, truncated) items in order; grading processes end with the iterator."""
    grader = build_grader(spec)
    if isinstance(grader, NumberGrader):
        yield from grader.grade_many(items)
        return
    with closing(grader):
        yield from grader.grade_many(items)
