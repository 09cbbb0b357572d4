"""Reading answers: exactness against an independent reading, and no input that raises or stalls."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from reasonrun.grading.answers import compile_markers, find_answer, last_boxed, read_number, write_number
from reasonrun.grading.number import NumberGrader
from reasonrun.records import Message, Problem, Score

PROBLEM = Problem(id="p", task="t", split="dev", messages=(Message(role="user", content="How many?"),), reference="72")
POLICY_REASONS = {"correct", "wrong", "no_answer", "unparseable"}


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_number_reads_what_python_wrote_with_digit_groups(value: Decimal) -> None:
    assert read_number(f"{value:,}") == Fraction(value)


@settings(deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_number_has_one_spelling_that_reads_back(numerator: int, denominator: int) -> None:
    number = Fraction(numerator, denominator)
    assert read_number(write_number(number)) == number
    assert write_number(Fraction(2 * numerator, 2 * denominator)) == write_number(number)


@pytest.mark.parametrize(
    ("number", "spelling"), [("1/8", "0.125"), ("-1/20", "-0.05"), ("22/7", "22/7"), ("5/2", "2.5"), ("-3", "-3")]
)
def test_number_is_written_as_decimal_where_it_ends(number: str, spelling: str) -> None:
    assert write_number(Fraction(number)) == spelling


@pytest.mark.parametrize("text", ["72 clips", "2 million", "x = 5", "2ab", "48 + 24 = 72"])
def test_number_without_units_refuses_words_and_equations(text: str) -> None:
    assert read_number(text) is not None
    assert read_number(text, units=False) is None


def test_boxed_content_may_hold_braces_and_escaped_braces() -> None:
    assert last_boxed(r"so \boxed{\frac{1}{2}} and \boxed{\{1, \frac{3}{4}\}} end") == r"\{1, \frac{3}{4}\}"
    assert last_boxed(r"\boxed{\frac{1}{2}} then \boxed{cut {off") == r"\frac{1}{2}"


def test_last_number_is_only_a_fallback() -> None:
    patterns = compile_markers(["####"])
    assert find_answer("#### 7\nwhich is 8", patterns, last_number=True) == "7"
    assert find_answer("I get 7, then 1,234.5, done", patterns, last_number=True) == "1,234.5"
    assert find_answer("I get 7", patterns) is None


def test_truncated_completion_is_wrong_with_its_reason() -> None:
    score = NumberGrader().grade(PROBLEM, "#### 72", truncated=True)
    assert score == Score(value=0.0, reason="truncated", grader="number-1")


@pytest.mark.parametrize(("marker", "words"), [("(", "no valid regular expression"), ("x*", "empty text")])
def test_bad_marker_is_refused_with_the_reason(marker: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        NumberGrader.Settings(markers=(marker,))


HOSTILE = {
    "digits": "#### " + "7" * 200_000,
    "decimals": "#### 0." + "7" * 200_000,
    "power": "#### 10^(10^9)",
    "exponent": "#### 1e999999999",
    "markers": "#### " * 100_000,
    "empty markers": "####\n" * 100_000,
    "open boxes": r"\boxed{" * 100_000,
    "open braces": r"\boxed{" + "{" * 500_000,
    "nested boxes": r"\boxed{" * 3_000 + "1" + "}" * 3_000,
    "spaces": "#### 1" + " " * 300_000 + "x",
    "commas": "#### " + "1," * 200_000,
    "equations": "#### " + "1=" * 200_000,
    "tex": "#### " + r"\text{" * 50_000,
    "fractions": "#### " + r"\frac{1}" * 50_000,
    "the answer is": "the answer is " * 50_000,
    "control": "#### \0\x1b[2J\ud800\udfff",
    "right to left": "#### \u202e27",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_gets_a_verdict_at_once(text: str) -> None:
    started = time.process_time()
    score = NumberGrader(NumberGrader.Settings(last_number=True)).grade(PROBLEM, text, truncated=False)
    assert time.process_time() - started < 1.0
    assert score.value == 0.0
    assert score.reason in POLICY_REASONS
    assert Score.model_validate_json(score.model_dump_json()) == score


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(st.characters(exclude_categories=[])), st.binary().map(lambda data: data.decode("latin-1"))))
def test_any_text_gets_a_verdict(text: str) -> None:
    for prefix in ("", "#### ", r"\boxed{", r"#### \frac{1}{", "#### 1e"):
        score = NumberGrader(NumberGrader.Settings(last_number=True)).grade(PROBLEM, prefix + text, truncated=False)
        assert score.value in (0.0, 1.0)
        assert score.reason in POLICY_REASONS
        assert Score.model_validate_json(score.model_dump_json()) == score
