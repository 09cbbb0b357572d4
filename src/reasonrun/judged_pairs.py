"""Which of two responses a judge prefers, against which one is better (RewardBench, Lambert et al. 2024, arXiv 2403.13787).

Two problems that share ``meta["pair"]`` are a pair. Scored alone, they are its ``meta["side"]``, chosen and rejected;
compared in one prompt, they are its ``meta["order"]``, chosen_first and rejected_first. Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reasonrun.agreement import majority, mean_decision, proportion
from reasonrun.grading.judgement import Decision
from reasonrun.records import Graded, Problem

Item = tuple[Problem, Sequence[Graded]]
Pair = tuple[Item, Item]
Table = Callable[[Mapping[str, Pair]], dict[str, Any]]
_HALVES: dict[str, tuple[str, str, str]] = {
    "score": ("side", "chosen", "rejected"),
    "choice": ("order", "chosen_first", "rejected_first"),
}


def pairs_section(groups: Sequence[Item], decision: Decision) -> dict[str, Any] | None:
    """The pairs of one evaluation part, or None without any.

    Args:
        groups: each problem with its rows; several rows are several draws.
        decision: ``score`` compares the two sides, ``choice`` the two orders.

    Returns:
        ``num_incomplete`` pairs, of which one half is not there and which count nowhere else; the table of all others
        (``_by_score`` or ``_by_choice``); where problems carry ``meta["category"]`` the same ``by_category``, and
        ``category_mean``, the unweighted mean of the categories' accuracy.
    """
    if decision not in _HALVES:
        return None
    key, *names = _HALVES[decision]
    halves: dict[str, dict[str, Item]] = {}
    for problem, rows in groups:
        if "pair" in problem.meta and problem.meta.get(key) in names:
            halves.setdefault(str(problem.meta["pair"]), {})[str(problem.meta[key])] = (problem, rows)
    if not halves:
        return None
    pairs = {name: (both[names[0]], both[names[1]]) for name, both in halves.items() if len(both) == 2}
    table: Table = _by_score if decision == "score" else _by_choice
    return {"num_incomplete": len(halves) - len(pairs), **table(pairs), **_by_category(pairs, table)}


def _by_category(pairs: Mapping[str, Pair], table: Table) -> dict[str, Any]:
    categories: dict[str, dict[str, Pair]] = {}
    for name, pair in pairs.items():
        if "category" in pair[0][0].meta:
            categories.setdefault(str(pair[0][0].meta["category"]), {})[name] = pair
    if not categories:
        return {}
    tables = {category: table(categories[category]) for category in sorted(categories)}
    accuracies = [one["accuracy"]["value"] for one in tables.values()]
    return {"by_category": tables, "category_mean": sum(accuracies) / len(accuracies)}


def _by_score(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """``accuracy``: 1 for a pair whose chosen side has the higher score (mean of its draws), 0.5 for a tie, else 0, also
    where a side was not read; shares of ties and of pairs with an unread side, of all pairs."""
    scores = [(mean_decision(chosen[1]), mean_decision(rejected[1])) for chosen, rejected in pairs.values()]
    values = [0.0 if a is None or b is None else 0.5 + 0.5 * ((a > b) - (a < b)) for a, b in scores]
    return {
        "num_pairs": len(pairs),
        "accuracy": proportion(values, list(pairs)),
        "tie_share": _share([value == 0.5 for value in values]),
        "unread_share": _share([a is None or b is None for a, b in scores]),
    }


def _by_choice(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """``accuracy`` over the rows of both orders, unread ones wrong; ``consistent_share`` of pairs with one winner in both
    orders and ``accuracy_both``, with the right one (of several draws, by majority; an unread order has no winner);
    ``position_bias``: share of A among the rows that were read, minus 0.5; ``unread_share`` of rows."""
    rows = [(name, row) for name, pair in pairs.items() for _, drawn in pair for row in drawn]
    read = [(name, row.score.answer == "A") for name, row in rows if row.score.answer is not None]
    winners = [(majority(first[1]), majority(second[1])) for first, second in pairs.values()]
    consistent = [a is not None and b is not None and a.correct == b.correct for a, b in winners]
    both = [a is not None and b is not None and a.correct and b.correct for a, b in winners]
    share = proportion([is_first for _, is_first in read], [name for name, _ in read])
    return {
        "num_pairs": len(pairs),
        "accuracy": proportion([row.correct for _, row in rows], [name for name, _ in rows]),
        "consistent_share": proportion(consistent, list(pairs)),
        "accuracy_both": proportion(both, list(pairs)),
        "position_bias": {
            "value": None if share["value"] is None else share["value"] - 0.5,
            "interval": None if share["interval"] is None else [bound - 0.5 for bound in share["interval"]],
        },
        "unread_share": _share([row.score.answer is None for _, row in rows]),
    }


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
