"""Runs whose evaluations are of a judge: the table of rounds and the last lines."""

from __future__ import annotations

from typing import Any

from reasonrun.report.rounds import format_result, format_table, round_table

PART = {"accuracy": 0.4, "interval": [0.3, 0.5]}


def judged(pearson: float | None, *, pairs: float | None = None, with_gold: bool = True) -> dict[str, Any]:
    section: dict[str, Any] = {
        "pearson": {"value": pearson, "interval": None if pearson is None else [pearson - 0.1, pearson + 0.1]},
        "exact": {"value": 0.4 if with_gold else None, "interval": None},
        "entropy_bits": 1.5,
    }
    if pairs is not None:
        section["pairs"] = {"accuracy": {"value": pairs, "interval": [pairs - 0.1, pairs + 0.1]}}
    return section


def evaluated(scope: str, section: dict[str, Any] | None, split: str = "dev") -> dict[str, Any]:
    row = {"step": f"{scope}/evaluate", "verb": "evaluate", "split": split, "greedy": PART}
    return row | ({"judging": {"greedy": section}} if section else {})


def table_of(*rows: dict[str, Any]) -> list[list[str]]:
    lines = format_table(round_table(rows, []))
    return [[cell for cell in line.split("  ") if cell] for line in lines]


def cells(line: list[str]) -> list[str]:
    return [cell.strip() for cell in line]


def test_the_table_of_rounds_has_pearson_and_entropy_of_dev() -> None:
    header, first, second = table_of(
        evaluated("round-001", judged(0.4)), evaluated("round-002", judged(None) | {"entropy_bits": None})
    )
    assert cells(header)[:5] == ["round", "dev greedy", "pearson", "entropy", "tried"]
    assert cells(first)[1:4] == ["40.0% [30.0%, 50.0%]", "0.400 [0.300, 0.500]", "1.50 bits"]
    assert cells(second)[1:4] == ["40.0% [30.0%, 50.0%]", "-", "-"]


def test_pairs_have_a_column_and_scores_without_gold_none() -> None:
    header, line = table_of(evaluated("round-001", judged(None, pairs=0.7, with_gold=False)))
    assert cells(header)[1:5] == ["dev greedy", "pairs", "entropy", "tried"]
    assert cells(line)[2:4] == ["70.0% [60.0%, 80.0%]", "1.50 bits"]


def test_other_splits_and_other_tasks_have_no_such_columns() -> None:
    test = evaluated("final", judged(0.4), split="test") | {"step": "final/test-last"}
    header, _ = table_of(test)
    assert "pearson" not in cells(header) and "entropy" not in cells(header)
    _, line = table_of(evaluated("final", judged(0.2)), test)
    assert cells(line)[2] == "0.200 [0.100, 0.300]"
    header, *_ = table_of(evaluated("round-001", None), evaluated("round-002", None))
    assert "pearson" not in cells(header) and "entropy" not in cells(header)


def test_a_round_without_judgements_has_dashes() -> None:
    _, first, second = table_of(evaluated("round-001", None), evaluated("round-002", judged(0.4)))
    assert cells(first)[2:4] == ["-", "-"] and cells(second)[2] == "0.400 [0.300, 0.500]"


def test_the_last_lines_have_pearson_of_base_last_and_best() -> None:
    test = {
        name: {"greedy": PART, "judging": {"greedy": judged(pearson)}}
        for name, pearson in (("base", 0.2), ("last", 0.4), ("best", 0.5))
    }
    lines = format_result({"test": test})
    assert " ".join(lines[1].split()) == (
        "test greedy pearson base 0.200 [0.100, 0.300] last 0.400 [0.300, 0.500] best 0.500 [0.400, 0.600]"
    )
    assert len(lines) == 2
    test = {name: {"greedy": PART, "judging": {"greedy": judged(0.3, pairs=0.6)}} for name in test}
    assert [line.split()[2] for line in format_result({"test": test})[1:]] == ["pairs", "pearson"]
    assert len(format_result({"test": {name: {"greedy": PART} for name in test}})) == 1
