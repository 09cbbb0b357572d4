"""A verdict that changes needs a new grader version: the corpus of verdicts is named after the grader's id.

The verdicts were decided by hand, none was copied from a run.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from reasonrun.grading.judgement import JudgementGrader
from reasonrun.grading.number import NumberGrader
from reasonrun.grading.symbolic import SymbolicGrader
from reasonrun.grading.verdict import StepVerdictGrader
from reasonrun.grading.written import WrittenGrader
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


@pytest.mark.parametrize("row", corpus(StepVerdictGrader.id), ids=lambda row: f"{row['reason']}|{row['text'][-30:]!a}")
def test_step_verdict_is_the_golden_one(row: dict[str, Any]) -> None:
    score = StepVerdictGrader().grade(problem(""), row["text"], truncated=row["truncated"])
    assert score == expected(row, "step-verdict-1")


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [("Step 1: correct; Step 2: neutral", "2"), ("Step 1: neutral; Step 2: incorrect", "1"), ("1: correct", None)],
)
def test_a_neutral_step_counts_as_wrong_where_that_is_asked_for(verdicts: str, answer: str | None) -> None:
    grader = StepVerdictGrader(StepVerdictGrader.Settings(neutral_is_error=True))
    assert grader.grade(problem(""), f"### Final decision\n{verdicts}", truncated=False).answer == answer


@pytest.mark.parametrize("row", corpus(WrittenGrader.id), ids=lambda row: f"{row['text']!a}|{row['truncated']}")
def test_written_verdict_is_the_golden_one(row: dict[str, Any]) -> None:
    score = WrittenGrader().grade(problem(""), row["text"], truncated=row["truncated"])
    assert score == expected(row, "written-1")


@pytest.mark.parametrize("row", corpus(JudgementGrader.id), ids=lambda row: f"{row['decision']}|{row['text']!a}")
def test_judgement_verdict_is_the_golden_one(row: dict[str, Any]) -> None:
    settings = JudgementGrader.Settings(decision=row["decision"], of_others=row["of_others"])
    score = JudgementGrader(settings).grade(problem(row["reference"]), row["text"], truncated=row["truncated"])
    assert score == expected(row, "judgement-1")
