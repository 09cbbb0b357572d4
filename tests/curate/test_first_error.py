"""First wrong steps: by the task's program, by success rates of continuations, by a model's verdict."""

from curate.solutions import GROUP, RIGHT, TASK, solution, text_of
from curate.solutions import PROBLEM as P
from reasonrun.curate.first_error import Search, probed_errors, probes, programmatic_errors, search
from reasonrun.records import LeftOut, Prefix

WRONG = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 76\nAnswer: 76"
HOW = {"steps": "task", "cap": 0, "room": 10}


def test_the_program_finds_the_first_step_that_is_not_right():
    def number(text):
        char = TASK.first_error(P, text)
        return char if isinstance(char, str) else text[char:].split("\n")[0]

    assert number(RIGHT) == "no_error"
    assert number(WRONG) == "Step 2: 72 + 3 = 76"
    assert number(RIGHT.replace("8 * 9", "9 * 8")) == "no_error"  # turned round
    assert number(RIGHT.replace("8 * 9 = 72", "8 * 8 = 64")) == "Step 1: 8 * 8 = 64"  # true, but not the question
    assert number(RIGHT.replace("Answer: 75", "Answer: 57")) == "Answer: 57"
    assert number("Step 1: 8 * 9 = 72\nAnswer: 72") == "Answer: 72"  # too early
    assert number("Step 1: 8 * 9 = 72\nAnswer: 75") == "Answer: 75"  # the right number, out of nowhere
    assert number(RIGHT.replace("Answer", "Step 3: 75 + 1 = 76\nAnswer")) == "Step 3: 75 + 1 = 76"
    assert number("nothing") == "no_labels"


def test_programmatic_prefixes_end_with_the_label_of_the_wrong_step():
    rows = [solution("good", RIGHT, 1.0), solution("bad", WRONG, 0.0), solution("mute", "?", 0.0, reason="no_answer")]
    found = list(programmatic_errors(GROUP, rows, **HOW))
    assert found[0] == LeftOut(rollout_id="good", reason="correct")
    assert isinstance(found[1], Prefix)
    assert text_of(found[1].token_ids) == "Step 1: 8 * 9 = 72\nStep 2:"
    assert (found[1].num_steps, found[1].rollout_ids) == (1, ("bad",))
    assert not any(segment.loss for segment in found[1].segments)
    assert found[2] == LeftOut(rollout_id="mute", reason="no_labels")


def test_caps_and_prefixes_that_leave_no_room():
    rows = [solution("a", WRONG, 0.0), solution("b", WRONG, 0.0)]
    found = list(programmatic_errors(GROUP, rows, **{**HOW, "cap": 1}))
    assert isinstance(found[0], Prefix) and found[1] == LeftOut(rollout_id="b", reason="over_cap")
    found = list(programmatic_errors(GROUP, rows, **{**HOW, "room": GROUP.context_length}))
    assert [row.reason for row in found] == ["prefix_too_long"] * 2


def test_search_over_all_prefixes_by_hand():
    assert search(4, {}, binary=False) == Search(wanted=(0,))
    assert search(4, {0: 0.0}, binary=False) == Search(outcome="never_solved")
    assert search(4, {0: 0.5}, binary=False) == Search(wanted=(1, 2, 3))
    # v = 0.5, 0.4, 0, 0.1, and 0 for the whole: the fall to 0 comes first with step 2, and again with step 4
    assert search(4, {0: 0.5, 1: 0.4, 2: 0.0, 3: 0.1}, binary=False) == Search(outcome=2)
    assert search(4, {0: 0.5, 1: 0.4, 2: 0.2, 3: 0.1}, binary=False) == Search(outcome=4)
    assert search(1, {0: 0.5}, binary=False) == Search(outcome=1)


def test_binary_search_halves_and_ends_where_success_falls_to_zero():
    for k in range(1, 9):
        rates, num_probes = {}, 0
        while (state := search(8, rates, binary=True)).wanted:
            rates.update({j: 0.5 if j < k else 0.0 for j in state.wanted})
            num_probes += 1
        assert state.outcome == k
        assert num_probes <= 4  # from scratch, and log2(8) halvings


def test_probes_that_nobody_could_grade_end_the_search():
    """Else the same prefix would be asked for again and again."""
    assert search(4, {0: None}, binary=False) == Search(outcome="ungraded_probes")
    bad = solution("bad", WRONG, 0.0)
    lost = [solution(f"s{n}", RIGHT, None, parent="bad", reason="deadline") for n in range(2)]
    for binary in (False, True):
        assert not [row for row in probes(GROUP, [bad], lost, binary=binary, **HOW) if isinstance(row, Prefix)]
        first = next(probed_errors(GROUP, [bad], lost, binary=binary, **HOW))
        assert first == LeftOut(rollout_id="bad", reason="ungraded_probes")


def test_the_last_room_of_the_context_is_used():
    bad = solution("bad", WRONG, 0.0)
    (prefix,) = programmatic_errors(GROUP, [bad], **HOW)
    exact = GROUP.context_length - len(bad.rollout.prompt_ids) - len(prefix.token_ids)
    assert isinstance(next(programmatic_errors(GROUP, [bad], **{**HOW, "room": exact})), Prefix)
    (left_out,) = programmatic_errors(GROUP, [bad], **{**HOW, "room": exact + 1})
    assert left_out.reason == "prefix_too_long"


def test_probes_are_prefixes_before_labels_and_their_success_places_the_error():
    bad = solution("bad", WRONG, 0.0)
    first = [row for row in probes(GROUP, [bad], binary=False, **HOW) if isinstance(row, Prefix)]
    assert [text_of(row.token_ids) for row in first] == [""]
    scratch = [solution(f"s{n}", RIGHT, float(n == 0), parent="bad") for n in range(2)]
    second = [row for row in probes(GROUP, [bad], scratch, binary=False, **HOW) if isinstance(row, Prefix)]
    begun = ["Step 1: 8 * 9 = 72\n", "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 76\n"]
    assert [text_of(row.token_ids) for row in second] == begun
    wave = [
        solution("c1", "Step 2: 72 + 3 = 75\nAnswer: 75", 1.0, parent="bad", given=begun[0]),
        solution("c2", "Answer: 76", 0.0, parent="bad", given=begun[1]),
        solution("c3", "Answer: 75", 1.0, parent="another", given=begun[1]),
    ]
    found = list(probed_errors(GROUP, [bad], scratch, wave, binary=False, **HOW))
    assert text_of(found[0].token_ids) == "Step 1: 8 * 9 = 72\nStep 2:"
    assert {row.reason for row in found[1:]} == {"evidence"} and len(found) == 6
    never = [solution(f"s{n}", RIGHT, 0.0, parent="bad") for n in range(2)]
    assert next(probed_errors(GROUP, [bad], never, binary=False, **HOW)).reason == "never_solved"
