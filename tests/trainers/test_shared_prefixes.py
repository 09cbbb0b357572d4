"""Rows that begin others share their forward pass: which, and where their tokens then are."""

from __future__ import annotations

import numpy as np

from reasonrun.records import PolicyGradientExample, Segment
from reasonrun.trainers.shared_prefixes import merge


def row(name: str, *parts: tuple[tuple[int, ...], bool], group: str = "g") -> PolicyGradientExample:
    segments = tuple(Segment(token_ids=ids, src="model" if loss else "prompt", loss=loss) for ids, loss in parts)
    logps = tuple(-0.5 for segment in segments if segment.loss for _ in segment.token_ids)
    return PolicyGradientExample(
        problem_id=group, rollout_id=name, segments=segments, reward=1.0, group=group, sampled_logps=logps
    )


FIRST = row("first", ((1, 2), False), ((3, 4), True))
SECOND = row("second", ((1, 2, 3, 4, 5), False), ((6,), True))
OTHER = row("other", ((1, 2), False), ((3, 9), True))


def test_a_first_attempt_goes_through_the_pass_of_the_second_and_keeps_its_tokens() -> None:
    merged = merge([FIRST, OTHER, SECOND])
    assert [merged.sequences.names[i] for i in range(len(merged.sequences))] == ["other", "second"]
    assert merged.owner_P.tolist() == [1, 0, 1]
    assert merged.num_tokens_P.tolist() == [2, 2, 1]
    assert merged.places_N.tolist() == [2, 3, 2, 3, 5]
    learnt = merged.sequences.learnt
    assert learnt.tolist() == [False, False, True, True, False, False, True, True, False, True]
    assert merged.sums(np.array([1.0, 2, 3, 4, 5])).tolist() == [3, 7, 5]
    assert merged.tokens_of(np.array([2, 0])) == [slice(4, 5), slice(0, 2)]


def test_nothing_is_shared_across_groups_or_where_a_token_differs() -> None:
    foreign = SECOND.model_copy(update={"group": "h"})
    assert merge([FIRST, foreign]).owner_P.tolist() == [0, 1]
    assert merge([OTHER, SECOND]).owner_P.tolist() == [0, 1]
    assert merge([FIRST, FIRST]).owner_P.tolist() == [0, 1]  # equal rows stay two


def test_three_attempts_are_one_sequence_whatever_their_order() -> None:
    third = row("third", ((1, 2, 3, 4, 5, 6, 7), False), ((8, 9), True))
    for rows in ([FIRST, SECOND, third], [third, SECOND, FIRST]):
        merged = merge(rows)
        assert len(merged.sequences) == 1 and merged.sequences.names == ("third",)
        assert set(merged.owner_P.tolist()) == {0}
        places = [merged.places_N[here].tolist() for here in merged.tokens_of(np.arange(3))]
        assert sorted(places) == [[2, 3], [5], [7, 8]]


def test_the_first_token_of_a_row_is_never_learnt() -> None:
    merged = merge([row("bare", ((1, 2), True))])
    assert merged.places_N.tolist() == [1] and merged.num_tokens_P.tolist() == [1]
