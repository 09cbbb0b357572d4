"""The supervised loss: weighted negative log-likelihood of the learnt tokens, normalised over the optimizer batch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.examples import Sequences
from reasonrun.trainers.objective import Computed, Objective
from reasonrun.trainers.token_nll import pad, token_nll


class SFTObjective(Objective):
    """Losses of SFT rows.

    With reduction ``token`` the loss of a batch is the sum of weight × -log p over its learnt tokens, divided by the
    *number* of those tokens. Dividing by the sum of weights would make a uniform weight of 2 do nothing and the pair
    (1, -1) undefined; dividing by the count keeps the loss linear in the weights. With ``example`` each example is
    first divided by its own number of learnt tokens, the sum by the number of examples.

    The divisor is that of the whole optimizer batch, so cutting the batch into forward passes, or dealing it to
    several processes, changes nothing but the order of additions.
    """

    def __init__(self, rows: Sequences, reduction: Literal["token", "example"]) -> None:
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

    def losses(self, model: Any, batch: Indexes, micro: Indexes, device: torch.device) -> Computed:
        rows = batch[micro]
        ids_BT, learnt_BT = pad([(self.rows, rows)])
        nll_BK, columns_K = token_nll(model, ids_BT, learnt_BT, device)
        coefficients_BT = np.zeros(ids_BT.shape, dtype=np.float32)
        for i, row in enumerate(rows):
            here = self.rows.slice(row)
            coefficients_BT[i, : here.stop - here.start] = self.rows.weights[here] / self._divisor(batch, row)
        coefficients_BK = torch.from_numpy(coefficients_BT[:, columns_K]).to(device)
        return Computed(losses_B=(nll_BK * coefficients_BK).sum(dim=1), num_tokens=int(ids_BT.size))

    def _divisor(self, batch: Indexes, row: int) -> float:
        if self.reduction == "token":
            return float(self.num_tokens(batch))
        return float(self._num_learnt[row]) * len(batch)
