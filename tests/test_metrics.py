"""Metrics against values derived by hand or by enumeration."""

from __future__ import annotations

import math
from itertools import combinations
from math import comb

import numpy as np
import pytest

from reasonrun import metrics
from reasonrun.metrics import (
    bootstrap_interval,
    clustered_interval,
    items_needed,
    maj_at_k,
    mcnemar_exact,
    mean_interval_over_seeds,
    paired_bootstrap,
    pass_at_k,
    summarise,
    t_quantile,
    wilson_interval,
)
from reasonrun.records import Graded, Rollout, Sampling, Score

CORRECT = Score(value=1.0, answer="72", reason="correct", grader="number-1")
WRONG = Score(value=0.0, answer="71", reason="wrong", grader="number-1")
TRUNCATED = Score(value=0.0, reason="truncated", grader="number-1")
UNPARSEABLE = Score(value=0.0, answer="many", reason="unparseable", grader="number-1")
UNGRADED = Score(value=None, answer="(10^9)!", reason="deadline", grader="symbolic-1")


def test_wilson_solves_its_defining_equation() -> None:
    # The bounds are where |share - p| = z sqrt(p (1 - p) / n), the inverted score test.
    z = 1.959963984540054
    for num_correct, total in ((8, 10), (1, 50), (300, 1319)):
        for bound in wilson_interval(num_correct, total):
            assert abs(num_correct / total - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / total))


def test_wilson_at_the_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(3.8414588 / (10 + 3.8414588))  # z^2 / (n + z^2)
    with pytest.raises(ValueError, match="3 correct of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 3, 1), (8, 1, 8), (5, 3, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_stable_where_binomials_overflow_floats() -> None:
    exact = 1 - comb(9_990, 5_000) / comb(10_000, 5_000)
    assert pass_at_k(10_000, 10, 5_000) == pytest.approx(exact, rel=1e-12)
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_majority_ties_go_to_the_first_and_none_is_no_vote() -> None:
    assert maj_at_k(["5", "7", "7", "5"], [True, False, False, True])
    assert not maj_at_k(["7", "5", "5", "7"], [False, True, True, False])
    assert maj_at_k([None, None, "5"], [False, False, True])
    assert not maj_at_k([None, None], [False, False])


def test_bootstrap_of_coin_flips_is_near_the_normal_interval() -> None:
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(values, num_resamples=4_000, seed=1)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1_000)
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)
    assert (low, high) == bootstrap_interval(values, num_resamples=4_000, seed=1)
    assert (low, high) != bootstrap_interval(values, num_resamples=4_000, seed=2)


def test_bootstrap_in_chunks_draws_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([0.0, 1.0, 1.0])
    whole = metrics._resampled_means(values, 999, 0)
    assert whole.shape == (999,)
    monkeypatch.setattr(metrics, "_CHUNK_ELEMENTS", 30)
    assert np.array_equal(metrics._resampled_means(values, 999, 0), whole)


def test_paired_bootstrap_cancels_what_arms_share() -> None:
    difficulty = np.linspace(0, 1, 50)
    shifted = paired_bootstrap(difficulty, difficulty + 0.25)
    assert (shifted.difference, shifted.low, shifted.high) == pytest.approx((0.25, 0.25, 0.25))
    assert shifted.p_value == pytest.approx(2 / 2_001)
    same = paired_bootstrap(difficulty, difficulty)
    assert (same.difference, same.p_value) == (0.0, 1.0)
    with pytest.raises(ValueError, match="50 and 2 problems"):
        paired_bootstrap(difficulty, [0.0, 1.0])


def test_mcnemar_counts_fair_coins() -> None:
    assert mcnemar_exact(1, 9) == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar_exact(9, 1) == mcnemar_exact(1, 9)
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert 0 < mcnemar_exact(1_000, 1_400) < 1e-9


@pytest.mark.parametrize(
    ("num_degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantiles_are_the_table_s(num_degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, num_degrees) == pytest.approx(quantile, abs=5e-5)


def test_interval_over_seeds() -> None:
    mean, low, high = mean_interval_over_seeds([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert high - mean == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-5)
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval_over_seeds([0.5]) == (0.5, -math.inf, math.inf)


def test_summary_counts_ungraded_as_incorrect() -> None:
    groups = [
        [CORRECT, CORRECT, WRONG, TRUNCATED],
        [UNPARSEABLE, UNPARSEABLE, CORRECT, WRONG],
        [UNGRADED, WRONG, WRONG, WRONG],
    ]
    table = summarise(groups)
    assert table["num_problems"] == 3
    assert table["num_samples"] == 12
    assert table["accuracy"] == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert table["truncated_share"] == pytest.approx(1 / 12)
    assert table["no_answer_share"] == 0.0
    assert table["unparseable_share"] == pytest.approx(2 / 12)
    assert table["ungraded_share"] == pytest.approx(1 / 12)
    assert table["pass@1"] == pytest.approx(table["accuracy"])
    assert table["pass@2"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6 + 0) / 3)  # 1 - C(wrong, 2) / C(4, 2)
    assert table["pass@4"] == pytest.approx(2 / 3)
    assert table["maj@4"] == pytest.approx(2 / 3)  # the second: two unparseable answers do not vote, 72 came first
    low, high = table["interval"]
    assert 0 <= low < table["accuracy"] < high <= 0.5


def test_summary_of_single_samples_uses_wilson() -> None:
    table = summarise([[CORRECT]] * 8 + [[WRONG]] * 2)
    assert tuple(table["interval"]) == wilson_interval(8, 10)
    assert table["pass@1"] == 0.8
    assert not [key for key in table if key.startswith("maj@")]


def test_summary_takes_graded_rollouts_and_refuses_gaps() -> None:
    rollout = Rollout(
        id="r-0", problem_id="p", index=0, kind="plain", messages=(), prompt_ids=(), segments=(), text="",
        finish_reason="stop", policy="w", sampling=Sampling(), seed=0,
    )  # fmt: skip
    assert summarise([[Graded(rollout=rollout, score=CORRECT)]]) == summarise([[CORRECT]])
    with pytest.raises(ValueError, match="at least one"):
        summarise([[CORRECT], []])


def test_items_needed_by_hand() -> None:
    # Ten differences: three of 1, one of -1, six of 0. Mean 0.2, sd^2 = (4 - 10 * 0.04) / 9 = 0.4;
    # (1.959964 + 0.841621)^2 = 7.848880, times 0.4 / 0.04 is 78.49.
    a, b = [0, 0, 0, 1, 0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert items_needed(a, b) == items_needed(b, a) == 79
    # One-sided 2.5 % with an even chance leaves z_power = 0: 3.841459 * 10 = 38.4
    assert items_needed(a, b, power=0.5) == 39


def test_items_needed_is_unknown_where_no_number_would_do() -> None:
    assert items_needed([0.0, 1.0], [1.0, 0.0]) is None
    assert items_needed([0.0, 0.0, 0.3], [0.1, 0.2, 0.0]) is None  # 0.1 + 0.2 - 0.3 is 5.6e-17
    assert items_needed([0.0], [1.0]) is None
    with pytest.raises(ValueError, match="arms of 1 and 2"):
        items_needed([0.0], [0.0, 1.0])


def test_a_test_of_that_many_items_finds_the_difference_four_times_in_five() -> None:
    a, b = np.zeros(10), np.array([1.0, 1, 1, -1, 0, 0, 0, 0, 0, 0])
    needed = items_needed(a, b)
    assert needed is not None
    draws = np.random.default_rng(0).choice(b, size=(4_000, needed))
    z = draws.mean(axis=1) / (draws.std(axis=1, ddof=1) / math.sqrt(needed))
    assert float((z > 1.959964).mean()) == pytest.approx(0.8, abs=0.03)


def test_an_interval_over_clusters_does_not_count_copies_as_evidence():
    """Ten problems; whether each has one pair or twenty equal ones, ten problems are what is known."""
    values = [float(n % 2) for n in range(10)]
    names = [str(n) for n in range(10)]
    once = clustered_interval(values, names)
    copied = clustered_interval([v for v in values for _ in range(20)], [n for n in names for _ in range(20)])
    assert copied == pytest.approx(once)
    assert once == pytest.approx(bootstrap_interval(values))
    low, high = bootstrap_interval([v for v in values for _ in range(20)])
    assert high - low < 0.5 * (once[1] - once[0])


def test_a_resampled_cluster_brings_its_values_and_their_number():
    """Values that are all 1 have the mean 1 in every resample, however uneven the clusters."""
    names = ["a"] * 50 + ["b"] * 3 + ["c"]
    assert clustered_interval([1.0] * 54, names) == pytest.approx((1.0, 1.0))
