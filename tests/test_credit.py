"""Baselines, scales and weights against numbers worked out by hand."""

import numpy as np
import pytest

from reasonrun.credit import (
    advantages,
    attempt_scales,
    cells,
    group_normalised,
    k1_penalties,
    leave_one_out,
    row_weights,
    zero_variance_share,
)

ONE_CELL = np.zeros(4, dtype=np.int64)


def numbers(*values):
    return np.array(values, dtype=np.float64)


def test_a_cell_is_one_group_and_one_attempt_in_whatever_order_the_rows_come():
    assert cells(["a", "b", "a", "a", "b"], [1, 1, 2, 1, 1]).tolist() == [0, 1, 2, 0, 1]


def test_a_return_is_compared_with_the_mean_of_its_siblings():
    # A right row sees 0, 0, 1 beside it, a wrong one 1, 0, 1.
    assert leave_one_out(numbers(1, 0, 0, 1), ONE_CELL) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out(numbers(5, 1), ONE_CELL[:2]) == pytest.approx([4, -4])


def test_rows_of_other_groups_and_attempts_are_no_siblings():
    groups, attempts = ["a", "a", "b", "b", "a", "a"], [1, 1, 1, 1, 2, 2]
    returns = numbers(1, 0, 10, 30, 100, 107)
    found = leave_one_out(returns, cells(groups, attempts))
    assert found == pytest.approx([1, -1, -20, 20, -7, 7])
    moved = leave_one_out(returns + numbers(0, 0, 0, 0, 50, -9), cells(groups, attempts))
    assert moved[:4].tolist() == found[:4].tolist() and moved[4] != found[4]


def test_a_row_without_siblings_teaches_nothing():
    assert leave_one_out(numbers(3, 1, 0), np.array([0, 1, 1])).tolist() == [0, 1, -1]
    assert group_normalised(numbers(3), np.array([0])).tolist() == [0]


def test_group_normalisation_divides_by_the_deviation_with_n_minus_1_and_a_small_constant():
    first, second = numbers(1, 0, 0, 1), numbers(2, 5)
    expected = [(part - part.mean()) / (part.std(ddof=1) + 1e-4) for part in (first, second)]
    found = group_normalised(np.concatenate([first, second]), np.array([0, 0, 0, 0, 1, 1]))
    assert found == pytest.approx(np.concatenate(expected), abs=1e-12)
    # The deviation of 1, 0, 0, 1 with n - 1 is the root of a third.
    assert found[0] == pytest.approx(0.5 / (3**-0.5 + 1e-4), abs=1e-12)
    assert group_normalised(numbers(7, 7, 7, 7), ONE_CELL).tolist() == [0, 0, 0, 0]


def test_the_penalty_is_taken_off_the_reward_with_each_rows_own_coefficient():
    # Where the policy finds a row likelier than the reference does, the reward falls.
    assert k1_penalties(numbers(0.1, 0.5, 0), numbers(2, -4, 9)) == pytest.approx([0.2, -2, 0])
    found = advantages(
        numbers(1, 0), numbers(0.2, -2), ONE_CELL[:2], ONE_CELL[:2], baseline="leave_one_out", scale="none"
    )
    assert found == pytest.approx([0.8 - 2, 2 - 0.8])


def test_each_attempt_is_scaled_by_its_own_root_mean_square_and_nothing_is_enlarged():
    found = attempt_scales(numbers(3, -4, 30, 40, 0, 0.5, -0.5), np.array([1, 1, 2, 2, 3, 4, 4]))
    rms = 12.5**0.5
    assert found == pytest.approx([rms, rms, 10 * rms, 10 * rms, 1, 1, 1])


def test_a_baseline_and_a_scale_are_chosen_by_name():
    rewards, attempts, none = numbers(1, 0, 11, 0), np.array([1, 1, 2, 2]), np.zeros(4)
    cell = cells(["a"] * 4, attempts.tolist())

    def made(baseline, scale="none", penalties=none):
        return advantages(rewards, penalties, cell, attempts, baseline=baseline, scale=scale)

    assert made("leave_one_out") == pytest.approx([1, -1, 11, -11])
    assert made("reward").tolist() == [1, 0, 11, 0]
    assert made("group_normalised") == pytest.approx(group_normalised(rewards, cell))
    assert made("leave_one_out", "per_attempt") == pytest.approx([1, -1, 1, -1])
    assert made("reward", "per_attempt") == pytest.approx([1, 0, 2**0.5, 0])
    # The pull towards the reference shrinks with the rewards of its attempt, and has no part in the scale.
    pulled = made("leave_one_out", "per_attempt", numbers(0.5, 0, 0, 22))
    assert pulled == pytest.approx([0.5, -0.5, 3, -3])


def test_an_attempt_without_rewards_keeps_its_pull_as_it_is():
    penalties, attempts = numbers(0.001, -0.001, 0, 0), np.array([1, 1, 2, 2])
    cell = cells(["a"] * 4, attempts.tolist())
    found = advantages(numbers(0, 0, 11, 0), penalties, cell, attempts, baseline="leave_one_out", scale="per_attempt")
    assert found == pytest.approx([-0.002, 0.002, 1, -1])


NUM_TOKENS = np.array([1, 3, 4])


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sequence", [1 / 3, 1 / 3, 1 / 3]),
        ("sequence_mean", [1 / 3, 1 / 9, 1 / 12]),
        ("token", [1 / 8, 1 / 8, 1 / 8]),
        ("constant", [1 / 30, 1 / 30, 1 / 30]),
    ],
)
def test_what_a_token_counts_under_each_reduction(reduction, expected):
    assert row_weights(NUM_TOKENS, reduction, max_length=10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reduction", "total"), [("sequence", 8 / 3), ("sequence_mean", 1), ("token", 1), ("constant", 8 / 30)]
)
def test_the_tokens_of_a_batch_add_up_to_the_mean_that_the_reduction_names(reduction, total):
    # Means add up to 1; sums over tokens, averaged over rows, to the mean length.
    assert (row_weights(NUM_TOKENS, reduction, max_length=10) * NUM_TOKENS).sum() == pytest.approx(total)


def test_cells_whose_rewards_are_all_equal_are_counted():
    cell = np.array([0, 0, 1, 1, 2, 2, 3])
    assert zero_variance_share(numbers(1, 1, 0, 1, 0, 0, 5), cell) == pytest.approx(3 / 4)
    assert zero_variance_share(numbers(0, 1, 0, 1, 0, 1), cell[:6]) == 0
