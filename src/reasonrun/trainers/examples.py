"""SFT examples as flat arrays: a few bytes per token, however many rows there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reasonrun.errors import Finding


@dataclass(frozen=True, kw_only=True)
class SFTRows:
    """Rows of token ids with their masks and weights.

    Row ``i`` owns the slice ``offsets[i]:offsets[i + 1]`` of the flat arrays.

    Attributes:
        token_ids: flat ids, as stored; nothing is added.
        learnt: whether the token carries loss. The first token of a row never does: nothing predicts it.
        weights: segment weight times example weight of each token.
        offsets: N + 1 positions.
        names: how messages call each row: the ids of its rollouts, or its problem where it has none.
    """

    token_ids: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        lengths_N: npt.NDArray[np.int64] = np.diff(self.offsets)
        return lengths_N

    @property
    def num_learnt(self) -> npt.NDArray[np.int64]:
        """Tokens of each row that carry loss."""
        counts = np.concatenate([[0], np.cumsum(self.learnt)]).astype(np.int64)
        num_learnt_N: npt.NDArray[np.int64] = counts[self.offsets[1:]] - counts[self.offsets[:-1]]
        return num_learnt_N

    def slice(self, row: int) -> slice:
        """Where a row lies in the flat arrays."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def take(self, rows: npt.NDArray[np.int64]) -> SFTRows:
        """Some of the rows, in the order given."""
        positions = np.concatenate(
            [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows] or [np.empty(0, dtype=np.int64)]
        )
        return SFTRows(
            token_ids=self.token_ids[positions],
            learnt=self.learnt[positions],
            weights=self.weights[positions],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            names=tuple(self.names[row] for row in rows),
        )


def read_rows(paths: Sequence[str]) -> SFTRows:
    """Read sealed Parquet files of SFTExample, in order.

    Only the columns that training needs are read; nested segments are ``list<struct<token_ids, src, loss, …>>``.
    """
    import pyarrow.parquet as pq

    parts: list[SFTRows] = []
    for path in paths:
        with pq.ParquetFile(path) as file:
            columns = ["segments", "weight", "rollout_ids", "problem_id"]
            parts += [_flatten(batch) for batch in file.iter_batches(columns=columns)]
    return _join(parts or [_empty()])


def _empty() -> SFTRows:
    return SFTRows(
        token_ids=np.empty(0, dtype=np.int64),
        learnt=np.empty(0, dtype=np.bool_),
        weights=np.empty(0, dtype=np.float32),
        offsets=np.zeros(1, dtype=np.int64),
        names=(),
    )


def _flatten(batch: object) -> SFTRows:
    import pyarrow.compute as pc

    segments = batch["segments"]  # type: ignore[index]
    num_segments_N = pc.list_value_length(segments).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = segments.flatten()
    ids = pc.struct_field(flat, "token_ids")
    num_tokens_S = pc.list_value_length(ids).to_numpy(zero_copy_only=False).astype(np.int64)
    loss_S = pc.struct_field(flat, "loss").to_numpy(zero_copy_only=False).astype(np.bool_)
    row_of_segment_S = np.repeat(np.arange(len(segments)), num_segments_N)
    example_weight_N = batch["weight"].to_numpy(zero_copy_only=False)  # type: ignore[index]
    segment_weight_S = pc.struct_field(flat, "weight").to_numpy(zero_copy_only=False)
    weight_S = (segment_weight_S * example_weight_N[row_of_segment_S]).astype(np.float32)

    lengths_N = np.bincount(row_of_segment_S, weights=num_tokens_S, minlength=len(segments)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    learnt = np.repeat(loss_S, num_tokens_S)
    learnt[offsets[:-1][lengths_N > 0]] = False
    rollout_ids, problem_ids = batch["rollout_ids"].to_pylist(), batch["problem_id"].to_pylist()  # type: ignore[index]
    return SFTRows(
        token_ids=ids.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
        learnt=learnt,
        weights=np.repeat(weight_S, num_tokens_S),
        offsets=offsets,
        names=tuple("+".join(r) or f"problem {p}" for r, p in zip(rollout_ids, problem_ids, strict=True)),
    )


def _join(parts: Sequence[SFTRows]) -> SFTRows:
    lengths_N = np.concatenate([part.lengths for part in parts])
    return SFTRows(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        learnt=np.concatenate([part.learnt for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64),
        names=tuple(name for part in parts for name in part.names),
    )


def usable_rows(rows: SFTRows, max_length: int) -> tuple[SFTRows, dict[str, int]]:
    """The rows that can be learnt from, and how many were left out, by reason.

    Raises:
        Finding: none is left.
    """
    too_long_N = rows.lengths > max_length
    without_loss_N = ~too_long_N & (rows.num_learnt == 0)
    left_out = {"num_too_long": int(too_long_N.sum()), "num_without_loss": int(without_loss_N.sum())}
    kept = np.flatnonzero(~too_long_N & ~without_loss_N)
    if not len(kept):
        raise Finding(
            f"None of the {len(rows)} training examples can be learnt from.",
            evidence={"num_examples": len(rows), **left_out},
            hint=f"Raise max_length (now {max_length}) if they are too long; else look at what the curation step kept.",
        )
    return (rows if len(kept) == len(rows) else rows.take(kept)), left_out
