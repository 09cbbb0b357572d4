"""How well decisions agree, with gold ones or among themselves: shares, rank correlations, entropy. Pure functions.

A *cluster* is what is drawn independently: the item that is judged, or the pair that it belongs to. Values are
dimensionless; a measured number is ``{"value", "interval"}``, both None where it is undefined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.metrics import Floats, clustered_interval, resampled_counts, wilson_interval
from reasonrun.records import Graded

MIN_ITEMS = 3  # of fewer, a correlation says nothing
UNDEFINED: dict[str, Any] = {"value": None, "interval": None}
_STATISTICS = ("pearson", "spearman", "kendall")
_MIN_DEFINED = 0.95  # share of the resamples: an interval of the others alone would look better than it is
_TABLE_ELEMENTS = 1_000_000  # cells of resampled tables at a time, 8 MB


def proportion(values_N: Sequence[float], clusters_N: Sequence[str]) -> dict[str, Any]:
    """Mean of values from 0 to 1 with its 95 % interval.

    Wilson's where each cluster has one value, 0 or 1, and where all values are equal, since resampling equal values would
    claim certainty (the number of clusters is then the number of trials); else clusters are resampled.
    """
    values = np.asarray(values_N, dtype=np.float64)
    if not values.size:
        return dict(UNDEFINED)
    num_clusters, mean = len(set(clusters_N)), float(values.mean())
    is_counted = num_clusters == values.size and bool(np.isin(values, (0.0, 1.0)).all())
    if is_counted or values.min() == values.max():
        interval = wilson_interval(round(mean * num_clusters), num_clusters)
    else:
        interval = clustered_interval(values, clusters_N)
    return {"value": mean, "interval": list(interval)}


def entropy_bits(counts: Iterable[int]) -> float | None:
    """Shannon entropy of a histogram in bits; None of an empty one."""
    found = [count for count in counts if count]
    total = sum(found)
    return sum(count / total * math.log2(total / count) for count in found) if found else None


def majority(rows: Sequence[Graded]) -> Graded | None:
    """The first draw with the most frequent decision of one item; None without a decision.

    Of equally frequent scores the one nearest the mean of the draws wins, then the lower. Of equally frequent words the
    first in the alphabet does.
    """
    counts = Counter(row.score.answer for row in rows if row.score.answer is not None)
    if not counts:
        return None
    most, num_draws = max(counts.values()), sum(counts.values())
    tied = [decision for decision, count in counts.items() if count == most]
    if all(decision.isdigit() for decision in counts):
        total = sum(int(decision) * count for decision, count in counts.items())
        winner = min(tied, key=lambda decision: (abs(int(decision) * num_draws - total), decision))
    else:
        winner = min(tied)
    return next(row for row in rows if row.score.answer == winner)


def mean_decision(rows: Sequence[Graded]) -> float | None:
    """Mean score of the draws of one item that were read; None without one."""
    scores = [int(row.score.answer) for row in rows if row.score.answer is not None]
    return sum(scores) / len(scores) if scores else None


def chance_of_agreement(rows: Sequence[Graded]) -> float:
    """Chance that two different draws of one item, of two or more, decide the same. Unread ones agree with nothing."""
    counts = Counter(row.score.answer for row in rows if row.score.answer is not None)
    return sum(count * (count - 1) for count in counts.values()) / (len(rows) * (len(rows) - 1))


def correlations(
    scores_N: Sequence[float], golds_N: Sequence[float], clusters_N: Sequence[str], *, with_intervals: bool = True
) -> dict[str, dict[str, Any]]:
    """``pearson``, ``spearman`` (Pearson's of average ranks) and ``kendall`` (tau-b, Kendall 1945, Biometrika 33:239).

    The intervals are percentiles (2.5 and 97.5) of a bootstrap over clusters; None where more than 5 % of the resamples
    leave the statistic undefined. It is undefined where scores or gold are constant, or with fewer than 3 clusters.

    Args:
        scores_N: one decision per row.
        golds_N: what each row should have decided, such as a mean over annotators.
        clusters_N: the item of each row.
        with_intervals: whether to resample.
    """
    if len(set(clusters_N)) < MIN_ITEMS:
        return {name: dict(UNDEFINED) for name in _STATISTICS}
    scores_S, score_N = np.unique(np.asarray(scores_N, dtype=np.float64), return_inverse=True)
    golds_G, gold_N = np.unique(np.asarray(golds_N, dtype=np.float64), return_inverse=True)
    clusters_C, cluster_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    tables_CSG = np.zeros((clusters_C.size, scores_S.size, golds_G.size))
    np.add.at(tables_CSG, (cluster_N, score_N, gold_N), 1.0)
    found = _statistics(tables_CSG.sum(axis=0)[None], scores_S, golds_G)
    resampled = _resampled(tables_CSG, scores_S, golds_G) if with_intervals else {}
    return {
        name: {
            "value": None if math.isnan(value_1[0]) else float(value_1[0]),
            "interval": None if math.isnan(value_1[0]) or not resampled else _percentiles(resampled[name]),
        }
        for name, value_1 in found.items()
    }


def _resampled(tables_CSG: Floats, scores_S: Floats, golds_G: Floats) -> dict[str, Floats]:
    num_clusters, num_scores, num_golds = tables_CSG.shape
    cells = num_scores * num_golds
    flat = tables_CSG.reshape(num_clusters, cells)
    parts = [
        # whole numbers in float64: the product is exact, whatever order BLAS sums in
        _statistics((block_RC @ flat).reshape(-1, num_scores, num_golds), scores_S, golds_G)
        for counts_RC in resampled_counts(num_clusters)
        for block_RC in np.array_split(counts_RC, math.ceil(len(counts_RC) * cells / _TABLE_ELEMENTS))
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in _STATISTICS}


def _percentiles(values_R: Floats) -> list[float] | None:
    defined = values_R[~np.isnan(values_R)]
    if defined.size < _MIN_DEFINED * values_R.size:
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return [float(low), float(high)]


def _statistics(tables_RSG: Floats, scores_S: Floats, golds_G: Floats) -> dict[str, Floats]:
    """Of each contingency table; NaN where undefined."""
    by_score_RS, by_gold_RG = tables_RSG.sum(axis=2), tables_RSG.sum(axis=1)
    # counted, since a variance of equal numbers need not be exactly 0 in floating point
    varies_R = ((by_score_RS > 0).sum(axis=1) > 1) & ((by_gold_RG > 0).sum(axis=1) > 1)
    values = (np.broadcast_to(scores_S, by_score_RS.shape), np.broadcast_to(golds_G, by_gold_RG.shape))
    ranks = (_average_ranks(by_score_RS), _average_ranks(by_gold_RG))
    return {
        "pearson": _correlation(tables_RSG, *values, varies_R),
        "spearman": _correlation(tables_RSG, *ranks, varies_R),
        "kendall": _tau_b(tables_RSG, varies_R),
    }


def _average_ranks(counts_RL: Floats) -> Floats:
    ranks: Floats = np.cumsum(counts_RL, axis=1) - (counts_RL - 1) / 2
    return ranks


def _correlation(tables_RSG: Floats, x_RS: Floats, y_RG: Floats, varies_R: npt.NDArray[np.bool_]) -> Floats:
    weights_RS, weights_RG = tables_RSG.sum(axis=2), tables_RSG.sum(axis=1)
    totals_R1 = weights_RS.sum(axis=1, keepdims=True)
    x_RS = x_RS - (weights_RS * x_RS).sum(axis=1, keepdims=True) / totals_R1
    y_RG = y_RG - (weights_RG * y_RG).sum(axis=1, keepdims=True) / totals_R1
    shared_R = (x_RS * (tables_RSG * y_RG[:, None, :]).sum(axis=2)).sum(axis=1)
    squares_R = (weights_RS * x_RS**2).sum(axis=1) * (weights_RG * y_RG**2).sum(axis=1)
    return _divided(shared_R, np.sqrt(squares_R), varies_R)


def _tau_b(tables_RSG: Floats, varies_R: npt.NDArray[np.bool_]) -> Floats:
    """(concordant - discordant pairs) / sqrt(pairs with unequal scores * pairs with unequal gold)."""
    higher_RSG = np.cumsum(tables_RSG[:, ::-1], axis=1)[:, ::-1] - tables_RSG  # cells of higher scores, same gold
    below_RSG = np.cumsum(higher_RSG, axis=2) - higher_RSG
    above_RSG = higher_RSG.sum(axis=2, keepdims=True) - higher_RSG - below_RSG
    difference_R = (tables_RSG * (above_RSG - below_RSG)).sum(axis=(1, 2))
    pairs_R = _num_pairs(tables_RSG.sum(axis=(1, 2)))
    unequal_scores_R = pairs_R - _num_pairs(tables_RSG.sum(axis=2)).sum(axis=1)
    unequal_golds_R = pairs_R - _num_pairs(tables_RSG.sum(axis=1)).sum(axis=1)
    return _divided(difference_R, np.sqrt(unequal_scores_R * unequal_golds_R), varies_R)


def _num_pairs(counts: Floats) -> Floats:
    return counts * (counts - 1) / 2


def _divided(numerators_R: Floats, denominators_R: Floats, varies_R: npt.NDArray[np.bool_]) -> Floats:
    undefined = np.full(numerators_R.shape, np.nan)
    quotients_R: Floats = np.divide(numerators_R, denominators_R, out=undefined, where=varies_R).clip(-1.0, 1.0)
    return quotients_R
