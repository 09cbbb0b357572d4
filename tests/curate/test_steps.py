"""Steps begin where a reader sees them begin, and cuts fall between tokens or not at all."""

import pytest

from curate.solutions import EOS, GROUP, RENDERER, RIGHT, solution, text_of
from reasonrun.curate.steps import labelled, lines, on_tokens


def test_labels_are_consecutive_from_one_or_the_text_is_not_cut():
    assert labelled("Let us see.\nStep 1: a\n**Step 2:** b") == [(12, 19), (22, 33)]
    assert labelled("no step here, Step 1: in mid-line") == "no_labels"
    assert labelled("Step 1: a\nStep 3: b") == "labels_not_consecutive"
    assert labelled("Step 2: b") == "labels_not_consecutive"
    assert labelled("Step 1: a\nStep 1: again") == "labels_not_consecutive"


def test_lines_are_the_ones_with_something_on_them():
    assert lines("a\n\n  b\n") == [(0, 0), (3, 3)]
    assert lines(" \n\n") == "no_lines"


def test_steps_of_a_completion_are_its_own_tokens():
    row = solution("r", RIGHT, 1.0).rollout
    steps = GROUP.steps(row, "task")
    ids = row.completion_ids
    assert len(steps) == 3 and steps.num_tokens == len(ids)
    texts = [text_of(ids[steps.bodies[n] : steps.end(n + 1)]) for n in range(3)]
    assert texts == [" 8 * 9 = 72\n", " 72 + 3 = 75\n", " 75" + text_of((EOS,))]
    assert text_of(ids[: steps.bodies[1]]) == "Step 1: 8 * 9 = 72\nStep 2:"
    assert steps.beginning_at(steps.bodies[1]) == 2 and steps.beginning_at(steps.starts[2]) == 3
    assert steps.beginning_at(2) is None
    assert [steps.holding(char) for char in (0, 18, 19, 39, 45)] == [1, 1, 2, 3, 3]


def test_without_the_tasks_own_steps_the_answer_belongs_to_the_last_label():
    row = solution("r", RIGHT, 1.0).rollout
    steps = GROUP.steps(row, "labels")
    assert len(steps) == 2
    assert text_of(row.completion_ids[steps.bodies[1] :]) == " 72 + 3 = 75\nAnswer: 75" + text_of((EOS,))


@pytest.mark.parametrize("text", ["é Step 1: 日本語 x", "Step 1: plain", "🎉\nStep 1: a\nStep 2: b"])
def test_places_count_characters_whatever_tokens_they_take(text):
    ids = RENDERER.encode(text)
    decoded, places = RENDERER.decode_with_places((*ids, EOS))
    assert decoded == RENDERER.decode(ids) == text
    assert len(places) == len(ids) + 2 and places[-1] == len(text)
    for number in range(len(ids)):
        whole = RENDERER.decode(ids[:number])
        if "\ufffd" not in whole:
            assert places[number] == len(whole)


def test_a_token_across_a_border_is_not_split():
    text = "a\nStep 1: b"
    assert on_tokens(text, (0, 1, 2, 6, 8, 9, 11), [(2, 9)]).bodies == (5,)
    assert on_tokens(text, (0, 4, 11), [(2, 9)]) == "no_token_boundary"
    blanks = on_tokens("Step 1:\nb", (0, 8, 9), [(0, 7)])
    assert blanks.bodies == (1,)  # the token of the label holds the line break, too: nothing of the step's text is lost
