"""What STaR learns from: right answers only, hinted ones against the bare prompt, every row accounted for."""

import pytest

from reasonrun.curate.filtering import gold_rows, star_rows, unfiltered_rows
from reasonrun.curate.group import Group
from reasonrun.records import Graded, LeftOut, Message, Problem, Rollout, Sampling, Score, Segment, SFTExample

PROMPT, EOS = (1, 2, 3), 9


def group():
    problem = Problem(id="p", task="t", split="train", messages=(Message(role="user", content="q"),), reference="4")
    return Group(
        problem=problem,
        prompt=lambda style: Segment(
            token_ids=(*PROMPT, {"plain": 0, "few_shot": 7, "direct": 8}[style]), src="prompt", loss=False
        ),
        gold=lambda: Segment(token_ids=(4, EOS), src="gold", loss=True),
    )


def row(name, value, *, text="a", ids=(5, 6, EOS), reason="correct", prompt_ids=(100, 101)):
    rollout = Rollout(
        id=name,
        problem_id="p",
        index=0,
        kind="plain",
        messages=(),
        prompt_ids=prompt_ids,
        segments=(Segment(token_ids=ids, src="model", loss=True),),
        text=text,
        finish_reason="stop",
        policy="w",
        sampling=Sampling(),
        seed=0,
    )
    return Graded(rollout=rollout, score=Score(value=value, reason=reason, grader="number-1"))


def split(outcomes):
    outcomes = list(outcomes)
    kept = [o for o in outcomes if isinstance(o, SFTExample)]
    return kept, {o.rollout_id: o.reason for o in outcomes if isinstance(o, LeftOut)}


def test_right_rows_are_kept_whole_and_wrong_ones_counted():
    kept, left = split(star_rows(group(), [row("a", 1.0), row("b", 0.0, reason="wrong")], []))
    assert [example.rollout_ids for example in kept] == [("a",)]
    assert left == {"b": "wrong"}


def test_the_loss_is_on_the_sampled_ids_and_nothing_is_added():
    kept, _ = split(star_rows(group(), [row("a", 1.0, ids=(5, 6))], []))  # no end of sequence was sampled
    learnt = [i for segment in kept[0].segments if segment.loss for i in segment.token_ids]
    masked = [i for segment in kept[0].segments if not segment.loss for i in segment.token_ids]
    assert learnt == [5, 6]
    assert masked == [*PROMPT, 0]


def test_a_hinted_row_is_stored_against_the_bare_prompt():
    kept, _ = split(star_rows(group(), [row("a", 0.0)], [row("h", 1.0, prompt_ids=(100, 101, 55, 56))]))
    assert kept[0].source == "hinted"
    assert kept[0].segments[0].token_ids == (*PROMPT, 0)
    assert not {55, 56} & {i for segment in kept[0].segments for i in segment.token_ids}


def test_a_hinted_row_that_speaks_of_the_hint_is_left_out_but_an_unhinted_one_is_not():
    marked = "as said, (The answer is 4)"
    rows = [row("a", 1.0, text=marked)], [row("h", 1.0, text=marked)]
    kept, left = split(star_rows(group(), *rows, hint_markers=("The answer is",)))
    assert [example.rollout_ids for example in kept] == [("a",)]
    assert left == {"h": "mentions_hint"}


def test_an_ungraded_row_is_neither_right_nor_wrong():
    _, left = split(star_rows(group(), [row("a", None, reason="deadline")], []))
    assert left == {"a": "ungraded: deadline"}


def test_dedupe_and_cap_leave_out_with_their_reasons():
    rows = [row("a", 1.0, text="x"), row("b", 1.0, text="x"), row("c", 1.0, text="y"), row("d", 1.0, text="z")]
    kept, left = split(star_rows(group(), rows, [], dedupe=True, cap=2))
    assert [example.rollout_ids[0] for example in kept] == ["a", "c"]
    assert left == {"b": "duplicate", "d": "over_cap"}


def test_the_training_style_chooses_the_prompt():
    kept, _ = split(star_rows(group(), [row("a", 1.0)], [], style="few_shot"))
    assert kept[0].segments[0].token_ids == (*PROMPT, 7)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_control_keeps_a_share_whatever_the_verdict(share):
    rows = [row(f"r{i}", float(i % 2)) for i in range(1000)]
    kept, left = split(unfiltered_rows(group(), rows, share=share))
    assert len(kept) + len(left) == 1000
    assert abs(len(kept) / 1000 - share) < 0.05  # 3 standard errors of 0.0145
    if share == 0.3:
        right = sum(int(example.rollout_ids[0][1:]) % 2 for example in kept) / len(kept)
        assert abs(right - 0.5) < 0.1


def test_gold_rows_learn_the_answer_alone():
    kept, _ = split(gold_rows(group()))
    assert [segment.loss for segment in kept[0].segments] == [False, True]
    assert kept[0].segments[1].token_ids == (4, EOS)
