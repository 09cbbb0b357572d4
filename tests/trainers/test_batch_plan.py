from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrun.trainers.batches import micro_batches, plan_batches, share_of_rank


def padded(batches: list[np.ndarray], lengths: np.ndarray) -> int:
    return sum(int(lengths[batch].max()) * len(batch) for batch in batches)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    batch_size=st.integers(1, 12),
    num_epochs=st.integers(1, 4),
    seed=st.integers(0, 2**62),
)
def test_after_k_epochs_every_row_was_used_k_times_save_the_few_carried_over(
    lengths: list[int], batch_size: int, num_epochs: int, seed: int
) -> None:
    num_steps, num_carried = divmod(num_epochs * len(lengths), batch_size)
    batches = plan_batches(lengths, batch_size, num_steps, seed)
    assert [len(batch) for batch in batches] == [batch_size] * num_steps
    if not batches:
        return
    counts = np.bincount(np.concatenate(batches), minlength=len(lengths))
    assert len(counts) == len(lengths)
    # The carried rows all come from the last permutation, unless the set is smaller than what is carried.
    if num_carried <= len(lengths):
        assert sorted(counts) == [num_epochs - 1] * num_carried + [num_epochs] * (len(lengths) - num_carried)
    assert counts.sum() == num_epochs * len(lengths) - num_carried


@given(num_short=st.integers(0, 12), num_more=st.integers(0, 12))
def test_a_longer_plan_begins_with_the_shorter_one(num_short: int, num_more: int) -> None:
    lengths = list(range(1, 12))
    short = plan_batches(lengths, 4, num_short, seed=3)
    long = plan_batches(lengths, 4, num_short + num_more, seed=3)
    assert [list(batch) for batch in short] == [list(batch) for batch in long[:num_short]]


def test_the_plan_depends_on_the_seed_and_every_epoch_is_another_permutation() -> None:
    lengths = np.full(64, 5)
    first, again = (np.concatenate(plan_batches(lengths, 8, 16, seed=1)) for _ in range(2))
    assert list(first) == list(again)
    assert list(first) != list(np.concatenate(plan_batches(lengths, 8, 16, seed=2)))
    assert sorted(first[:64]) == sorted(first[64:]) == list(range(64))
    assert list(first[:64]) != list(first[64:])


def test_batches_are_alike_in_length_but_not_in_order() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, size=800)
    batches = plan_batches(lengths, 8, 100, seed=5)
    unsorted = list(np.random.default_rng(1).permutation(800).reshape(100, 8))
    assert padded(unsorted, lengths) > 1.5 * lengths.sum()
    assert padded(batches, lengths) < 1.15 * lengths.sum()
    # No curriculum from short to long: the next batch is as often longer as it is shorter.
    means = np.array([lengths[batch].mean() for batch in batches])
    assert 0.35 < np.mean(np.diff(means) > 0) < 0.65


def test_a_set_smaller_than_the_batch_repeats_rows() -> None:
    [batch] = plan_batches([3, 4], batch_size=5, num_steps=1, seed=0)
    assert sorted(np.bincount(batch)) == [2, 3]


@given(size=st.integers(1, 30), num_ranks=st.integers(1, 5), micro=st.integers(1, 7))
def test_ranks_and_micro_batches_share_a_batch_out(size: int, num_ranks: int, micro: int) -> None:
    lengths = np.random.default_rng(size).integers(1, 99, size=200)
    batch = np.random.default_rng(size).integers(0, 200, size=size)
    pieces = [
        piece
        for rank in range(num_ranks)
        for piece in micro_batches(share_of_rank(batch, lengths, rank, num_ranks), micro)
    ]
    assert sorted(np.concatenate(pieces)) == list(range(size))
    assert all(0 < len(piece) <= micro for piece in pieces)


def test_ranks_get_nearly_equal_numbers_of_tokens() -> None:
    lengths = np.random.default_rng(4).integers(10, 200, size=64)
    shares = [lengths[share_of_rank(np.arange(64), lengths, rank, 4)].sum() for rank in range(4)]
    assert max(shares) - min(shares) <= lengths.max()
