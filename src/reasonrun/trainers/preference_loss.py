"""Losses of preference pairs against a frozen reference. Ids are used as stored; nothing is appended or cut."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from reasonrun.errors import RecipeError, RunFailed
from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.examples import Pairs
from reasonrun.trainers.objective import Computed, Fixed, Objective
from reasonrun.trainers.passes import Together, in_passes
from reasonrun.trainers.sharding import is_sharded
from reasonrun.trainers.token_nll import pad, token_nll
from reasonrun.training import PreferenceSettings

_FILE = "reference.safetensors"
_TELL_SECONDS = 60.0
# What each loss reads of a pair beside its ids and its weight.
_READ = {
    "sigmoid": {"margin", "smoothing", "win probability"},
    "robust": {"margin", "smoothing"},
    "hinge": {"margin"},
    "ipo": {"margin"},
    "sppo": {"win probability"},
}


def refuse_columns(pairs: Pairs, loss: str) -> None:
    """Raises RecipeError where a pair carries a number that the loss would ignore or cannot use."""
    given = {
        "margin": (pairs.margins, 0.0),
        "smoothing": (pairs.smoothings, 0.0),
        "win probability": (pairs.win_probabilities, 1.0),
    }
    for name, (values, default) in given.items():
        num_set = int(np.sum(values != default))
        if num_set and name not in _READ[loss]:
            raise RecipeError(
                f"{num_set} pairs have a {name}, which the loss {loss} does not read",
                hint=f"losses that do: {', '.join(kind for kind, read in _READ.items() if name in read)}",
            )
    highest = 0.5 if loss == "robust" else 1.0
    outside = (pairs.smoothings < 0) | (pairs.smoothings >= highest)
    outside |= (pairs.win_probabilities < 0) | (pairs.win_probabilities > 1)
    if outside.any():
        raise RecipeError(
            f"{int(outside.sum())} pairs have a smoothing outside 0 to {highest} or a win probability outside 0 to 1",
            hint="look at the curation function that made them",
        )


def pair_losses(
    settings: PreferenceSettings,
    chosen_B: torch.Tensor,
    rejected_B: torch.Tensor,
    margin_B: torch.Tensor,
    smoothing_B: torch.Tensor,
    win_probability_B: torch.Tensor,
) -> torch.Tensor:
    """The loss of each pair, before its weight.

    With r = log pi - log pi_ref of a whole continuation, d = r_chosen - r_rejected, h = beta d - margin, s the smoothing
    and P the probability that the chosen one is better:

    - ``sigmoid``: -p log sigma(h) - (1 - p) log sigma(-h) with p = P (1 - s) + (1 - P) s. DPO (Rafailov et al. 2023,
      arXiv 2305.18290, eq. 7) for P = 1, s = 0; conservative DPO (Mitchell 2023) for s > 0.
    - ``robust``: (-(1 - s) log sigma(h) + s log sigma(-h)) / (1 - 2 s) (Chowdhury et al. 2024, arXiv 2403.00409, eq. 9).
    - ``hinge``: max(0, 1 - h) (SLiC, Zhao et al. 2023, arXiv 2305.10425, in its form on log-ratios).
    - ``ipo``: (d - margin / beta - 1 / (2 beta))^2 (Azar et al. 2023, arXiv 2310.12036, eq. 17), on sums over tokens.
    - ``sppo``, for one pair: (r_chosen - (P - 1/2) / beta)^2 + (r_rejected + (P - 1/2) / beta)^2 (Wu et al. 2024,
      arXiv 2405.00675, eq. 4.4, with eta = 1 / beta).

    Args:
        settings: which loss, and beta.
        chosen_B: r of the chosen continuations, summed over their tokens, shape (B,).
        rejected_B: r of the rejected ones.
        margin_B: by how much beta d must exceed 0.
        smoothing_B: probability that the label is flipped, below 1/2.
        win_probability_B: P.

    Returns:
        Shape (B,), differentiable.
    """
    beta = settings.beta
    if settings.loss == "sppo":
        target_B = (win_probability_B - 0.5) / beta
        return (chosen_B - target_B) ** 2 + (rejected_B + target_B) ** 2
    h_B = beta * (chosen_B - rejected_B) - margin_B
    if settings.loss == "ipo":
        return (h_B / beta - 1 / (2 * beta)) ** 2
    if settings.loss == "hinge":
        return torch.relu(1 - h_B)
    if settings.loss == "robust":
        kept_B = (1 - smoothing_B) * F.logsigmoid(h_B) - smoothing_B * F.logsigmoid(-h_B)
        return -kept_B / (1 - 2 * smoothing_B)
    p_B = win_probability_B * (1 - smoothing_B) + (1 - win_probability_B) * smoothing_B
    return -p_B * F.logsigmoid(h_B) - (1 - p_B) * F.logsigmoid(-h_B)


class PreferenceObjective(Objective):
    """Losses of pairs: the sum of weight x loss over the optimizer batch, divided by its number of pairs.

    Log-probabilities of the reference are computed once, by the same forward pass as the policy's, and travel with every
    checkpoint. Both continuations of a pair go through one forward pass.
    """

    statistics: ClassVar[tuple[str, ...]] = ("chosen_logp", "rejected_logp", "reward_margin", "pair_accuracy")

    def __init__(self, pairs: Pairs, settings: PreferenceSettings) -> None:
        self.pairs = pairs
        self.settings = settings
        self.lengths: Indexes = np.maximum(pairs.chosen.lengths, pairs.rejected.lengths)
        self._num_chosen = pairs.chosen.num_learnt
        self._num_learnt = self._num_chosen + pairs.rejected.num_learnt
        self._reference_2N: np.ndarray[Any, np.dtype[np.float64]] | None = None

    def totals(self, history: Sequence[Mapping[str, float]], batch_size: int) -> dict[str, float]:
        """With the mean lengths of both sides: a model also learns how long a winner is."""
        return {
            **super().totals(history, batch_size),
            "mean_chosen_tokens": float(self._num_chosen.mean()),
            "mean_rejected_tokens": float(self.pairs.rejected.num_learnt.mean()),
        }

    def name(self, row: int) -> str:
        return self.pairs.chosen.names[row]

    def num_tokens(self, batch: Indexes) -> int:
        return int(self._num_learnt[batch].sum())

    def logps(self, model: Any, rows: Indexes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Log-probabilities of the chosen and of the rejected continuations, summed over tokens, each of shape (B,); and
        the tokens that went through the forward pass."""
        ids_BT, learnt_BT = pad([(self.pairs.chosen, rows), (self.pairs.rejected, rows)])
        nll_BK, _ = token_nll(model, ids_BT, learnt_BT, device)
        chosen_B, rejected_B = -nll_BK.sum(dim=1).view(2, len(rows))
        return chosen_B, rejected_B, int(ids_BT.size)

    def losses(self, model: Any, batch: Indexes, micro: Indexes, device: torch.device) -> Computed:
        if self._reference_2N is None:
            raise RunFailed("the reference log-probabilities were not computed before training")
        rows = batch[micro]
        chosen_B, rejected_B, num_tokens = self.logps(model, rows, device)

        def column(values: Any) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)

        chosen_ratio_B = chosen_B - column(self._reference_2N[0, rows])
        rejected_ratio_B = rejected_B - column(self._reference_2N[1, rows])
        losses_B = pair_losses(
            self.settings,
            chosen_ratio_B,
            rejected_ratio_B,
            column(self.pairs.margins[rows]),
            column(self.pairs.smoothings[rows]),
            column(self.pairs.win_probabilities[rows]),
        )
        if self.settings.nll_weight:
            losses_B = losses_B - self.settings.nll_weight * chosen_B / column(self._num_chosen[rows])
        reward_margin_B = self.settings.beta * (chosen_ratio_B - rejected_ratio_B)
        return Computed(
            losses_B=losses_B * column(self.pairs.weights[rows]) / len(batch),
            num_tokens=num_tokens,
            statistics=(chosen_B, rejected_B, reward_margin_B, (reward_margin_B > 0).float()),
        )

    def begin(self, fixed: Fixed) -> None:
        if fixed.resume_from is not None:
            self._reference_2N = load_file(fixed.resume_from / _FILE)["logps"]
            return
        model = fixed.start if fixed.start_is_reference else fixed.load_reference()
        was_training = model.training
        model.eval()
        self._reference_2N = self._reference(model, fixed)
        model.train(was_training)

    def save(self, folder: Path) -> None:
        assert self._reference_2N is not None
        save_file({"logps": self._reference_2N}, folder / _FILE)

    def _reference(self, model: Any, fixed: Fixed) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Shape (2, N), chosen first, in passes of one optimizer batch, rows of like length together."""
        order = fixed.rows[np.argsort(-self.lengths[fixed.rows], kind="stable")]
        found_2N = np.full((2, len(self.lengths)), np.nan)
        told = time.monotonic()

        def run(rows: Indexes) -> None:
            nonlocal told
            chosen_B, rejected_B, _ = self.logps(model, rows, next(model.parameters()).device)
            found_2N[0, rows], found_2N[1, rows] = chosen_B.double().cpu(), rejected_B.double().cpu()
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                done = int(np.isfinite(found_2N[0]).sum())
                fixed.tell(f"reference log-probabilities of {done} of {len(order)} pairs")

        size = self.settings.micro_batch_size or self.settings.batch_size
        longest = f"pair, the longest of which has {self.lengths[order[0]]} tokens ({self.name(int(order[0]))}),"
        # Every process computes all of them, so none is ever idle.
        together = Together(num_rows=len(order), idle=lambda: None) if is_sharded(model) else None
        in_passes(order, size, run, what="the reference log-probabilities", single=longest, together=together)
        return found_2N
