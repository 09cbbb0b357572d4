"""Which rows every optimizer step learns from: a pure function of lengths and seed, so any attempt plans the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reasonrun.randomness import derive_seed

Indexes = npt.NDArray[np.int64]

# Rows are sorted by length within this many batches. More would save little padding and would put the same rows
# together in every epoch; for the same reason a small set is cut into at least four groups.
_GROUP_BATCHES = 50
_MIN_GROUPS = 4


def plan_batches(
    lengths: Sequence[int] | npt.NDArray[np.int64], batch_size: int, num_steps: int, seed: int
) -> list[Indexes]:
    """The row indexes of each optimizer step.

    Every epoch is a fresh permutation, grouped by length so that a batch needs little padding. The rows that do not
    fill a batch open the next epoch, so none is ever dropped and after k epochs each row was used k times, the rows
    carried over k - 1 times. A plan for more steps starts with the plan for fewer.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimizer step. A set smaller than that repeats rows inside a batch.
        num_steps: how many batches to return.
        seed: of the training step.

    Returns:
        ``num_steps`` arrays of ``batch_size`` row indexes.

    Raises:
        ValueError: there are no rows.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if not len(lengths_N):
        raise ValueError("a batch plan needs at least one row")
    batches: list[Indexes] = []
    carried: Indexes = np.empty(0, dtype=np.int64)
    epoch = 0
    while len(batches) < num_steps:
        rng = np.random.default_rng(derive_seed("batches", seed, epoch))
        pool = np.concatenate([carried, rng.permutation(len(lengths_N)).astype(np.int64)])
        num_full = len(pool) // batch_size
        batches += _group_by_length(pool[: num_full * batch_size], lengths_N, batch_size, rng)
        carried = pool[num_full * batch_size :]
        epoch += 1
    return batches[:num_steps]


def _group_by_length(rows: Indexes, lengths_N: Indexes, batch_size: int, rng: np.random.Generator) -> list[Indexes]:
    num_batches = len(rows) // batch_size
    group_size = batch_size * max(1, min(num_batches // _MIN_GROUPS, _GROUP_BATCHES))
    batches: list[Indexes] = []
    for start in range(0, len(rows), group_size):
        group = rows[start : start + group_size]
        ordered = group[np.argsort(lengths_N[group], kind="stable")]
        batches += list(ordered.reshape(-1, batch_size))
    return [batches[i] for i in rng.permutation(num_batches)]


def share_of_rank(batch: Indexes, lengths_N: Indexes, rank: int, num_ranks: int) -> Indexes:
    """Positions in ``batch`` that one process computes, longest first; the shares of all ranks make up the batch.

    Dealing the sorted rows in turn gives every rank nearly the same number of tokens.
    """
    order: Indexes = np.argsort(-lengths_N[batch], kind="stable")
    return order[rank::num_ranks]


def micro_batches(share: Indexes, micro_batch_size: int) -> list[Indexes]:
    """Cut a share into forward passes; neighbours are alike in length, and the longest pass comes first."""
    return [share[start : start + micro_batch_size] for start in range(0, len(share), micro_batch_size)]
