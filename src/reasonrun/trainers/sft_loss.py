"""The supervised loss: weighted negative log-likelihood of the learnt tokens, normalised over the optimizer batch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.examples import SFTRows

_IGNORED = -100


class SFTObjective:
    """Losses of SFT rows.

    With reduction ``token`` the loss of a batch is the sum of weight × -log p over its learnt tokens, divided by the
    *number* of those tokens. Dividing by the sum of weights would make a uniform weight of 2 do nothing and the pair
    (1, -1) undefined; dividing by the count keeps the loss linear in the weights. With ``example`` each example is
    first divided by its own number of learnt tokens, the sum by the number of examples.

    The divisor is that of the whole optimizer batch, so cutting the batch into forward passes, or dealing it to
    several processes, changes nothing but the order of additions.
    """

    def __init__(self, rows: SFTRows, reduction: Literal["token", "example"]) -> None:
        self.rows = rows
        self.reduction = reduction
        self.lengths: Indexes = rows.lengths
        self._num_learnt = rows.num_learnt

    def name(self, row: int) -> str:
        """How messages call a row."""
        return self.rows.names[row]

    def num_tokens(self, batch: Indexes) -> int:
        """Tokens of the optimizer batch that carry loss."""
        return int(self._num_learnt[batch].sum())

    def losses(self, model: Any, batch: Indexes, micro: Indexes, device: torch.device) -> tuple[torch.Tensor, int]:
        """The share of the batch loss that each row of a forward pass contributes.

        Args:
            model: a causal language model.
            batch: row indexes of the whole optimizer batch, for the divisor.
            micro: positions in ``batch`` to compute now.
            device: where the model is.

        Returns:
            Losses of shape (len(micro),), differentiable, and the tokens that went through the forward pass.
        """
        ids_BT, learnt_BT, coefficients_BT = self._pad(batch, batch[micro])
        # Only columns that predict a learnt token of some row go through the output layer, the dearest one when
        # prompts are long. Rows are padded on the right and attention is causal, so no real token sees padding and no
        # attention mask is needed.
        columns_K = np.flatnonzero(learnt_BT[:, 1:].any(axis=0))
        targets_BK = np.where(learnt_BT, ids_BT, _IGNORED)[:, 1:][:, columns_K]
        logits_BKV = model(
            input_ids=torch.from_numpy(ids_BT).to(device),
            logits_to_keep=torch.from_numpy(columns_K).to(device),
            use_cache=False,
        ).logits
        nll_BK = F.cross_entropy(
            logits_BKV.float().flatten(0, 1),
            torch.from_numpy(targets_BK).to(device).flatten(),
            ignore_index=_IGNORED,
            reduction="none",
        ).view(targets_BK.shape)
        coefficients_BK = torch.from_numpy(coefficients_BT[:, 1:][:, columns_K]).to(device)
        return (nll_BK * coefficients_BK).sum(dim=1), int(ids_BT.size)

    def _pad(self, batch: Indexes, rows: Indexes) -> tuple[Any, Any, Any]:
        shape = (len(rows), int(self.lengths[rows].max()))
        ids_BT = np.zeros(shape, dtype=np.int64)
        learnt_BT = np.zeros(shape, dtype=np.bool_)
        coefficients_BT = np.zeros(shape, dtype=np.float32)
        for i, row in enumerate(rows):
            here = self.rows.slice(row)
            length = here.stop - here.start
            ids_BT[i, :length] = self.rows.token_ids[here]
            learnt_BT[i, :length] = self.rows.learnt[here]
            coefficients_BT[i, :length] = self.rows.weights[here] / self._divisor(batch, row)
        return ids_BT, learnt_BT, coefficients_BT

    def _divisor(self, batch: Indexes, row: int) -> float:
        if self.reduction == "token":
            return float(self.num_tokens(batch))
        return float(self._num_learnt[row]) * len(batch)
