"""The losses of policy-gradient rows: pure functions of log-probabilities. Axes: B rows, K tokens (learnt where the mask
is true)."""

from __future__ import annotations

from typing import Literal

import torch


def surrogate_losses(
    logps_BK: torch.Tensor,
    old_logps_BK: torch.Tensor,
    mask_BK: torch.Tensor,
    advantages_B: torch.Tensor,
    weights_B: torch.Tensor,
    *,
    ratio: Literal["sequence", "token"],
    clip_ratio: float | None = None,
    importance_BK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Minus advantage times probability ratio, as in PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Where the policy has not moved since it sampled, the ratio is 1 and the gradient is that of REINFORCE: minus
    advantage times the gradient of the row's log-probability. ``sequence`` takes the ratio of whole rows (RLOO in TRL, GSPO
    without its length root), so that a row counts once; ``token`` that of each token (PPO, GRPO).

    Args:
        logps_BK: under the policy, differentiable; anything outside the mask is ignored.
        old_logps_BK: under the policy that sampled, as the trainer computes them.
        mask_BK: learnt tokens.
        advantages_B: one a row (``credit.advantages``).
        weights_B: what each token of the row counts (``credit.row_weights``).
        ratio: of rows or of tokens.
        clip_ratio: clips the ratio to 1 - x … 1 + x where that makes the surrogate smaller; None does not.
        importance_BK: detached weights of the tokens, for rows that another program sampled; their mean over a row in
            ``sequence``.

    Returns:
        Losses (B,) that sum to the loss of the batch; the mean ratio of each row; the share of its tokens, or of the row,
        that were clipped.
    """
    mask = mask_BK.to(logps_BK.dtype)
    counts_B = mask.sum(dim=1).clamp(min=1)
    moved_BK = (logps_BK - old_logps_BK) * mask
    factors_BK = mask if importance_BK is None else importance_BK * mask
    if ratio == "sequence":
        # One ratio a row. A token's weight is the share that its sum over the row would give it.
        ratios_BG, factors_BG = moved_BK.sum(dim=1, keepdim=True).exp(), (factors_BK.sum(dim=1) / counts_B)[:, None]
        shares_BG = torch.ones_like(ratios_BG)
    else:
        ratios_BG, factors_BG, shares_BG = moved_BK.exp(), factors_BK, mask
    gains_BG = ratios_BG * advantages_B[:, None]
    clipped_BG = torch.zeros_like(gains_BG)
    if clip_ratio is not None:
        held_BG = ratios_BG.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages_B[:, None]
        clipped_BG = (held_BG < gains_BG).to(gains_BG.dtype) * shares_BG
        gains_BG = torch.minimum(gains_BG, held_BG)
    losses_B = -(gains_BG * factors_BG).sum(dim=1) * weights_B
    num_G = shares_BG.sum(dim=1).clamp(min=1)
    return losses_B, (ratios_BG * shares_BG).sum(dim=1) / num_G, clipped_BG.sum(dim=1) / num_G


def k2_losses(
    logps_BK: torch.Tensor,
    reference_logps_BK: torch.Tensor,
    mask_BK: torch.Tensor,
    coefs_B: torch.Tensor,
    weights_B: torch.Tensor,
) -> torch.Tensor:
    """Half the squared log-ratio of each row, whose gradient is, in expectation, that of KL(policy || reference).

    The square is of the row's sum, not of its tokens: the sum of squares would only see the step at hand of each token,
    not what it does to the ones after it. It is weighed as the surrogate is, so that the coefficient means the same under
    every reduction.

    Returns:
        Shape (B,), part of the loss of the batch.
    """
    ratios_B = ((logps_BK - reference_logps_BK) * mask_BK.to(logps_BK.dtype)).sum(dim=1)
    return 0.5 * coefs_B * weights_B * ratios_B**2
