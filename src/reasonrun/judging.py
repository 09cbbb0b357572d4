"""How well a judge's decisions agree with gold ones: the tables of one evaluation part, and what to warn of. Pure functions.

The judge is the policy here, so a decision that cannot be read is its failure: *unread*, and wrong. Scores go from 1 to 5;
a gold score may be a mean over annotators. Every measured proportion or correlation is ``{"value", "interval"}`` with 95 %
(``agreement``), where items are resampled and not rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reasonrun.agreement import (
    UNDEFINED,
    chance_of_agreement,
    correlations,
    entropy_bits,
    majority,
    mean_decision,
    proportion,
)
from reasonrun.grading.judgement import HIGHEST, LOWEST, Decision
from reasonrun.judged_pairs import Item, pairs_section
from reasonrun.records import Graded, Problem

# Beyond these a trained judge is worth a second look (the thresholds are this project's own).
MAX_ONE_SCORE = 0.95
MAX_ONE_GOLD = 0.80
MIN_ENTROPY_RATIO = 0.5
MAX_UNREAD = 0.05
MAX_LENGTH_RATIO = 1.5
MIN_EXACT_RISE = 0.01
MIN_PEARSON_FALL = 0.01

_DECISIONS: dict[Decision, tuple[str, ...]] = {
    "score": tuple(str(score) for score in range(LOWEST, HIGHEST + 1)),
    "choice": ("A", "B"),
    "yes_no": ("no", "yes"),
}


def judging_section(groups: Sequence[Item], decision: Decision = "score") -> dict[str, Any]:
    """The table of one evaluation part.

    Args:
        groups: each problem with its rows, several where it was judged several times. ``problem.reference`` is the gold
            decision, empty without one; ``row.score.answer`` is the judge's, None where it could not be read.
        decision: what is decided. What needs a scale is there for ``score`` alone.

    Returns:
        ``num_items``, ``num_judgements``, ``num_read``, ``unread_share`` and ``unread_reasons`` (counts). ``exact``: share
        of all rows of items with gold that are correct; undefined without gold. ``histogram`` counts decisions that were
        read, ``gold_histogram`` items by gold (a mean is rounded, halves up), ``entropy_bits`` and ``gold_entropy_bits``
        are theirs, None of an empty one. ``mean_num_tokens``: sampled tokens, None where the model gives no ids;
        ``mean_num_chars``. For scores also the entries of ``_of_scores``; with several rows of any item ``draws``
        (``_of_draws``); with pairs ``pairs`` (``judged_pairs.pairs_section``).

    Raises:
        ValueError: no problem, or a problem without a row.
    """
    if not groups or not all(rows for _, rows in groups):
        raise ValueError("judging_section needs at least one problem and one row for each")
    section = {**_counts(groups, decision), **_lengths(groups)}
    if decision == "score":
        section |= _of_scores(groups)
    if any(len(rows) > 1 for _, rows in groups):
        section["draws"] = _of_draws(groups, decision)
    pairs = pairs_section(groups, decision)
    return section | ({"pairs": pairs} if pairs else {})


def unread_findings(section: Mapping[str, Any]) -> list[str]:
    """What to do where most judgements could not be read."""
    if section["unread_share"] <= 0.5:
        return []
    reasons = ", ".join(f"{reason} {count}" for reason, count in section["unread_reasons"].items())
    return [
        f"{section['unread_share']:.1%} of the judgements could not be read ({reasons}): the decision must end the answer after"
        " [RESULT]; raise evaluate.max_new_tokens where they are truncated, or train the judge on gold judgements first"
    ]


def measured(section: Mapping[str, Any] | None) -> str:
    """What the accuracy of an evaluation is the share of: without gold decisions, of those that could be read."""
    return "readable" if section and section["exact"]["value"] is None else "accuracy"


def headline(section: Mapping[str, Any]) -> float | None:
    """What judges of pairs are compared by: the share of pairs that they judge right; None without pairs."""
    value: float | None = section["pairs"]["accuracy"]["value"] if "pairs" in section else None
    return value


def _counts(groups: Sequence[Item], decision: Decision) -> dict[str, Any]:
    rows = [row for _, drawn in groups for row in drawn]
    unread = Counter(row.score.reason for row in rows if row.score.answer is None)
    decided = Counter(row.score.answer for row in rows)
    gold = Counter(_gold_decision(problem, decision) for problem, _ in groups)
    with_gold = [(problem.id, row.correct) for problem, drawn in groups if problem.reference for row in drawn]
    histogram = {name: decided[name] for name in _DECISIONS[decision]}
    gold_histogram = {name: gold[name] for name in _DECISIONS[decision]}
    return {
        "num_items": len(groups),
        "num_judgements": len(rows),
        "num_read": len(rows) - unread.total(),
        "unread_share": unread.total() / len(rows),
        "unread_reasons": dict(sorted(unread.items())),
        "exact": proportion([correct for _, correct in with_gold], [item for item, _ in with_gold]),
        "histogram": histogram,
        "gold_histogram": gold_histogram,
        "entropy_bits": entropy_bits(histogram.values()),
        "gold_entropy_bits": entropy_bits(gold_histogram.values()),
    }


def _lengths(groups: Sequence[Item]) -> dict[str, Any]:
    rollouts = [row.rollout for _, rows in groups for row in rows]
    sampled = [sum(len(segment.token_ids) for segment in one.segments if segment.loss) for one in rollouts]
    has_ids = any(one.segments for one in rollouts)
    return {
        "mean_num_tokens": sum(sampled) / len(sampled) if has_ids else None,
        "mean_num_chars": sum(len(one.text) for one in rollouts) / len(rollouts),
    }


def _of_scores(groups: Sequence[Item]) -> dict[str, Any]:
    """``within_1``: share of all rows of items with gold at most 1 from it, unread ones not. Over the rows with gold that
    were read: ``mean_error``, score minus gold, above 0 for a lenient judge; ``pearson``, ``spearman`` and ``kendall``;
    ``calibration``, of each score its count and ``mean_gold``; ``calibration_error``, the mean of abs(score - mean gold
    of that score) over rows, the expected calibration error of Naeini et al. 2015 with one bin a score."""
    judged = [(problem.id, _gold(problem), row) for problem, rows in groups if problem.reference for row in rows]
    near = [gold is not None and _is_near(row, gold) for _, gold, row in judged]
    read = [
        (item, int(row.score.answer), gold)
        for item, gold, row in judged
        if gold is not None and row.score.answer is not None
    ]
    items, scores, golds = [item for item, _, _ in read], [score for _, score, _ in read], [gold for _, _, gold in read]
    means = {score: _mean([gold for _, given, gold in read if given == score]) for score in range(LOWEST, HIGHEST + 1)}
    found = Counter(scores)
    distances = [found[score] * abs(score - mean) for score, mean in means.items() if mean is not None]
    return {
        "within_1": proportion(near, [item for item, _, _ in judged]),
        "mean_error": _mean([score - gold for _, score, gold in read]),
        **correlations(scores, golds, items),
        "calibration": {
            str(score): {"count": found[score], "mean_gold": means[score]} for score in range(LOWEST, HIGHEST + 1)
        },
        "calibration_error": sum(distances) / len(read) if read else None,
    }


def _of_draws(groups: Sequence[Item], decision: Decision) -> dict[str, Any]:
    """Several judgements of one item together.

    ``num_draws``: the most of any item. ``agreement``: mean over items with several of the chance that two different draws
    decide the same. The following are over items with gold. ``self_consistency``: share whose majority decision is
    correct; of equally frequent scores the one nearest the mean of the draws wins, then the lower, of equally frequent
    words the first in the alphabet. ``best_of_n``: share whose draw with the highest mean token log-probability is
    correct, the first of equals; undefined where log-probabilities are missing. ``oracle``: share with a correct draw. For
    scores, ``self_consistency_pearson`` and the mean of the draws that were read: ``mean_within_1``, ``mean_pearson``
    (values alone).
    """
    several = [(problem, rows) for problem, rows in groups if len(rows) > 1]
    judged = [(problem, rows) for problem, rows in groups if problem.reference]
    names = [problem.id for problem, _ in judged]
    majorities = [majority(rows) for _, rows in judged]
    table: dict[str, Any] = {
        "num_draws": max(len(rows) for _, rows in groups),
        "agreement": proportion([chance_of_agreement(rows) for _, rows in several], [p.id for p, _ in several]),
        "self_consistency": proportion([row is not None and row.correct for row in majorities], names),
        "best_of_n": _best_of_n(judged),
        "oracle": proportion([any(row.correct for row in rows) for _, rows in judged], names),
    }
    if decision != "score":
        return table
    golds = [_gold(problem) for problem, _ in judged]
    means = [mean_decision(rows) for _, rows in judged]
    near = [m is not None and gold is not None and abs(m - gold) <= 1 for m, gold in zip(means, golds, strict=True)]
    return table | {
        "self_consistency_pearson": _pearson(
            [None if row is None else mean_decision([row]) for row in majorities], golds
        ),
        "mean_within_1": proportion(near, names),
        "mean_pearson": _pearson(means, golds),
    }


def _best_of_n(judged: Sequence[Item]) -> dict[str, Any]:
    if any(row.rollout.logps is None for _, rows in judged for row in rows):
        return dict(UNDEFINED)
    best = [max(rows, key=_mean_logp) for _, rows in judged]
    return proportion([row.correct for row in best], [problem.id for problem, _ in judged])


def _mean_logp(row: Graded) -> float:
    logps = row.rollout.logps
    return sum(logps) / len(logps) if logps else -math.inf


def _pearson(scores_P: Sequence[float | None], golds_P: Sequence[float | None]) -> float | None:
    both = [(s, g) for s, g in zip(scores_P, golds_P, strict=True) if s is not None and g is not None]
    names = [str(place) for place in range(len(both))]
    found = correlations([s for s, _ in both], [g for _, g in both], names, with_intervals=False)
    value: float | None = found["pearson"]["value"]
    return value


def _is_near(row: Graded, gold: float) -> bool:
    return row.score.answer is not None and abs(int(row.score.answer) - gold) <= 1


def _gold(problem: Problem) -> float | None:
    try:
        gold = float(problem.reference)
    except ValueError:
        return None
    return gold if math.isfinite(gold) else None


def _gold_decision(problem: Problem, decision: Decision) -> str:
    """The gold as one of the decisions, or empty."""
    if decision != "score":
        return problem.reference.upper() if decision == "choice" else problem.reference.lower()
    gold = _gold(problem)
    return "" if gold is None else str(math.floor(gold + 0.5))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def judging_findings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a person should know of a trained judge, one line each; what was so before is no finding.

    Args:
        before: ``judging_section`` of the first judge on some part.
        now: the same of the trained one, on the same items.
    """
    return [
        *_collapse(before, now),
        *_low_entropy(before, now),
        *_unread(before, now),
        *_other_length(before, now),
        *_inflation(before, now),
    ]


def _collapse(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    gold = _largest(now["gold_histogram"])
    was, most = _largest(before["histogram"]), _largest(now["histogram"])
    if not gold or not most or gold[1] >= MAX_ONE_GOLD or most[1] < MAX_ONE_SCORE:
        return []
    if was and was[1] >= MAX_ONE_SCORE:
        return []
    earlier = f"{was[1]:.1%} before, " if was else ""
    return [
        f"judgements collapse: {most[1]:.1%} are {most[0]} ({earlier}the largest share of gold is {gold[0]}, {gold[1]:.1%})"
    ]


def _largest(histogram: Mapping[str, int]) -> tuple[str, float] | None:
    total = sum(histogram.values())
    if not total:
        return None
    name = max(histogram, key=lambda one: histogram[one])
    return name, histogram[name] / total


def _low_entropy(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    was, bits, gold = before["entropy_bits"], now["entropy_bits"], now["gold_entropy_bits"]
    if bits is None or gold is None or bits >= MIN_ENTROPY_RATIO * gold:
        return []
    if was is not None and was < MIN_ENTROPY_RATIO * gold:
        return []
    earlier = "" if was is None else f" from {was:.2f}"
    return [f"judgements spread too little: entropy fell{earlier} to {bits:.2f} bits, below half of gold's {gold:.2f}"]


def _unread(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    was, share = before["unread_share"], now["unread_share"]
    if share <= MAX_UNREAD or share <= was:
        return []
    return [f"judgements cannot be read: {share:.1%} (above {MAX_UNREAD:.0%}), {was:.1%} before"]


def _other_length(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    has_tokens = before["mean_num_tokens"] is not None and now["mean_num_tokens"] is not None
    key, unit = ("mean_num_tokens", "tokens") if has_tokens else ("mean_num_chars", "characters")
    was, mean = before[key], now[key]
    if max(was, mean) <= MAX_LENGTH_RATIO * min(was, mean):
        return []
    word = "longer" if mean > was else "shorter"
    return [f"judgements are much {word}: {mean:.1f} {unit} on average, {was:.1f} before"]


def _inflation(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    had, has = before["exact"]["value"], now["exact"]["value"]
    was, pearson = before.get("pearson", UNDEFINED)["value"], now.get("pearson", UNDEFINED)["value"]
    if had is None or has is None or was is None:
        return []
    fallen = was - (0.0 if pearson is None else pearson)  # a judge that says one score only tells nothing apart
    if has - had < MIN_EXACT_RISE or fallen < MIN_PEARSON_FALL:
        return []
    to = "nothing (one score only)" if pearson is None else f"{pearson:.2f}"
    return [
        f"more scores are exact ({has:.1%}, {had:.1%} before) while Pearson fell from {was:.2f} to {to}: guessing the"
        " commonest score, or inflation"
    ]
