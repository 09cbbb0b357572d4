"""Credit: rewards, a pull towards the reference and a baseline become one advantage a row. Pure, no torch.

Axes: P rows, T tokens. A row is one turn; a cell holds the rows of one group and attempt, which are each other's
baseline. KL is always KL(policy || reference), estimated from the row's own tokens.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indexes = npt.NDArray[np.int64]

_EPSILON = 1e-4  # that of TRL's GRPOTrainer


def cells(groups: list[str], attempts: list[int]) -> Indexes:
    """The number of each row's cell, shape (P,)."""
    numbers: dict[tuple[str, int], int] = {}
    return np.array(
        [numbers.setdefault(key, len(numbers)) for key in zip(groups, attempts, strict=True)], dtype=np.int64
    )


def k1_penalties(kl_coefs_P: Floats, log_ratios_P: Floats) -> Floats:
    """What k1 takes off each reward: ``coef * log(policy / reference)`` of the whole row.

    As part of the reward the penalty is a constant to the gradient, and the score function turns it into the gradient of
    KL(policy || reference). The same number as a loss would have the expected gradient zero.
    """
    return kl_coefs_P * log_ratios_P


def leave_one_out(returns_P: Floats, cells_P: Indexes) -> Floats:
    """Return minus the mean return of the row's siblings (Kool et al. 2019; RLOO, Ahmadian et al. 2024, arXiv 2402.14740).

    A row without siblings has the advantage 0: nothing says what else could have been.
    """
    totals_C, counts_C = _totals(returns_P, cells_P)
    others_P = np.maximum(counts_C[cells_P] - 1, 1)
    means_P = (totals_C[cells_P] - returns_P) / others_P
    return np.where(counts_C[cells_P] > 1, returns_P - means_P, 0.0)


def group_normalised(returns_P: Floats, cells_P: Indexes) -> Floats:
    """(return - mean) / (standard deviation + 1e-4) of the cell, the deviation with n - 1 (GRPO, Shao et al. 2024, arXiv
    2402.03300)."""
    totals_C, counts_C = _totals(returns_P, cells_P)
    centred_P = returns_P - (totals_C / counts_C)[cells_P]
    squares_C, _ = _totals(centred_P**2, cells_P)
    deviations_C = np.sqrt(squares_C / np.maximum(counts_C - 1, 1))
    return centred_P / (deviations_C[cells_P] + _EPSILON)


def attempt_scales(reward_advantages_P: Floats, attempts_P: Indexes) -> Floats:
    """What each row's advantage is divided by: the root mean square, over all rows of its attempt, of the advantages that
    the rewards alone would give, where that is above 1.

    Keeps a bonus on one attempt (SCoRe's alpha = 10) from drowning the gradient of the others, its KL included. Nothing is
    enlarged: where rewards are all equal there is only the pull towards the reference, and no scale to bring it to.
    """
    scales_P = np.ones_like(reward_advantages_P)
    for attempt in np.unique(attempts_P):
        here = attempts_P == attempt
        scales_P[here] = max(1.0, float(np.sqrt(np.mean(reward_advantages_P[here] ** 2))))
    return scales_P


def advantages(
    rewards_P: Floats,
    penalties_P: Floats,
    cells_P: Indexes,
    attempts_P: Indexes,
    *,
    baseline: Literal["leave_one_out", "group_normalised", "reward"],
    scale: Literal["none", "per_attempt"],
) -> Floats:
    """One advantage a row, which all its learnt tokens share.

    Args:
        rewards_P: of each row.
        penalties_P: what the pull towards the reference takes off them (``k1_penalties``), 0 where it acts in the loss.
        cells_P: rows that are each other's baseline.
        attempts_P: the number of each row's attempt.
        baseline: what is subtracted.
        scale: per_attempt divides by ``attempt_scales``.
    """
    rules = {"leave_one_out": leave_one_out, "group_normalised": group_normalised}

    def against_baseline(returns_P: Floats) -> Floats:
        return rules[baseline](returns_P, cells_P) if baseline in rules else returns_P

    result_P = against_baseline(rewards_P - penalties_P)
    return result_P / attempt_scales(against_baseline(rewards_P), attempts_P) if scale == "per_attempt" else result_P


def row_weights(
    num_tokens_P: Indexes,
    reduction: Literal["sequence", "sequence_mean", "token", "constant"],
    max_length: int,
) -> Floats:
    """What each token of a row counts in the loss of the batch, shape (P,). KL in the loss is weighed alike.

    ``sequence``: sum over the row's tokens, mean over rows (RLOO). ``sequence_mean``: mean over tokens, then over rows
    (GRPO). ``token``: mean over all tokens of the batch (DAPO, arXiv 2503.14476). ``constant``: sum over tokens divided by
    a constant length, mean over rows (Dr. GRPO, arXiv 2503.20783).
    """
    num_rows = len(num_tokens_P)
    if reduction == "token":
        return np.full(num_rows, 1.0 / num_tokens_P.sum())
    if reduction == "sequence_mean":
        return 1.0 / (num_rows * np.maximum(num_tokens_P, 1))
    return np.full(num_rows, 1.0 / (num_rows * (max_length if reduction == "constant" else 1)))


def zero_variance_share(rewards_P: Floats, cells_P: Indexes) -> float:
    """Share of cells whose rewards are all equal: they teach nothing but the pull towards the reference."""
    least_C = np.full(cells_P.max() + 1, np.inf)
    most_C = -least_C
    np.minimum.at(least_C, cells_P, rewards_P)
    np.maximum.at(most_C, cells_P, rewards_P)
    return float(np.mean(least_C == most_C))


def _totals(values_P: Floats, cells_P: Indexes) -> tuple[Floats, Indexes]:
    """Sum and count of every cell."""
    totals_C: Floats = np.bincount(cells_P, weights=values_P).astype(np.float64)
    return totals_C, np.bincount(cells_P).astype(np.int64)
