"""The generated judge task: computed gold scores, judgements that can be read back, questions about judgements."""

import pytest

from reasonrun.chains import Step, judgement_text, rubric_score
from reasonrun.errors import RecipeError
from reasonrun.grading.judgement import read_decision
from reasonrun.models import resolve
from reasonrun.recipe_fields import ModelSettings
from reasonrun.rendering import Renderer
from reasonrun.tasks.arith_judge import ArithJudge

SIZES = {"num_train": 120, "num_dev": 60, "num_test": 60}


def task(**fields):
    return ArithJudge(ArithJudge.Settings(**{**SIZES, **fields}))


def steps_of(problem):
    return [Step(left=a, operator=op, right=b, result=c) for a, op, b, c in problem.meta["steps"]]


# (right steps, steps) -> 1 + floor(4 x share), by hand
@pytest.mark.parametrize(
    ("right", "total", "score"),
    [(0, 2, 1), (1, 2, 3), (2, 2, 5), (1, 3, 2), (2, 3, 3), (3, 3, 5), (0, 4, 1), (1, 4, 2), (2, 4, 3), (3, 4, 4)],
)
def test_the_score_is_the_share_of_right_steps(right, total, score):
    steps = [Step(left=1, operator="+", right=1, result=2 if place < right else 3) for place in range(total)]
    assert rubric_score(steps) == score


def test_the_prompt_shows_the_solution_and_the_gold_score_is_that_of_its_steps():
    problems = task().problems("train")
    assert len({problem.id for problem in problems}) == 120
    for problem in problems:
        steps = steps_of(problem)
        assert problem.reference == str(rubric_score(steps))
        (asked,) = task().messages(problem, "plain")
        assert all(f"Step {n}: {step}\n" in asked.content for n, step in enumerate(steps, start=1))
        assert str(problem.meta["question"]) in asked.content
    assert {problem.reference for problem in problems} == {"1", "2", "3", "4", "5"}


def test_no_two_splits_share_a_calculation():
    chains = {
        split: {str([step[:3] for step in problem.meta["steps"][:1]]) + problem.messages[0].content for problem in rows}
        for split, rows in ((split, task().problems(split)) for split in ("train", "dev", "test"))
    }
    assert not chains["train"] & chains["test"] and not chains["train"] & chains["dev"]
    questions = {split: {p.meta["question"] for p in task().problems(split)} for split in ("train", "test")}
    assert not questions["train"] & questions["test"]


def test_the_gold_judgement_ends_with_the_gold_score_and_the_score_alone_begins_with_the_marker():
    for problem in task().problems("dev"):
        for text in (task().solution(problem), task().direct_answer(problem)):
            assert read_decision(text, "score") == (problem.reference, "read")
            assert task().grader().grade(problem, text, truncated=False).correct
        assert task().direct_answer(problem).startswith(task().opening("score_only"))
    assert task().opening("plain") == ""


def test_the_carried_models_own_words_are_unchanged():
    """The model was trained on this very prompt: its ids are those of the text, and the template's own."""
    problem = task().problems("dev")[0]
    renderer = Renderer.load(resolve(ModelSettings(name="tiny")).path)
    content = problem.messages[0].content
    assert content.startswith(
        "###Task: Check every step of the solution, then give a score from 1 to 5 after [RESULT]."
    )
    assert content.endswith("###Feedback:")
    expected = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.decode(renderer.render(problem.messages), skip_special=False) == expected


def test_a_question_about_a_judgement_puts_its_own_calculations_to_the_judge():
    problem = task().problems("dev")[0]
    text = "Step 1: 17 * 7 = 29 , I get 19 wrong\nStep 2: 29 + 5 = 34 , I get 34 right\n[RESULT] 3"
    (asked,) = task().question_about(problem, text)
    assert "###Solution:\nStep 1: 17 * 7 = 19\nStep 2: 29 + 5 = 34\nAnswer: 34\n###Rubric" in asked.content
    assert "[RESULT] 3" not in asked.content
    (unreadable,) = task().question_about(problem, "I like it. [RESULT] 5")
    assert "###Solution:\nI like it. [RESULT] 5\n###Rubric" in unreadable.content


def test_a_judgement_of_right_steps_says_so():
    steps = [Step(left=17, operator="*", right=7, result=19), Step(left=19, operator="+", right=5, result=25)]
    assert judgement_text(steps) == (
        "Step 1: 17 * 7 = 19 , I get 19 right\nStep 2: 19 + 5 = 25 , I get 24 wrong\n[RESULT] 3"
    )


@pytest.mark.parametrize("style", ["plain", "score_only"])
def test_the_script_answers_right_or_wrong_on_purpose(style):
    for seed, problem in enumerate(task().problems("dev")):
        opening = task().opening(style)
        for correct in (True, False):
            said = opening + task().scripted_answer(problem, correct=correct, seed=seed, prefix=opening)
            verdict = task().grader().grade(problem, said, truncated=False)
            assert verdict.correct is correct and verdict.answer


def test_unknown_styles_and_splits_are_refused():
    with pytest.raises(RecipeError, match="plain, score_only"):
        task().messages(task().problems("dev")[0], "few_shot")
    with pytest.raises(RecipeError, match="train, dev, test"):
        task().problems("validation")
