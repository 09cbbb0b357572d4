"""The forward pass that every objective shares: negative log-likelihoods of learnt tokens, and of nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.examples import Sequences

_IGNORED = -100


def pad(parts: list[tuple[Sequences, Indexes]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Ids and masks, both of shape (B, T), of the named rows of some sets, one under the other, padded on the right."""
    shape = (sum(len(rows) for _, rows in parts), max(int(s.lengths[rows].max()) for s, rows in parts if len(rows)))
    ids_BT, learnt_BT = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    places = [(sequences.slice(int(row)), sequences) for sequences, rows in parts for row in rows]
    for i, (here, sequences) in enumerate(places):
        ids_BT[i, : here.stop - here.start] = sequences.token_ids[here]
        learnt_BT[i, : here.stop - here.start] = sequences.learnt[here]
    return ids_BT, learnt_BT


def token_nll(
    model: Any, ids_BT: npt.NDArray[np.int64], learnt_BT: npt.NDArray[np.bool_], device: torch.device
) -> tuple[torch.Tensor, Indexes]:
    """Negative log-likelihood of the learnt tokens, 0 elsewhere.

    Only columns that predict a learnt token of some row go through the output layer, the dearest one when prompts are
    long. Rows are padded on the right and attention is causal, so no real token sees padding and no attention mask is
    needed.

    Returns:
        Losses of shape (B, K), differentiable, and the K columns of the tokens that they belong to.
    """
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
    return nll_BK, columns_K + 1
