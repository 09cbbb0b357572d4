"""Next tokens from logits, each row on its own: no result depends on the other rows of the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrun.records import Sampling

# Nearly all top-p nuclei fit in this many tokens; rows that need more are sorted in full.
_NUCLEUS_HEAD = 1024


def choose(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> Tensor:
    """Token ids drawn by inverse CDF of one uniform per row; temperature 0 takes the most likely token.

    Temperature, top-k and top-p apply in this order, as in transformers' logits warpers.

    Args:
        logits_BV: unnormalised log-probabilities, any float type.
        uniforms_B: float64 in [0, 1).
        sampling: temperature, top_k and top_p.

    Returns:
        int64 ids, -1 for a row whose logits are not finite numbers.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        highest = logits_BV.max(dim=-1)
        return torch.where(highest.values.isfinite(), highest.indices, -1)
    kept_BV = keep(logits_BV / sampling.temperature, sampling)
    # float32 is exact enough for one weight; their running sum over a large vocabulary is not.
    weights_BV = (kept_BV - kept_BV.amax(dim=-1, keepdim=True)).exp_()
    cdf_BV = weights_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:]
    target_B1 = uniforms_B[:, None] * total_B1
    # A product that rounds up to the total would point past the last token.
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    ids_B = torch.searchsorted(cdf_BV, torch.minimum(target_B1, below_total_B1), right=True)[:, 0]
    return torch.where(total_B1[:, 0].isfinite(), ids_B, -1)


def keep(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits after top-k, then top-p: minus infinity where a token may not be drawn."""
    return _keep_top_p(_keep_top_k(logits_BV, sampling.top_k), sampling.top_p)


def token_logps(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """Log-probability of each row's id at temperature 1 without filters, float32."""
    logits_BV = logits_BV.float()
    return logits_BV.gather(-1, ids_B[:, None])[:, 0] - logits_BV.logsumexp(dim=-1)


def _keep_top_k(logits_BV: Tensor, top_k: int) -> Tensor:
    if top_k == 0 or top_k >= logits_BV.shape[-1]:
        return logits_BV
    lowest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < lowest_B1, -torch.inf)


def _keep_top_p(logits_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens whose probability reaches ``top_p`` (Holtzman et al. 2019, 1904.09751)."""
    if top_p >= 1:
        return logits_BV
    width = min(_NUCLEUS_HEAD, logits_BV.shape[-1])
    head_BW = logits_BV.topk(width, dim=-1).values
    normaliser_B1 = logits_BV.double().logsumexp(dim=-1, keepdim=True)
    reached_BW = (head_BW.double() - normaliser_B1).exp().cumsum(dim=-1)
    if width < logits_BV.shape[-1] and bool((reached_BW[:, -1] < top_p).any()):
        head_BW = logits_BV.sort(dim=-1, descending=True).values
        reached_BW = (head_BW.double() - normaliser_B1).exp().cumsum(dim=-1)
    before_BW = torch.nn.functional.pad(reached_BW[:, :-1], (1, 0))
    num_kept_B1 = (before_BW < top_p).sum(dim=-1, keepdim=True)
    lowest_B1 = head_BW.gather(-1, num_kept_B1 - 1)
    return logits_BV.masked_fill(logits_BV < lowest_B1, -torch.inf)
