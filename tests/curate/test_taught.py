"""Steps for other models to read, verdicts that place an error, and a teacher's step in the policy's own form."""

import pytest

from curate.solutions import EOS, GROUP, PROMPT_IDS, RENDERER, RIGHT, solution, text_of
from reasonrun.curate.first_error import judged_errors
from reasonrun.curate.pairs import error_pairs
from reasonrun.curate.steps import SEGMENTERS, numbered
from reasonrun.curate.taught import taught_pairs
from reasonrun.records import LeftOut, PreferenceExample, Score

WRONG = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 76\nAnswer: 76"
GIVEN = "Step 1: 8 * 9 = 72\nStep 2:"
BAD = solution("bad", WRONG, 0.0)
GOOD = solution("win", " 72 + 3 = 75\nAnswer: 75", 1.0, parent="bad", given=GIVEN)


def taught(text, value=1.0, reason="written", name="said"):
    return solution(name, text, value, parent="bad", reason=reason)


def pairs(said, *, tried=(BAD,), rectified=(GOOD,), steps="task", checked=()):
    outcomes = list(taught_pairs(GROUP, list(tried), list(rectified), list(said), *checked, steps=steps, cap=4))
    reasons = {row.rollout_id: row.reason for row in outcomes if isinstance(row, LeftOut)}
    return [row for row in outcomes if not isinstance(row, LeftOut)], reasons


# -- what a judge is shown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "how", "shown"),
    [
        (RIGHT, "labels", "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 75\nAnswer: 75"),
        (RIGHT, "lines", "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 75\nStep 3: Answer: 75"),
        ("Let us see.\n\n**Step 1:** eight\n\nStep 2. nine\n", "labels", "Let us see.\nStep 1: eight\nStep 2: nine"),
        ("one\n\n  two", "lines", "Step 1: one\nStep 2: two"),
    ],
)
def test_steps_are_numbered_as_they_are_cut(text, how, shown):
    marks = SEGMENTERS[how](text)
    assert numbered(text, [start for start, _ in marks]) == shown


def test_the_answer_line_of_the_task_is_a_step_with_a_number():
    found = GROUP.steps(BAD.rollout, "task")
    assert numbered(WRONG, found.chars) == "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 76\nStep 3: Answer: 76"


def test_a_verdict_cuts_before_the_step_that_it_names():
    def judged(answer, value=1.0, reason="wrong_step"):
        row = solution("v", "…", 0.0, parent="bad")
        score = Score(value=value, answer=answer, reason=reason, grader="step-verdict-1")
        return list(judged_errors(GROUP, [BAD], [row.model_copy(update={"score": score})], steps="task", cap=0, room=9))

    assert text_of(judged("2")[0].token_ids) == GIVEN
    assert text_of(judged("3")[0].token_ids) == "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 76\nAnswer:"
    assert judged("4")[0].reason == "judge: no_such_step"
    assert judged(None, None, "no_heading")[0].reason == "judge: no_heading"
    assert judged("2")[1] == LeftOut(rollout_id="v", reason="evidence")


# -- what a teacher writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "Step 2: 72 + 3 = 75",
        "72 + 3 = 75",
        "  Step 2:   72 + 3 = 75  \n\n",
        "Step 2: 72 + 3 = 75\nAnswer: 75",  # one step only
        "Here is the step:\nStep 2: 72 + 3 = 75\nStep 3: 75 + 1 = 76",
        "**Step 2:** 72 + 3 = 75",
    ],
)
def test_the_teachers_step_is_written_as_the_policy_writes_steps(said):
    (pair,), reasons = pairs([taught(said)])
    assert isinstance(pair, PreferenceExample) and pair.source == "teacher"
    assert pair.prefix_ids == PROMPT_IDS + RENDERER.encode(GIVEN)
    assert (text_of(pair.chosen_ids), text_of(pair.rejected_ids)) == (" 72 + 3 = 75\n", " 72 + 3 = 76\n")
    assert pair.chosen_ids == GOOD.rollout.completion_ids[GOOD.rollout.num_given_tokens :][: len(pair.chosen_ids)]
    assert EOS not in pair.chosen_ids + pair.rejected_ids
    assert pair.rollout_ids == ("win", "bad", "said") and not reasons


def test_a_last_step_ends_with_the_end_of_sequence_and_needs_the_answer_of_the_other():
    given = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 75\nAnswer:"
    slip = solution("bad", given + " 57", 0.0)
    win = solution("win", " 75", 1.0, parent="bad", given=given)
    (pair,), _ = pairs([taught("Answer: 75")], tried=[slip], rectified=[win])
    end = text_of((EOS,))
    assert (text_of(pair.chosen_ids), text_of(pair.rejected_ids)) == (" 75" + end, " 57" + end)
    # With steps by labels the answer line belongs to the last step: a step without it would win by leaving it out.
    found, reasons = pairs([taught("Step 2: 72 + 3 = 75")], steps="labels")
    assert not found and reasons["said"] == "teacher: no_ending"
    (pair,), _ = pairs([taught("Step 2: 72 + 3 = 75\nAnswer: 75")], steps="labels")
    assert text_of(pair.chosen_ids) == " 72 + 3 = 75\nAnswer: 75" + end


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (taught("", None, "empty"), "teacher: empty"),
        (taught("Step 2: 72 +", None, "truncated"), "teacher: truncated"),
        (taught("Step 3: 72 + 3 = 75"), "teacher: other_step"),
        (taught("Step 2:"), "teacher: no_step"),
        (taught("Step 2: 72 + 3 = 76"), "teacher: same_as_rejected"),
    ],
)
def test_what_a_teacher_cannot_teach_is_counted_by_reason(row, reason):
    found, reasons = pairs([row])
    assert not found
    assert reasons == {"said": reason, "win": "no_teacher_step", "bad": "no_pair: no_teacher_step"}


def test_an_error_that_no_teacher_was_asked_about_says_so():
    found, reasons = pairs([])
    assert not found and reasons["win"] == "teacher: not_asked"


def test_a_teacher_gives_one_pair_for_an_error_and_none_for_one_that_is_not_rectified():
    two = solution("two", " 3 + 72 = 75\nAnswer: 75", 1.0, parent="bad", given=GIVEN)
    found, reasons = pairs([taught("Step 2: 72 + 3 = 75")], rectified=[GOOD, two])
    assert len(found) == 1 and reasons == {"two": "over_cap"}
    lost = solution("lost", " 72 + 3 = 74\nAnswer: 74", 0.0, parent="bad", given=GIVEN)
    found, reasons = pairs([taught("Step 2: 72 + 3 = 75")], rectified=[lost])
    assert not found and reasons["said"] == "not_rectified"


def test_both_teachers_compare_the_same_errors():
    """The task's solution and a model that writes the same step make the same pair."""
    (mine,), _ = pairs([taught("Step 2: 72 + 3 = 75")])
    (theirs,) = (
        row
        for row in error_pairs(GROUP, [BAD], [GOOD], steps="task", cap=4, form="teacher")
        if not isinstance(row, LeftOut)
    )
    assert (mine.prefix_ids, mine.chosen_ids, mine.rejected_ids) == (
        theirs.prefix_ids,
        theirs.chosen_ids,
        theirs.rejected_ids,
    )
