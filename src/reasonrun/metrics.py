"""Accuracy, pass@k, maj@k and honest intervals around them. Pure functions on numpy arrays; no scipy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.records import Graded, Score

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2_000
ROUNDING = 1e-12  # a mean of shares that is nearer to 0 than this is 0
_CHUNK_ELEMENTS = 4_000_000  # indices drawn at a time, 32 MB


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A paired comparison: mean of ``b - a`` with its interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def wilson_interval(num_correct: int, num_total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, JASA 22:209); (0, 1) when nothing was counted."""
    if not 0 <= num_correct <= num_total:
        raise ValueError(f"{num_correct} correct of {num_total}")
    if num_total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_correct / num_total
    centre = share + z * z / (2 * num_total)
    half = z * math.sqrt(share * (1 - share) / num_total + z * z / (4 * num_total**2))
    scale = 1 + z * z / num_total
    # at the edges the bound is 0 or 1 exactly, but for rounding
    low = 0.0 if num_correct == 0 else (centre - half) / scale
    return low, 1.0 if num_correct == num_total else (centre + half) / scale


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of ``k`` samples drawn from these is correct: 1 - C(n-c, k) / C(n, k).

    Unbiased for samples drawn independently (Chen et al. 2021, arXiv 2107.03374, §2.1); the product form stays exact
    where the binomials overflow.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"pass@{k} of {num_correct} correct in {num_samples} samples")
    if num_samples - num_correct < k:
        return 1.0
    kept = np.arange(num_samples - num_correct + 1, num_samples + 1, dtype=np.float64)
    return float(1.0 - np.prod(1.0 - k / kept))


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the most frequent answer is correct. Ties go to the one seen first; None is no vote.

    Args:
        answers: the extracted answers of one problem, in sampling order.
        correct: the verdicts on them.
    """
    votes: Counter[str] = Counter()
    verdict: dict[str, bool] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer] += 1
            verdict.setdefault(answer, right)
    return verdict[votes.most_common(1)[0][0]] if votes else False  # most_common keeps first-seen order among equals


def bootstrap_interval(
    values_P: Sequence[float] | Floats,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over problems (Efron 1979); the seed fixes the resamples.

    Args:
        values_P: one value per problem, such as the share of its samples that are correct.
        confidence: coverage.
        num_resamples: resampled data sets.
        seed: of the resampling.
    """
    means = _resampled_means(np.asarray(values_P, dtype=np.float64), num_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def clustered_interval(
    values_N: Sequence[float] | Floats,
    clusters_N: Sequence[str],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of values that come in clusters: clusters are resampled, not values.

    Args:
        values_N: one value per item, such as a pair.
        clusters_N: what each item belongs to, such as its problem; items of one are alike.
        confidence: coverage.
        num_resamples: resampled data sets.
        seed: of the resampling.
    """
    _, cluster_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    sums_C = np.bincount(cluster_N, weights=np.asarray(values_N, dtype=np.float64)).astype(np.float64)
    sizes_C = np.bincount(cluster_N).astype(np.float64)
    means = _resampled_means(sums_C, num_resamples, seed) / _resampled_means(sizes_C, num_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_counts(num_problems: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Iterator[Floats]:
    """How often each problem is in each resample: arrays (resamples, problems) of whole numbers, a part at a time.

    For statistics of sums over problems, which are then one matrix product. The resamples are those of the intervals.
    """
    for drawn_RP in _resamples(num_problems, num_resamples, seed):
        cells_RP = drawn_RP + num_problems * np.arange(len(drawn_RP))[:, None]
        yield np.bincount(cells_RP.ravel(), minlength=cells_RP.size).reshape(cells_RP.shape).astype(np.float64)


def paired_bootstrap(
    a_P: Sequence[float] | Floats,
    b_P: Sequence[float] | Floats,
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two arms on the same problems: resamples problems, so what they share cancels.

    Args:
        a_P: one value per problem of the first arm.
        b_P: the same problems in the same order, second arm.
        confidence: coverage of the interval.
        num_resamples: resampled data sets.
        seed: of the resampling.

    Raises:
        ValueError: the arms have different numbers of problems.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arms of {a.size} and {b.size} problems cannot be paired")
    means = _resampled_means(b - a, num_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    at_most, at_least = int((means <= 0).sum()), int((means >= 0).sum())
    # one is added so that no finite number of resamples claims p = 0 (Davison & Hinkley 1997, §4.2.3)
    p_value = min(1.0, 2 * (min(at_most, at_least) + 1) / (num_resamples + 1))
    return Difference(difference=float((b - a).mean()), low=float(low), high=float(high), p_value=p_value)


def _resampled_means(values_P: Floats, num_resamples: int, seed: int) -> Floats:
    if values_P.size == 0:
        raise ValueError("no problems to resample")
    return np.concatenate([values_P[drawn].mean(axis=1) for drawn in _resamples(values_P.size, num_resamples, seed)])


def _resamples(num_problems: int, num_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of shape (resamples, problems), as many resamples at a time as fit the memory."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // num_problems)
    for start in range(0, num_resamples, rows):
        yield rng.integers(num_problems, size=(min(rows, num_resamples - start), num_problems))


def mcnemar_exact(num_only_a: int, num_only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947): problems that exactly one arm solves, as fair coin flips."""
    total, fewer = num_only_a + num_only_b, min(num_only_a, num_only_b)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << total))


def items_needed(
    a_P: Sequence[float] | Floats, b_P: Sequence[float] | Floats, *, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """About how many problems would tell a difference as large as the one between two arms.

    ((z_{(1 + confidence) / 2} + z_power) * sd / |mean|)^2, rounded up: the paired z-test's sample size, with mean and
    standard deviation (n - 1) of the differences ``b - a`` of the problems at hand. A rough figure, since it takes the
    measured difference for the true one.

    Args:
        a_P: one value per problem of the first arm.
        b_P: the same problems in the same order, second arm.
        power: chance to find the difference if it is there.
        confidence: of the two-sided interval that must not hold 0.

    Returns:
        The number; None when the mean difference is 0, which no number of problems tells, or the spread is unknown
        because there is only one problem.

    Raises:
        ValueError: the arms have different numbers of problems.
    """
    a, b = np.asarray(a_P, dtype=np.float64), np.asarray(b_P, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arms of {a.size} and {b.size} problems cannot be paired")
    if a.size < 2 or abs(float((b - a).mean())) < ROUNDING:
        return None
    quantiles = NormalDist().inv_cdf((1 + confidence) / 2) + NormalDist().inv_cdf(power)
    effect = abs(float((b - a).mean())) / max(float((b - a).std(ddof=1)), ROUNDING)
    return math.ceil((quantiles / effect) ** 2)


def mean_interval_over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over runs with different seeds and its Student t interval: (mean, low, high).

    One run has no interval: low and high are then minus and plus infinity.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ValueError("no seeds")
    mean = float(data.mean())
    if data.size == 1:
        return mean, -math.inf, math.inf
    half = t_quantile((1 + confidence) / 2, data.size - 1) * float(data.std(ddof=1)) / math.sqrt(data.size)
    return mean, mean - half, mean + half


def t_quantile(probability: float, num_degrees: int) -> float:
    """Quantile (probability >= 0.5) of Student's t by bisection on its distribution function."""
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if (1 + _central_t(middle, num_degrees)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(num_degrees)


def _central_t(angle: float, num_degrees: int) -> float:
    """P(|T| < t) for t = sqrt(n) tan(angle): the finite series 26.7.3 and 26.7.4 of Abramowitz & Stegun."""
    odd = num_degrees % 2 == 1
    term, series = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for j in range(2 if odd else 1, num_degrees, 2):
        series += term
        term *= math.cos(angle) ** 2 * j / (j + 1)
    return 2 / math.pi * (angle + math.sin(angle) * series) if odd else math.sin(angle) * series


def summarise(groups: Sequence[Sequence[Score | Graded]], *, confidence: float = 0.95) -> dict[str, Any]:
    """The table of one evaluation; ``groups`` holds the verdicts of each problem, in sampling order.

    An ungraded row (value None) counts as incorrect here. ``accuracy`` is the mean over problems of the share that is
    correct; its interval is Wilson's with one sample per problem, or when all are right or all wrong, else a bootstrap over
    problems. pass@k is given for
    powers of two up to the fewest samples of any problem, and maj@n over all samples when there are several.

    Raises:
        ValueError: no problem, or a problem without a row.
    """
    if not groups or not all(groups):
        raise ValueError("summarise needs at least one problem and one row for each")
    scores = [[row.score if isinstance(row, Graded) else row for row in group] for group in groups]
    rows = [score for group in scores for score in group]
    num_correct_P = [sum(score.correct for score in group) for group in scores]
    shares_P = [c / len(group) for c, group in zip(num_correct_P, scores, strict=True)]
    fewest = min(len(group) for group in scores)
    if len(rows) == len(scores) or max(shares_P) == 0 or min(shares_P) == 1:
        # resampling problems that are all wrong, or all right, would claim certainty
        interval = wilson_interval(int(sum(shares_P)), len(scores), confidence=confidence)
    else:
        interval = bootstrap_interval(shares_P, confidence=confidence)
    reasons = Counter(score.reason for score in rows)
    table: dict[str, Any] = {
        "num_problems": len(scores),
        "num_samples": len(rows),
        "accuracy": sum(shares_P) / len(shares_P),
        "interval": list(interval),
        "truncated_share": reasons["truncated"] / len(rows),
        "no_answer_share": reasons["no_answer"] / len(rows),
        "unparseable_share": reasons["unparseable"] / len(rows),
        "ungraded_share": sum(score.value is None for score in rows) / len(rows),
    }
    for k in (2**power for power in range(fewest.bit_length())):
        estimates = [pass_at_k(len(group), c, k) for group, c in zip(scores, num_correct_P, strict=True)]
        table[f"pass@{k}"] = sum(estimates) / len(estimates)
    if fewest > 1:
        table[f"maj@{fewest}"] = sum(_majority(group[:fewest]) for group in scores) / len(scores)
    return table


def _majority(group: Sequence[Score]) -> bool:
    answers = [None if score.reason == "unparseable" else score.answer for score in group]
    return maj_at_k(answers, [score.correct for score in group])
