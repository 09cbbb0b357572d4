"""Pairs around a wrong step: what is compared, where it ends, and why a row gives none."""

import pytest

from curate.solutions import EOS, GROUP, PROMPT_IDS, RENDERER, RIGHT, solution, text_of
from reasonrun.curate.pairs import error_pairs, step_ends
from reasonrun.records import LeftOut, PreferenceExample, Prefix, SFTExample

WRONG = "Step 1: 8 * 9 = 62\nStep 2: 62 + 3 = 65\nAnswer: 65"
LABEL = "Step 1:"
REST = RIGHT.removeprefix(LABEL)
TURNED = REST.replace("8 * 9", "9 * 8")
END = text_of((EOS,))


def pairs(tried, rectified, *checked, form="step", cap=4, **params):
    outcomes = list(error_pairs(GROUP, tried, rectified, *checked, steps="task", cap=cap, form=form, **params))
    reasons = {row.rollout_id: row.reason for row in outcomes if isinstance(row, LeftOut)}
    return [row for row in outcomes if not isinstance(row, LeftOut)], reasons


def better(name="win", text=REST, value=1.0, **more):
    return solution(name, text, value, parent="bad", given=LABEL, **more)


BAD = solution("bad", WRONG, 0.0)


def test_a_step_pair_holds_the_two_steps_and_nothing_after_them():
    found, reasons = pairs([BAD, solution("good", RIGHT, 1.0), solution("lost", "?", 0.0)], [better()])
    (pair,) = found
    assert isinstance(pair, PreferenceExample) and pair.rollout_ids == ("win", "bad")
    assert pair.prefix_ids == PROMPT_IDS + RENDERER.encode(LABEL)
    assert (text_of(pair.chosen_ids), text_of(pair.rejected_ids)) == (" 8 * 9 = 72\n", " 8 * 9 = 62\n")
    assert EOS not in pair.chosen_ids + pair.rejected_ids
    assert reasons == {"good": "correct", "lost": "not_located"}


def test_a_last_step_ends_as_it_was_sampled_and_only_against_another_last_one():
    given = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 75\nAnswer:"
    slip = solution("bad", given + " 57", 0.0)
    last = solution("win", " 75", 1.0, parent="bad", given=given)
    (pair,), _ = pairs([slip], [last])
    assert (text_of(pair.chosen_ids), text_of(pair.rejected_ids)) == (" 75" + END, " 57" + END)
    given = "Step 1: 8 * 9 = 72\nStep 2:"
    silent = solution("bad", given + " 72 + 3 = 76", 0.0)  # ends without an answer line
    found, reasons = pairs([silent], [solution("win", " 72 + 3 = 75\nAnswer: 75", 1.0, parent="bad", given=given)])
    assert not found and reasons == {"win": "other_terminality", "bad": "not_rectified"}


def test_whole_responses_of_the_same_rows():
    (pair,), _ = pairs([BAD], [better()], form="response")
    assert pair.prefix_ids == PROMPT_IDS
    assert (text_of(pair.chosen_ids), text_of(pair.rejected_ids)) == (RIGHT + END, WRONG + END)


def test_the_teachers_step_and_the_imitated_step():
    (pair,), reasons = pairs([BAD], [better(), better("two", TURNED)], form="teacher")
    assert text_of(pair.chosen_ids) == " 8 * 9 = 72\n" and pair.source == "teacher"
    assert reasons == {"two": "over_cap"}
    (example,), _ = pairs([BAD], [better()], form="sft")
    assert isinstance(example, SFTExample)
    assert [(text_of(s.token_ids), s.loss) for s in example.segments] == [
        ("a question" + LABEL, False),
        (" 8 * 9 = 72\n", True),
    ]


def test_every_row_without_a_pair_says_why():
    rectified = [
        better("first"),
        better("again"),
        better("other", TURNED),
        better("wrong", WRONG.removeprefix(LABEL), 0.0),
        better("same", WRONG.removeprefix(LABEL), 1.0),
        better("cut", " 8 * 9 = 72", 1.0, finish="length"),
    ]
    found, reasons = pairs([BAD], rectified, cap=1)
    assert [pair.rollout_ids[0] for pair in found] == ["first"]
    assert reasons == {
        "again": "duplicate",
        "other": "over_cap",
        "wrong": "wrong",
        "same": "same_as_rejected",
        "cut": "step_cut_off",
    }


SLIP = " 8 * 9 = 71\nStep 2: 71 + 3 = 75\nAnswer: 75"  # a later slip cancels the earlier one


def test_a_right_answer_after_a_wrong_step_is_no_winner_where_the_program_checks():
    (pair,), _ = pairs([BAD], [better("slip", SLIP)])
    assert text_of(pair.chosen_ids) == " 8 * 9 = 71\n"
    found, reasons = pairs([BAD], [better("slip", SLIP), better()], check="program")
    assert [pair.rollout_ids for pair in found] == [("win", "bad")] and reasons == {"slip": "winner_wrong"}
    found, reasons = pairs([BAD], [better("slip", SLIP)], check="program")
    assert not found and reasons == {"slip": "winner_wrong", "bad": "no_pair: winner_wrong"}


def test_equal_errors_of_a_problem_give_equal_pairs_once():
    twin = solution("twin", WRONG, 0.0)
    of_twin = [solution(f"t{n}", text, 1.0, parent="twin", given=LABEL) for n, text in enumerate((REST, TURNED))]
    found, reasons = pairs([BAD, twin], [better(), *of_twin])
    assert [pair.rollout_ids for pair in found] == [("win", "bad"), ("t1", "twin")] and reasons == {"t0": "duplicate"}
    found, reasons = pairs([BAD, twin], [better(), *of_twin], cap=1)  # the cap is of the wrong step, not of the rollout
    assert reasons == {"t0": "duplicate", "t1": "over_cap", "twin": "no_pair: over_cap"} and len(found) == 1
    _, reasons = pairs([BAD, twin], [better(), of_twin[0]])
    assert reasons == {"t0": "duplicate", "twin": "duplicate"}


def test_a_teachers_step_is_only_right_where_the_program_sees_the_first_error():
    late = solution("bad", "Step 1: 8 * 9 = 62\nStep 2: 62 + 3 = 66\nAnswer: 66", 0.0)
    given = "Step 1: 8 * 9 = 62\nStep 2:"
    row = solution("win", " 62 + 13 = 75\nAnswer: 75", 1.0, parent="bad", given=given)
    found, reasons = pairs([late], [row], form="teacher")
    assert not found and reasons["win"] == "teacher_has_another_course"


def test_a_step_without_words_is_none():
    given = "Step 1: 8 * 9 = 72\nStep 2:"
    empty = solution("bad", given + "\nStep 3: 72 + 3 = 76\nAnswer: 76", 0.0)
    row = solution("win", " 72 + 3 = 75\nAnswer: 75", 1.0, parent="bad", given=given)
    found, reasons = pairs([empty], [row])
    assert not found and reasons == {"bad": "empty_step", "win": "empty_step"}


def test_rows_that_nobody_could_grade_say_so():
    lost = solution("lost", WRONG, None, reason="deadline")
    _, reasons = pairs([lost], [])
    assert reasons == {"lost": "ungraded: deadline"}


@pytest.mark.parametrize(("wins", "min_gain", "kept"), [((1, 1), 0.5, True), ((1, 0), 0.5, False), ((1, 0), 0.0, True)])
def test_a_checked_winner_must_do_better_than_the_wrong_step(wins, min_gain, kept):
    checked = [solution(f"w{n}", REST, float(value), parent="win") for n, value in enumerate(wins)]
    checked += [solution(f"l{n}", REST, float(n == 0), parent="bad") for n in range(4)]  # 1 of 4
    again = [better(f"again{n}") for n in range(3)]  # equal steps are not tried until one is lucky
    found, reasons = pairs([BAD], [better(), *again], checked, check="continuations", min_gain=min_gain)
    assert bool(found) == kept and reasons.get("win") == (None if kept else "not_better")
    assert {reasons[f"again{n}"] for n in range(3)} == {"duplicate"}


def test_an_equal_or_unknown_success_is_no_gain():
    equal = [solution("w", REST, 0.0, parent="win"), solution("l", REST, 0.0, parent="bad")]
    assert pairs([BAD], [better()], equal, check="continuations")[1]["win"] == "not_better"
    unknown = [solution("w", REST, None, parent="win", reason="deadline"), equal[1]]
    assert pairs([BAD], [better()], unknown, check="continuations")[1]["win"] == "check_ungraded"


def test_the_check_of_a_last_step_is_its_own_verdict():
    given = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 75\nAnswer:"
    slip, last = solution("bad", given + " 57", 0.0), solution("win", " 75", 1.0, parent="bad", given=given)
    assert pairs([slip], [last], [], check="continuations", min_gain=0.9)[0]


def test_checks_go_on_after_each_distinct_step_once():
    twin = solution("twin", WRONG, 0.0)
    rectified = [better(), better("again"), solution("t", REST, 1.0, parent="twin", given=LABEL)]
    found = list(step_ends(GROUP, [BAD, solution("good", RIGHT, 1.0), twin], rectified, steps="task", room=10))
    prefixes = [(row.rollout_ids[0], text_of(row.token_ids)) for row in found if isinstance(row, Prefix)]
    assert prefixes == [("win", "Step 1: 8 * 9 = 72\n"), ("bad", "Step 1: 8 * 9 = 62\n")]
    reasons = {row.rollout_id: row.reason for row in found if isinstance(row, LeftOut)}
    assert reasons == {"again": "duplicate", "good": "correct", "t": "duplicate", "twin": "duplicate"}
    full = list(step_ends(GROUP, [BAD], [better()], steps="task", room=GROUP.context_length))
    assert {row.reason for row in full} == {"prefix_too_long"}
