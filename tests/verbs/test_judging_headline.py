"""What evaluations of a judge are compared by."""

from __future__ import annotations

from typing import Any

import pytest

from reasonrun.records import Checkpoint
from reasonrun.verbs.evaluating import Evaluation, describe

GREEDY = {"accuracy": 0.98, "interval": [0.9, 1.0]}
SAMPLED = {"accuracy": 0.9, "interval": [0.8, 1.0]}


def pairs(value: float | None, exact: float | None = None) -> dict[str, Any]:
    """The table of pairs; a lone side has no gold, so nothing is exact."""
    accuracy = {"value": value, "interval": None if value is None else [0.0, 1.0]}
    return {"exact": {"value": exact, "interval": None}, "pairs": {"accuracy": accuracy}}


def evaluation(**metrics: Any) -> Evaluation:
    policy = Checkpoint(path="p", weights="w", tokenizer="t")
    return Evaluation(policy=policy, split="dev", step="e", metrics=metrics)


def test_pairs_are_the_headline_where_there_are_pairs() -> None:
    judge = evaluation(greedy=GREEDY, sampled=SAMPLED, judging={"greedy": pairs(0.7), "sampled": pairs(0.8)})
    assert judge.headline == 0.7 and judge.rank == (0.7, 0.0)
    assert describe(judge) == (
        "dev: greedy readable 98.0% [90.0%, 100.0%], pairs right 70.0%,"
        " sampled readable 90.0% [80.0%, 100.0%], pairs right 80.0%"
    )
    assert evaluation(sampled=SAMPLED, judging={"sampled": pairs(0.8)}).headline == 0.8  # greedy is off
    assert evaluation(greedy=GREEDY, judging={"greedy": pairs(0.0)}).headline == 0.0


@pytest.mark.parametrize("judging", [{}, {"greedy": {}}, {"greedy": pairs(None, 0.98)}, {"sampled": pairs(0.8)}])
def test_accuracy_is_the_headline_without_pairs_of_that_part(judging: dict[str, Any]) -> None:
    judge = evaluation(greedy=GREEDY, sampled=SAMPLED, judging=judging)
    assert judge.headline == 0.98 and "98.0% [90.0%, 100.0%], sampled" in describe(judge)
