"""What ``reasonrun eval`` prints of a judge."""

from typing import Any

from reasonrun.cli.evaluate import format_metrics

PART = {
    "accuracy": 0.45,
    "interval": [0.4, 0.5],
    "truncated_share": 0.01,
    "unparseable_share": 0.0,
    "ungraded_share": 0.0,
    "num_samples": 100,
    "num_problems": 100,
}
NONE = {"value": None, "interval": None}


def share(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "interval": [low, high]}


SCORES: dict[str, Any] = {
    "exact": share(0.45, 0.4, 0.5),
    "within_1": share(0.85, 0.8, 0.9),
    "mean_error": -0.213,
    "pearson": share(0.4124, 0.3, 0.5),
    "spearman": {"value": 0.4, "interval": None},
    "kendall": NONE,
    "calibration_error": 0.312,
    "histogram": {"1": 2, "2": 10, "3": 40, "4": 40, "5": 5},
    "gold_histogram": {"1": 20, "2": 20, "3": 20, "4": 20, "5": 20},
    "entropy_bits": 1.73,
    "gold_entropy_bits": 2.32,
    "unread_share": 0.03,
    "unread_reasons": {"no_answer": 2, "truncated": 1},
    "mean_num_tokens": 61.27,
    "mean_num_chars": 240.4,
}


def lines_of(section: dict[str, Any]) -> list[str]:
    lines = format_metrics({"greedy": PART, "judging": {"greedy": section}})
    first, second = format_metrics({"greedy": PART})
    without_gold = section["exact"]["value"] is None
    assert lines[:2] == [first.replace("accuracy", "readable") if without_gold else first, second]
    assert all(line.startswith(" " * 9) for line in lines[2:])
    return [line[9:] for line in lines[2:]]


def test_scores_with_their_intervals() -> None:
    assert lines_of(SCORES) == [
        "exact 45.0% [40.0%, 50.0%], within 1 85.0% [80.0%, 90.0%], mean error -0.21",
        "Pearson 0.412 [0.300, 0.500], Spearman 0.400, Kendall -",
        "given 1:2 2:10 3:40 4:40 5:5, entropy 1.73 bits",
        "gold  1:20 2:20 3:20 4:20 5:20, entropy 2.32 bits, calibration error 0.31",
        "unread 3.0% (no_answer 2, truncated 1), 61.3 tokens, 240 characters",
    ]


def test_several_draws() -> None:
    draws = {
        "num_draws": 8,
        "agreement": share(0.6, 0.55, 0.65),
        "self_consistency": share(0.5, 0.45, 0.55),
        "self_consistency_pearson": 0.5,
        "mean_within_1": share(0.9, 0.85, 0.95),
        "mean_pearson": None,
        "best_of_n": NONE,
        "oracle": share(0.8, 0.75, 0.85),
    }
    assert lines_of(SCORES | {"draws": draws})[5:] == [
        "8 draws: agreement 60.0% [55.0%, 65.0%]",
        "        self-consistency 50.0% [45.0%, 55.0%] (Pearson 0.500), mean score within 1 90.0% [85.0%, 95.0%]",
        "        best of n -, oracle 80.0% [75.0%, 85.0%]",
    ]


def test_pairs_of_scores_without_gold() -> None:
    table = {"num_pairs": 10, "accuracy": share(0.7, 0.6, 0.8), "tie_share": 0.1, "unread_share": 0.0}
    pairs = {"num_incomplete": 1, **table, "by_category": {"chat": table}, "category_mean": 0.7}
    bare = SCORES | {"exact": NONE, "gold_entropy_bits": None, "mean_num_tokens": None, "unread_reasons": {}}
    assert lines_of(bare | {"pairs": pairs}) == [
        "given 1:2 2:10 3:40 4:40 5:5, entropy 1.73 bits",
        "unread 3.0%, 240 characters",
        "10 pairs (1 incomplete): accuracy 70.0% [60.0%, 80.0%], ties 10.0%, unread 0.0%",
        "        chat (10): accuracy 70.0% [60.0%, 80.0%], ties 10.0%, unread 0.0%",
        "        mean of categories 70.0%",
    ]


def test_choices_in_both_orders() -> None:
    scaled = ("within_1", "mean_error", "pearson", "spearman", "kendall", "calibration_error")
    section = {name: value for name, value in SCORES.items() if name not in scaled}
    pairs = {
        "num_incomplete": 0,
        "num_pairs": 4,
        "accuracy": share(0.5, 0.2, 0.8),
        "consistent_share": share(0.0, 0.0, 0.49),
        "accuracy_both": share(0.0, 0.0, 0.49),
        "position_bias": share(0.5, 0.01, 0.5),
        "unread_share": 0.0,
    }
    counts = {"histogram": {"A": 8, "B": 0}, "entropy_bits": 0.0}
    lines = lines_of(section | counts | {"pairs": pairs})
    assert lines[0] == "exact 45.0% [40.0%, 50.0%]" and lines[1] == "given A:8 B:0, entropy 0.00 bits"
    assert lines[-1] == (
        "4 pairs: accuracy 50.0% [20.0%, 80.0%], both orders 0.0% [0.0%, 49.0%], consistent 0.0% [0.0%, 49.0%],"
        " for A +50.0 points [+1.0, +50.0], unread 0.0%"
    )
    nothing = pairs | {"num_pairs": 0, "accuracy": NONE, "consistent_share": NONE, "accuracy_both": NONE}
    nothing |= {"position_bias": NONE, "unread_share": None, "num_incomplete": 2}
    assert lines_of(section | {"pairs": nothing})[-1] == (
        "0 pairs (2 incomplete): accuracy -, both orders -, consistent -, for A -, unread -"
    )
