"""A verdict that changes needs a new grader version: the corpus of verdicts is named after the grader's id.

The verdicts were decided by hand, none was copied from a run.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reasonrun.grading.number import NumberGrader
from reasonrun.grading.symbolic import SymbolicGrader
from reasonrun.records import Message, Problem, Score

GOLDEN_DIR = Path(__file__).parent.parent / "golden"


def corpus(grader_id: str) -> list[dict[str, Any]]:
    path = GOLDEN_DIR / f"grading-{grader_id}.jsonl"
    assert path.exists(), f"a new grader version needs its own corpus: {path.name}"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def problem(reference: str) -> Problem:
    return Problem(
        id="p", task="t", split="dev", messages=(Message(role="user", content="How many?"),), reference=reference
    )


def expected(row: dict[str, Any], grader_id: str) -> Score:
    return Score(value=row["value"], answer=row["answer"], reason=row["reason"], grader=grader_id)


@pytest.mark.parametrize("row", corpus(NumberGrader.id), ids=lambda row: f"{row['reference']}|{row['text']!a}")
def test_number_verdict_is_the_golden_one(row: dict[str, Any]) -> None:
    score = NumberGrader().grade(problem(row["reference"]), row["text"], truncated=False)
    assert score == expected(row, "number-1")


def test_symbolic_verdicts_are_the_golden_ones() -> None:
    rows = corpus(SymbolicGrader.id)
    with closing(SymbolicGrader(SymbolicGrader.Settings(num_workers=1))) as grader:
        scores = list(grader.grade_many((problem(row["reference"]), row["text"], False) for row in rows))
    assert scores == [expected(row, "symbolic-1") for row in rows]
