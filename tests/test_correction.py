"""What asking again changes, worked out by hand."""

import math

import pytest

from reasonrun.correction import correction_section, correction_table, overall
from reasonrun.records import Graded, Rollout, Sampling, Score, Segment


def row(name, problem, value, answer, text="", *, parent=None, reason=None, num_tokens=3, index=0):
    given = Segment(token_ids=(9, 9), src="hint", loss=False)
    rollout = Rollout(
        id=name,
        problem_id=problem,
        index=index,
        parent_id=parent,
        kind="turn" if parent else "plain",
        messages=(),
        prompt_ids=(1,),
        segments=(given, Segment(token_ids=tuple(range(num_tokens)), src="model", loss=True)),
        text=text,
        finish_reason="stop",
        policy="weights",
        sampling=Sampling(),
        seed=1,
    )
    said = reason or ("correct" if value else "wrong")
    return Graded(rollout=rollout, score=Score(value=value, answer=answer, reason=said, grader="number-1"))


def attempts(first, second, problems=None):
    """Two attempts from (value, answer) and (value, answer, text) of each row."""
    names = problems or [f"p{n}" for n in range(len(first))]
    before = [row(f"a{n}", names[n], *cells) for n, cells in enumerate(first)]
    after = [row(f"b{n}", names[n], *cells, parent=f"a{n}") for n, cells in enumerate(second)]
    return before, after


# Five problems: right twice; right, then wrong; wrong, then right; wrong twice with the same answer; without an answer,
# then with a wrong one.
FIVE = attempts(
    [(1.0, "1", "kitten"), (1.0, "2", ""), (0.0, "3", "abc"), (0.0, "4", "same"), (0.0, None, "ab")],
    [(1.0, "1", "sitting"), (0.0, "9", ""), (1.0, "5", "abcd"), (0.0, "4", "same"), (0.0, "7", "")],
)


def test_flips_and_shares_by_hand():
    table = correction_table(*FIVE)
    assert (table["num_rows"], table["num_problems"]) == (5, 5)
    assert (table["accuracy_first"], table["accuracy_last"], table["delta"]) == (0.4, 0.4, 0.0)
    assert (table["incorrect_to_correct"], table["correct_to_incorrect"]) == (0.2, 0.2)
    assert table["incorrect_to_correct_given_incorrect"] == pytest.approx(1 / 3)
    assert table["correct_to_incorrect_given_correct"] == 0.5
    assert table["mcnemar_p"] == 1.0
    # Another answer: the second, the third, and the fifth, which had none.
    assert table["changed_share"] == 0.6
    assert table["changed_share_given_incorrect"] == pytest.approx(2 / 3)
    assert table["identical_text_share"] == 0.4  # "" and "same"
    # kitten -> sitting: 3 edits of 6 + 7 characters; abc -> abcd: 1 of 7; ab -> "": 2 of 2; the others 0.
    assert table["edit_ratio"] == pytest.approx((3 / 13 + 0 + 1 / 7 + 0 + 1) / 5)


def test_the_standard_error_of_one_row_a_problem_is_the_one_of_paired_shares():
    """Of ten, 3 are corrected and 1 is spoilt: delta 0.2, SE sqrt((0.3 + 0.1 - 0.04) / 10) = 0.189737; McNemar's p is
    2 * (1 + 4) / 2^4, both tails of at most one head of four."""
    first = [(0.0, "0", "")] * 5 + [(1.0, "1", "")] * 5
    second = [(1.0, "1", "")] * 3 + [(0.0, "0", "")] * 2 + [(1.0, "1", "")] * 4 + [(0.0, "0", "")]
    table = correction_table(*attempts(first, second))
    assert table["delta"] == pytest.approx(0.2)
    assert table["delta_se"] == pytest.approx(0.18973666)
    assert table["delta_interval"] == pytest.approx([0.2 - 1.96 * 0.18973666, 0.2 + 1.96 * 0.18973666])
    assert table["mcnemar_p"] == 0.625


def test_samples_of_one_problem_are_not_independent():
    """Both samples of p are corrected, both of q stay wrong: differences 1, 1, 0, 0 around 0.5 sum to 1 and -1 by
    problem, so the error is sqrt(2) / 4 and not the 0.25 of four independent rows."""
    first, second = [(0.0, "0", "")] * 4, [(1.0, "1", "")] * 2 + [(0.0, "0", "")] * 2
    table = correction_table(*attempts(first, second, ["p", "p", "q", "q"]))
    assert table["delta_se"] == pytest.approx(math.sqrt(2) / 4)
    assert table["delta_interval"] == pytest.approx([0.5 - 1.96 * math.sqrt(2) / 4, 0.5 + 1.96 * math.sqrt(2) / 4])
    assert table["mcnemar_p"] is None and table["num_problems"] == 2


def test_what_was_not_graded_is_incorrect_and_two_without_an_answer_are_the_same():
    first = [
        (
            None,
            None,
            "",
        ),
        (0.0, None, ""),
    ]
    second = [(1.0, "1", ""), (None, None, "")]
    table = correction_table(*attempts(first, second))
    assert (table["accuracy_first"], table["accuracy_last"]) == (0.0, 0.5)
    assert table["incorrect_to_correct_given_incorrect"] == 0.5 and table["changed_share"] == 0.5
    assert table["correct_to_incorrect_given_correct"] is None  # no first attempt was right
    assert table["edit_ratio"] == 0.0 and table["identical_text_share"] == 1.0
    right = correction_table(*attempts([(1.0, "1", "")], [(1.0, "1", "")]))
    assert right["incorrect_to_correct_given_incorrect"] is None and right["changed_share_given_incorrect"] is None


def test_cut_attempts_are_counted_on_both_sides():
    first = [row("a0", "p", 0.0, None, reason="truncated"), row("a1", "q", 1.0, "1")]
    second = [row("b0", "p", 1.0, "1", parent="a0"), row("b1", "q", 1.0, "1", parent="a1")]
    table = correction_table(first, second)
    assert (table["truncated_share_first"], table["truncated_share_last"]) == (0.5, 0.0)


def test_rows_out_of_line_are_refused():
    first, second = FIVE
    with pytest.raises(ValueError, match="row 0: b1 is a turn after a1, not after a0"):
        correction_table(first[:2], second[1::-1])
    with pytest.raises(ValueError, match="5 and 4 rows"):
        correction_table(first, second[:4])
    with pytest.raises(ValueError, match="0 and 0 rows"):
        correction_table([], [])
    third = [row(f"c{n}", f"p{n}", 1.0, "1", parent=f"a{n}") for n in range(5)]  # turns of the first attempt
    with pytest.raises(ValueError, match="row 0: c0 is a turn after a0, not after b0"):
        correction_section([first, second, third])


def test_three_attempts_have_every_step_and_the_whole_way():
    first, second = FIVE
    third = [row(f"c{n}", f"p{n}", 1.0, "1", "x", parent=f"b{n}", num_tokens=n) for n in range(5)]
    section = correction_section([first, second, third])
    assert [(change["from"], change["to"]) for change in section["changes"]] == [(1, 2), (2, 3), (1, 3)]
    assert [change["delta"] for change in section["changes"]] == pytest.approx([0.0, 0.6, 0.6])
    whole = overall(section)
    assert (whole["from"], whole["to"], whole["incorrect_to_correct"]) == (1, 3, 0.6)
    assert section["changes"][0] == {"from": 1, "to": 2, **correction_table(first, second)}
    accuracies = [attempt["accuracy"] for attempt in section["attempts"]]
    assert accuracies == [0.4, 0.4, 1.0]
    # Tokens that were put in the model's mouth are not its own: 3 each, and 0 to 4 in the last attempt.
    assert [attempt["mean_num_tokens"] for attempt in section["attempts"]] == [3.0, 3.0, 2.0]
    assert section["attempts"][2]["interval"][1] == 1.0 and section["attempts"][0]["truncated_share"] == 0.0


def test_two_attempts_have_their_change_once_and_no_ids_no_length():
    first, second = (
        [one.model_copy(update={"rollout": one.rollout.model_copy(update={"segments": ()})}) for one in rows]
        for rows in FIVE
    )
    section = correction_section([first, second])
    assert len(section["changes"]) == 1 and section["attempts"][0]["mean_num_tokens"] is None
