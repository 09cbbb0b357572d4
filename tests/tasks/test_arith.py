"""The arith task: exact arithmetic, disjoint splits, formats that can be read back."""

import random

import pytest
from pydantic import ValidationError

from reasonrun.chains import (
    Chain,
    Step,
    chain_of,
    draw_chain,
    judgement_text,
    parse_steps,
    rubric_score,
    solution_text,
    solve_with_mistakes,
)
from reasonrun.errors import RecipeError
from reasonrun.randomness import derive_seed
from reasonrun.records import digest
from reasonrun.tasks.arith import Arith

CHAIN = Chain(start=17, operations=(("*", 7), ("+", 5), ("-", 8)))


def task(**fields):
    return Arith(Arith.Settings(**{"num_train": 50, "num_dev": 30, "num_test": 30, **fields}))


def test_steps_keep_the_last_two_digits():
    # 17 * 7 = 119 -> 19; 19 + 5 = 24; 24 - 8 = 16, by hand
    assert [step.result for step in CHAIN.solve()] == [19, 24, 16]
    assert solution_text(CHAIN.solve()) == "Step 1: 17 * 7 = 19\nStep 2: 19 + 5 = 24\nStep 3: 24 - 8 = 16\nAnswer: 16"


def test_a_mistake_is_carried_on_and_only_its_own_step_is_wrong():
    steps = solve_with_mistakes(CHAIN, frozenset({0}), random.Random(3))
    assert [step.correct for step in steps] == [False, True, True]
    assert steps[1].left == steps[0].result


def test_rubric_score_is_one_plus_four_times_the_share_of_right_steps():
    right, wrong = Step(left=2, operator="*", right=3, result=6), Step(left=2, operator="*", right=3, result=7)
    assert [rubric_score(steps) for steps in ([wrong], [right, wrong], [right, right, wrong], [right])] == [1, 3, 3, 5]


def test_judgement_recomputes_each_step():
    steps = solve_with_mistakes(CHAIN, frozenset({0}), random.Random(3))
    lines = judgement_text(steps).split("\n")
    assert lines[0] == f"Step 1: 17 * 7 = {steps[0].result} , I get 19 wrong"
    assert lines[1].endswith(" right")
    assert lines[-1] == "[RESULT] 3"  # 1 + floor(4 * 2 / 3)


def test_parse_steps_reads_its_own_text_and_refuses_others():
    assert parse_steps(solution_text(CHAIN.solve())) == CHAIN.solve()
    assert parse_steps("Step 2: 1 + 1 = 2\nAnswer: 2") is None
    assert parse_steps("Answer: 2") is None
    assert parse_steps("Step 1: 1 + 1 = 2") is None


def test_splits_are_disjoint_and_reproducible():
    one, again = task(num_train=400, num_dev=200, num_test=200), task(num_train=400, num_dev=200, num_test=200)
    chains = {}
    for split in ("train", "dev", "test"):
        problems = one.problems(split)
        assert [p.id for p in problems] == [p.id for p in again.problems(split)]
        chains[split] = {(p.meta["start"], str(p.meta["operations"])) for p in problems}
        assert len({p.id for p in problems}) == len(problems)
    assert not chains["train"] & chains["dev"] and not chains["train"] & chains["test"]
    assert not chains["dev"] & chains["test"]


def test_every_reference_passes_the_tasks_own_grader():
    for problem in task(multiplications=2).problems("dev"):
        right = task().scripted_answer(problem, correct=True, seed=0)
        assert task().grader().grade(problem, right, truncated=False).correct
        assert parse_steps(right) == chain_of(problem).solve()


def test_wrong_scripted_answers_are_wrong():
    for number, problem in enumerate(task().problems("dev")):
        wrong = task().scripted_answer(problem, correct=False, seed=number)
        assert not task().grader().grade(problem, wrong, truncated=False).correct


def test_the_hint_is_the_answer_and_nothing_else():
    for problem in task().problems("dev"):
        plain, hinted = (task().messages(problem, style)[-1].content for style in ("plain", "hinted"))
        assert hinted.startswith(plain)
        assert hinted[len(plain) :] == f" (The answer is {problem.reference}.)"


def test_few_shot_demonstrations_come_from_the_pretraining_split_and_end_with_the_question():
    problem = task().problems("dev")[0]
    turns = task().messages(problem, "few_shot")
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert turns[-1] == problem.messages[-1]
    assert all(step.correct for turn in turns[1::2] for step in parse_steps(turn.content))


def test_impossible_settings_and_unknown_names_say_what_is_allowed():
    with pytest.raises(ValidationError, match=r"multiplications.*max_steps 2"):
        task(multiplications=3, max_steps=2)
    with pytest.raises(RecipeError, match="train, dev, test"):
        task().problems("validation")
    with pytest.raises(RecipeError, match="direct, few_shot, hinted, plain"):
        task().messages(task().problems("dev")[0], "poem")
    with pytest.raises(RecipeError, match="different problems exist in split dev"):
        task(min_steps=1, max_steps=1, num_dev=3000).problems("dev")


def test_sums_and_differences_never_wrap():
    rng = random.Random(0)
    for _ in range(300):
        for step in draw_chain(rng, min_steps=2, max_steps=4, multiplications=1).solve():
            if step.operator == "+":
                assert step.result == step.left + step.right
            if step.operator == "-":
                assert step.result == step.left - step.right


def test_the_prompts_are_the_ones_that_the_model_was_trained_on():
    # Golden: a change of words needs a new prompt version and a new carried model (decision note 0001).
    problems = task().problems("dev")
    styles = ("plain", "few_shot", "hinted", "direct")
    text = [[m.content for m in task().messages(p, style)] for p in problems for style in styles]
    assert (Arith.prompt_version, digest(text)) == (1, GOLDEN)


GOLDEN = "b29564f1b90271511a4d8579ea64da63"


def test_seeds_of_names_are_stable():
    # The split of every published problem hangs on this function.
    assert derive_seed("arith-split", 17, "x") == derive_seed("arith-split", 17, "x")
    assert derive_seed("a", 1) != derive_seed("a", "1")
