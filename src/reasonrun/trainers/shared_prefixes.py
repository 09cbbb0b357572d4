"""Rows that begin another row go through its forward pass: a first attempt is part of the second one's prompt.

Attention is causal, so a token's log-probability does not depend on what follows it. Merging changes no number, only how
many tokens are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reasonrun.records import PolicyGradientExample, Segment
from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.examples import Sequences, sequences_of

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Sequences that go through the model, and where the learnt tokens of each row lie in them.

    Axes: S sequences, P rows, N learnt tokens of all rows, one row after the other.

    Attributes:
        sequences: what the model sees; ``learnt`` marks the tokens of any row.
        owner_P: the sequence that holds each row.
        num_tokens_P: learnt tokens of each row.
        places_N: where each learnt token stands, counted from the beginning of its sequence.
    """

    sequences: Sequences
    owner_P: Indexes
    num_tokens_P: Indexes
    places_N: Indexes

    def tokens_of(self, rows: Indexes) -> list[slice]:
        """Where the learnt tokens of ``rows`` lie among all N."""
        ends = np.cumsum(self.num_tokens_P)
        return [slice(int(ends[row] - self.num_tokens_P[row]), int(ends[row])) for row in rows]

    def sums(self, values_N: Floats) -> Floats:
        """Sums over the learnt tokens of each row, shape (P,)."""
        totals = np.concatenate([[0.0], np.cumsum(values_N)])
        ends = np.cumsum(self.num_tokens_P)
        sums_P: Floats = totals[ends] - totals[ends - self.num_tokens_P]
        return sums_P


def merge(rows: Sequence[PolicyGradientExample]) -> Merged:
    """Find for each row the longest one of its group that it begins."""
    ids = [tuple(i for segment in row.segments for i in segment.token_ids) for row in rows]
    by_group: dict[str, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: -len(ids[place])):
        by_group.setdefault(rows[place].group, []).append(place)
    holder = list(range(len(rows)))
    for places in by_group.values():
        holders: list[int] = []
        for place in places:
            found = next((h for h in holders if len(ids[h]) > len(ids[place]) and _begins(ids[place], ids[h])), None)
            if found is None:
                holders.append(place)
            else:
                holder[place] = found
    kept = sorted(set(holder))
    number = {place: i for i, place in enumerate(kept)}
    learnt = [_learnt_places(row.segments) for row in rows]
    sequences = sequences_of([(rows[place].rollout_id, rows[place].segments) for place in kept])
    owner_P = np.array([number[h] for h in holder], dtype=np.int64)
    for place, sequence in enumerate(owner_P):
        sequences.learnt[sequences.offsets[sequence] + learnt[place]] = True
    return Merged(
        sequences=sequences,
        owner_P=owner_P,
        num_tokens_P=np.array([len(places) for places in learnt], dtype=np.int64),
        places_N=np.concatenate(learnt),
    )


def _begins(beginning: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return whole[: len(beginning)] == beginning


def _learnt_places(segments: Sequence[Segment]) -> Indexes:
    """Positions of the tokens with loss; the first token of a row has nothing that predicts it."""
    marks = np.repeat([s.loss for s in segments], [len(s.token_ids) for s in segments])
    marks[:1] = False
    return np.flatnonzero(marks).astype(np.int64)
