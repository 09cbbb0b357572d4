"""Examples as flat arrays: a few bytes per token, however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.errors import Finding
from reasonrun.records import Segment

_NAMES = ("rollout_ids", "problem_id")


@dataclass(frozen=True, kw_only=True)
class Sequences:
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

    def take(self, rows: npt.NDArray[np.int64]) -> Sequences:
        """Some of the rows, in the order given."""
        positions = np.concatenate(
            [np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows] or [np.empty(0, dtype=np.int64)]
        )
        return Sequences(
            token_ids=self.token_ids[positions],
            learnt=self.learnt[positions],
            weights=self.weights[positions],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64),
            names=tuple(self.names[row] for row in rows),
        )


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Preference pairs: the prefix of each row is in both sequences, and only what follows it is learnt.

    ``weights``, ``margins``, ``smoothings`` and ``win_probabilities`` have one number a pair (records.PreferenceExample).
    """

    chosen: Sequences
    rejected: Sequences
    weights: npt.NDArray[np.float64]
    margins: npt.NDArray[np.float64]
    smoothings: npt.NDArray[np.float64]
    win_probabilities: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: npt.NDArray[np.int64]) -> Pairs:
        """Some of the pairs, in the order given."""
        return Pairs(
            chosen=self.chosen.take(rows),
            rejected=self.rejected.take(rows),
            weights=self.weights[rows],
            margins=self.margins[rows],
            smoothings=self.smoothings[rows],
            win_probabilities=self.win_probabilities[rows],
        )


def read_rows(paths: Sequence[str]) -> Sequences:
    """Read sealed Parquet files of SFTExample, in order.

    Only the columns that training needs are read; nested segments are ``list<struct<token_ids, src, loss, …>>``.
    """
    return _join([_flatten(batch) for batch in _batches(paths, ["segments", "weight", *_NAMES])] or [_empty()])


def sequences_of(rows: Sequence[tuple[str, Sequence[Segment]]]) -> Sequences:
    """Rows that stand in memory: what messages call each, and its segments."""
    segments = [segment for _, own in rows for segment in own]
    num_tokens_S = [len(segment.token_ids) for segment in segments]
    lengths_N = [sum(len(segment.token_ids) for segment in own) for _, own in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    learnt = np.repeat([segment.loss for segment in segments], num_tokens_S)
    learnt[offsets[:-1]] = False
    return Sequences(
        token_ids=np.array([i for segment in segments for i in segment.token_ids], dtype=np.int64),
        learnt=learnt,
        weights=np.repeat([segment.weight for segment in segments], num_tokens_S).astype(np.float32),
        offsets=offsets,
        names=tuple(name for name, _ in rows),
    )


def read_pairs(paths: Sequence[str]) -> Pairs:
    """Read sealed Parquet files of PreferenceExample, in order."""
    ids, numbers = ["prefix_ids", "chosen_ids", "rejected_ids"], ["weight", "margin", "smoothing", "win_probability"]
    batches = list(_batches(paths, [*ids, *numbers, *_NAMES]))
    columns = [np.concatenate([_numbers(batch[name]) for batch in batches] or [np.empty(0)]) for name in numbers]
    sides = [_join([_continued(batch, side) for batch in batches] or [_empty()]) for side in ids[1:]]
    return Pairs(
        chosen=sides[0],
        rejected=sides[1],
        weights=columns[0],
        margins=columns[1],
        smoothings=columns[2],
        win_probabilities=columns[3],
    )


def _batches(paths: Sequence[str], columns: list[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for path in paths:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=columns)


def _numbers(array: Any) -> npt.NDArray[Any]:
    numbers: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return numbers


def _lengths(lists: Any) -> npt.NDArray[np.int64]:
    import pyarrow.compute as pc

    return _numbers(pc.list_value_length(lists)).astype(np.int64)


def _names(batch: Any) -> tuple[str, ...]:
    rollout_ids, problem_ids = batch["rollout_ids"].to_pylist(), batch["problem_id"].to_pylist()
    return tuple("+".join(r) or f"problem {p}" for r, p in zip(rollout_ids, problem_ids, strict=True))


def _continued(batch: Any, side: str) -> Sequences:
    """Prefix and one continuation of every row, one after the other."""
    prefix_N, continued_N = _lengths(batch["prefix_ids"]), _lengths(batch[side])
    offsets = np.concatenate([[0], np.cumsum(prefix_N + continued_N)]).astype(np.int64)
    learnt = np.repeat(np.tile([False, True], len(prefix_N)), np.stack([prefix_N, continued_N], axis=1).ravel())
    token_ids = np.empty(len(learnt), dtype=np.int64)
    token_ids[~learnt] = _numbers(batch["prefix_ids"].flatten())
    token_ids[learnt] = _numbers(batch[side].flatten())
    learnt[offsets[:-1][prefix_N + continued_N > 0]] = False
    return Sequences(
        token_ids=token_ids,
        learnt=learnt,
        weights=np.ones(len(learnt), dtype=np.float32),
        offsets=offsets,
        names=_names(batch),
    )


def _empty() -> Sequences:
    return Sequences(
        token_ids=np.empty(0, dtype=np.int64),
        learnt=np.empty(0, dtype=np.bool_),
        weights=np.empty(0, dtype=np.float32),
        offsets=np.zeros(1, dtype=np.int64),
        names=(),
    )


def _flatten(batch: Any) -> Sequences:
    import pyarrow.compute as pc

    segments = batch["segments"]
    flat = segments.flatten()
    ids = pc.struct_field(flat, "token_ids")
    num_tokens_S = _lengths(ids)
    loss_S = _numbers(pc.struct_field(flat, "loss")).astype(np.bool_)
    row_of_segment_S = np.repeat(np.arange(len(segments)), _lengths(segments))
    segment_weight_S = _numbers(pc.struct_field(flat, "weight"))
    weight_S = (segment_weight_S * _numbers(batch["weight"])[row_of_segment_S]).astype(np.float32)

    lengths_N = np.bincount(row_of_segment_S, weights=num_tokens_S, minlength=len(segments)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
    learnt = np.repeat(loss_S, num_tokens_S)
    learnt[offsets[:-1][lengths_N > 0]] = False
    return Sequences(
        token_ids=_numbers(ids.flatten()).astype(np.int64),
        learnt=learnt,
        weights=np.repeat(weight_S, num_tokens_S),
        offsets=offsets,
        names=_names(batch),
    )


def _join(parts: Sequence[Sequences]) -> Sequences:
    lengths_N = np.concatenate([part.lengths for part in parts])
    return Sequences(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        learnt=np.concatenate([part.learnt for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64),
        names=tuple(name for part in parts for name in part.names),
    )


def usable_rows(rows: Sequences, max_length: int) -> tuple[Sequences, dict[str, int]]:
    """The rows that can be learnt from, and how many were left out, by reason.

    Raises:
        Finding: none is left.
    """
    too_long_N = rows.lengths > max_length
    without_loss_N = ~too_long_N & (rows.num_learnt == 0)
    left_out = {"num_too_long": int(too_long_N.sum()), "num_without_loss": int(without_loss_N.sum())}
    kept = np.flatnonzero(~too_long_N & ~without_loss_N)
    _refuse_none(len(kept), len(rows), left_out, max_length)
    return (rows if len(kept) == len(rows) else rows.take(kept)), left_out


def usable_pairs(pairs: Pairs, max_length: int) -> tuple[Pairs, dict[str, int]]:
    """The pairs that can be learnt from, and how many were left out, by reason. Nothing is ever cut.

    Raises:
        Finding: none is left.
    """
    too_long_N = np.maximum(pairs.chosen.lengths, pairs.rejected.lengths) > max_length
    without_loss_N = ~too_long_N & ((pairs.chosen.num_learnt == 0) | (pairs.rejected.num_learnt == 0))
    equal_N = np.array(
        [
            np.array_equal(
                pairs.chosen.token_ids[pairs.chosen.slice(i)], pairs.rejected.token_ids[pairs.rejected.slice(i)]
            )
            for i in range(len(pairs))
        ],
        dtype=np.bool_,
    )
    equal_N &= ~too_long_N & ~without_loss_N
    left_out = {
        "num_too_long": int(too_long_N.sum()),
        "num_without_loss": int(without_loss_N.sum()),
        "num_chosen_is_rejected": int(equal_N.sum()),
    }
    kept = np.flatnonzero(~too_long_N & ~without_loss_N & ~equal_N)
    _refuse_none(len(kept), len(pairs), left_out, max_length)
    return (pairs if len(kept) == len(pairs) else pairs.take(kept)), left_out


def _refuse_none(num_kept: int, num_given: int, left_out: dict[str, int], max_length: int) -> None:
    if not num_kept:
        raise Finding(
            f"None of the {num_given} training examples can be learnt from.",
            evidence={"num_examples": num_given, **left_out},
            hint=f"Raise max_length (now {max_length}) if they are too long; else look at what the curation step kept.",
        )
