"""Attempts after a correction turn: what is sampled, what each is rewarded with, and what is imitated."""

from collections import Counter

import pytest

from curate.solutions import EOS, PROBLEM, PROMPT_IDS, RENDERER, RIGHT, text_of
from reasonrun.curate.attempts import AttemptSettings, TurnRewards, attempts, paired_rows, trace_rows, turn_rewards
from reasonrun.curate.group import Group
from reasonrun.engines.scripted import Scripted
from reasonrun.errors import RecipeError
from reasonrun.on_policy import Live
from reasonrun.records import Graded, LeftOut, Message, Rollout, Sampling, Score, Segment
from reasonrun.tasks.arith import Arith

# What the template writes after an answer that ended by itself.
AGAIN = RENDERER.next_turn((), (EOS,), [Message(role="user", content="again")])[1:]
SAID = RENDERER.encode(RIGHT)


def attempt(name, value, parent=None, *, ids=(*SAID[:3], EOS), logps=True, given=()):
    """One graded attempt; a later one stands after its parent's own tokens."""
    before = () if parent is None else (*parent.rollout.prompt_ids, *parent.rollout.completion_ids, *AGAIN)
    segments = [Segment(token_ids=tuple(ids), src="model", loss=True)]
    if given:
        segments.insert(0, Segment(token_ids=tuple(given), src="prompt", loss=False))
    rollout = Rollout(
        id=name,
        problem_id="p",
        index=0,
        parent_id=None if parent is None else parent.rollout.id,
        kind="plain" if parent is None else "turn",
        messages=(),
        prompt_ids=before or PROMPT_IDS,
        segments=tuple(segments),
        text=text_of(ids),
        finish_reason="stop",
        logps=tuple(-0.25 for _ in ids) if logps else None,
        policy="w",
        sampling=Sampling(),
        seed=0,
    )
    reason = {None: "crash", 1.0: "correct"}.get(value, "wrong")
    return Graded(rollout=rollout, score=Score(value=value, reason=reason, grader="number-1"))


def chain(*values, name="c", **options):
    """Attempts one after another with these verdicts."""
    made = []
    for number, value in enumerate(values, start=1):
        made.append(attempt(f"{name}{number}", value, made[-1] if made else None, **options))
    return made


def rewarded(graded, **settings):
    state = {"p": 7}
    after, rows = turn_rewards(state, graded, TurnRewards(**settings))
    assert after == state
    return {row.rollout_id: row for row in rows}


@pytest.mark.parametrize(("first", "second", "expected"), [(1, 1, 1), (0, 1, 11), (1, 0, -10), (0, 0, 0)])
def test_the_bonus_is_for_a_changed_verdict_and_falls_on_the_second_attempt_alone(first, second, expected):
    rows = rewarded(chain(float(first), float(second)), bonus=10.0)
    assert (rows["c1"].reward, rows["c2"].reward) == (first, expected)


def test_the_first_attempts_row_does_not_know_the_second_verdict():
    stage1 = {"rewarded": (2,), "kl_coefs": (0.1, 0.01)}
    for settings in ({"bonus": 10.0}, stage1):
        for first in (0.0, 1.0):
            after_right, after_wrong = (rewarded(chain(first, second), **settings)["c1"] for second in (1.0, 0.0))
            assert after_right == after_wrong


def test_stage_1_rewards_the_second_attempt_and_only_holds_the_first():
    for first in (0.0, 1.0):
        for second in (0.0, 1.0):
            rows = rewarded(chain(first, second), rewarded=(2,), kl_coefs=(0.1, 0.01))
            assert [(row.reward, row.kl_coef, row.attempt) for row in rows.values()] == [(0, 0.1, 1), (second, 0.01, 2)]


def test_the_last_verdict_can_be_credited_to_all_attempts():
    for values in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)):
        rows = rewarded(chain(*values), rewarded=(1, 2, 3), learnt=(1, 2, 3), credit="last")
        assert [row.reward for row in rows.values()] == [values[-1]] * len(values)
    two = [*chain(1.0, 0.0, name="a"), *chain(0.0, 1.0, name="b")]
    assert {id: row.reward for id, row in rewarded(two, credit="last").items()} == {"a1": 0, "a2": 0, "b1": 1, "b2": 1}


def test_a_third_attempt_is_compared_with_the_second():
    every = {"rewarded": (1, 2, 3), "learnt": (1, 2, 3), "bonus": 10.0}
    rows = rewarded(chain(1.0, 0.0, 1.0), **every)
    assert [row.reward for row in rows.values()] == [1, -10, 11]
    assert [row.attempt for row in rows.values()] == [1, 2, 3]
    # The bonus is part of a reward: an attempt that is only held to the reference gets neither.
    held = rewarded(chain(1.0, 0.0, 1.0), **{**every, "rewarded": (3,)})
    assert [row.reward for row in held.values()] == [0, 0, 11]


def test_attempts_that_are_not_to_be_learnt_give_no_row_and_are_still_compared_with():
    rows = rewarded(chain(0.0, 1.0), learnt=(2,), bonus=10.0)
    assert {id: row.reward for id, row in rows.items()} == {"c2": 11}


def test_an_attempt_without_log_probabilities_gives_no_row_and_is_still_compared_with():
    first = attempt("a", 0.0, logps=False)
    rows = rewarded([first, attempt("b", 1.0, first)], bonus=10.0)
    assert {id: (row.reward, row.attempt) for id, row in rows.items()} == {"b": (11, 2)}


def test_the_last_coefficient_is_that_of_all_further_attempts():
    every = {"rewarded": (1, 2, 3), "learnt": (1, 2, 3)}
    for given, expected in (((0.5,), [0.5] * 3), ((0.5, 0.2), [0.5, 0.2, 0.2]), ((0.5, 0.2, 0.1), [0.5, 0.2, 0.1])):
        rows = rewarded(chain(1.0, 1.0, 1.0), kl_coefs=given, **every)
        assert [row.kl_coef for row in rows.values()] == expected
    for wrong in ((), (0.1, -0.1)):
        with pytest.raises(ValueError, match="kl_coefs needs a coefficient for each attempt"):
            TurnRewards(kl_coefs=wrong)


def test_only_what_was_sampled_in_a_turn_carries_its_loss():
    first = attempt("a", 0.0, ids=(*SAID[:5], EOS), given=SAID[:2])
    second = attempt("b", 1.0, first, ids=(*SAID[5:9], EOS))
    rows = rewarded([first, second])
    learnt = {id: [i for s in row.segments for i in s.token_ids if s.loss] for id, row in rows.items()}
    assert learnt == {"a": [*SAID[:5], EOS], "b": [*SAID[5:9], EOS]}
    assert all(len(rows[id].sampled_logps) == len(ids) for id, ids in learnt.items())
    # What was put in the model's mouth and the whole first attempt stand before it, as they were.
    quiet = {id: [i for s in row.segments for i in s.token_ids if not s.loss] for id, row in rows.items()}
    assert quiet == {"a": [*PROMPT_IDS, *SAID[:2]], "b": [*PROMPT_IDS, *SAID[:2], *SAID[:5], EOS, *AGAIN]}
    assert [segment.loss for segment in rows["b"].segments] == [False, True]
    assert {row.group for row in rows.values()} == {"p"}


# -- drawing -------------------------------------------------------------------------------------------------------------


class Judged(Arith):
    """A task whose verifier says one thing whatever it reads."""

    verdict = 1.0

    def grader(self):
        return self

    def grade_many(self, items):
        return [Score(value=self.verdict, reason="said", grader="said-1") for _ in items]


def live_of(num_problems=4, *, verdict=None, given=None, max_length=700, group_size=3, **settings):
    task = (Arith if verdict is None else Judged)(Arith.Settings(num_train=num_problems, num_dev=1, num_test=1))
    task.verdict = verdict
    problems = {problem.id: problem for problem in task.problems("train")}
    engine = Scripted(Scripted.Settings(truncated=0.0, unanswered=0.0, **settings))
    engine.attach(task, problems.__getitem__, RENDERER)
    live = Live(
        engine=engine,
        renderer=RENDERER,
        task=task,
        problems=problems,
        group_size=group_size,
        max_length=max_length,
        given=given,
    )
    live.begin("w", ("seed", 1))
    return live, list(problems.values())


def test_the_second_prompt_is_the_question_the_whole_first_attempt_and_the_correction_turn():
    live, problems = live_of()
    graded = attempts(live, problems, AttemptSettings())
    first, second = graded[:12], graded[12:]
    assert Counter(row.rollout.problem_id for row in first) == {problem.id: 3 for problem in problems}
    assert [row.rollout.parent_id for row in second] == [row.rollout.id for row in first]
    for one, two in zip(first, second, strict=True):
        before = (*one.rollout.prompt_ids, *one.rollout.completion_ids)
        assert two.rollout.prompt_ids[: len(before)] == before
        (question,) = (problem.messages[0].content for problem in problems if problem.id == one.rollout.problem_id)
        # The carried model's template, written out.
        assert text_of(two.rollout.prompt_ids) == (
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{one.rollout.text}<|im_end|>\n"
            f"<|im_start|>user\n{live.task.correction()}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert two.rollout.logps is not None and len(two.rollout.logps) == len(two.rollout.completion_ids)


def test_what_is_said_after_a_right_attempt_is_what_is_said_after_a_wrong_one():
    seen = []
    for verdict in (1.0, 0.0):
        live, problems = live_of(verdict=verdict)
        graded = attempts(live, problems, AttemptSettings(num_attempts=3, max_new_tokens=100))
        assert {row.correct for row in graded} == {verdict == 1.0}
        seen.append([row.rollout for row in graded])
    assert len(seen[0]) == 36 and seen[0] == seen[1]


def test_another_optimizer_step_draws_other_rollouts_and_the_same_step_the_same():
    live, problems = live_of()
    drawn = []
    for number in (1, 1, 2):
        live.begin("w", ("seed", number))
        drawn.append([row.rollout.id for row in attempts(live, problems, AttemptSettings())])
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])


def test_offline_first_attempts_are_gone_on_from_and_not_learnt():
    live, problems = live_of()
    before = attempts(live, problems, AttemptSettings(num_attempts=1))
    given = {problem.id: [r.rollout for r in before if r.rollout.problem_id == problem.id] for problem in problems}
    live, problems = live_of(given=given, group_size=2)
    live.begin("later", ("seed", 9))
    graded = attempts(live, problems, AttemptSettings(offline_share=1.0))
    kept = [rollout.id for problem in problems for rollout in given[problem.id][:2]]
    assert [row.rollout.id for row in graded[:8]] == kept
    assert [row.rollout.parent_id for row in graded[8:]] == kept
    assert {row.rollout.policy for row in graded[8:]} == {"later"}
    _, rows = turn_rewards({}, graded, TurnRewards())
    assert [row.rollout_id for row in rows] == [row.rollout.id for row in graded[8:]]
    assert {row.attempt for row in rows} == {2}


def test_which_problems_are_offline_does_not_depend_on_how_they_are_shared_out():
    live, problems = live_of(12)
    before = attempts(live, problems, AttemptSettings(num_attempts=1))
    given = {problem.id: [r.rollout for r in before if r.rollout.problem_id == problem.id] for problem in problems}

    def drawn(*shares):
        live, _ = live_of(12, given=given)
        live.begin("later", ("seed", 9))
        settings = AttemptSettings(offline_share=0.5, num_attempts=1)
        return {row.rollout.id for share in shares for row in attempts(live, share, settings)}

    whole = drawn(problems)
    offline = {rollout.id for rollouts in given.values() for rollout in rollouts} & whole
    assert 0 < len(offline) < len(whole)
    assert drawn(problems[0::2], problems[1::2]) == whole


def test_a_conversation_that_may_not_fit_is_refused_before_anything_is_sampled():
    live, problems = live_of()
    longest = max(len(RENDERER.render(problem.messages)) for problem in problems)
    bridge = len(RENDERER.next_turn((), (), [Message(role="user", content=live.task.correction())]))
    needed = longest + bridge + 2 * 64
    settings = AttemptSettings(max_new_tokens=64)
    assert len(attempts(live_of(max_length=needed)[0], problems, settings)) == 24
    short, _ = live_of(max_length=needed - 1)
    with pytest.raises(RecipeError, match=f"2 turns may need {needed} tokens"):
        attempts(short, problems, settings)
    assert short._engine.num_units == 0
    assert len(attempts(short, problems, settings.model_copy(update={"num_attempts": 1}))) == 12
    # A longer max_length than the model's context does not help.
    with pytest.raises(RecipeError, match=f"allow {RENDERER.context_length}"):
        attempts(live_of(max_length=10**6)[0], problems, AttemptSettings(max_new_tokens=RENDERER.context_length))


@pytest.mark.parametrize("changed", [{"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}])
def test_samples_that_are_not_the_policys_own_are_refused(changed):
    live, problems = live_of()
    with pytest.raises(RecipeError, match="drawn at temperature 1"):
        live.sample(problems, sampling=Sampling(max_new_tokens=64, **changed))


# -- imitating -----------------------------------------------------------------------------------------------------------

GROUP = Group(
    problem=PROBLEM,
    prompt=lambda style: None,
    gold=lambda: None,
    next_turn=lambda rollout, said: RENDERER.next_turn(
        rollout.prompt_ids, rollout.completion_ids, [Message(role="user", content=said)]
    ),
)


def sorted_out(outcomes):
    """Examples, and the reasons of what was left out; a rollout is left out once."""
    outcomes = list(outcomes)
    left_out = [row for row in outcomes if isinstance(row, LeftOut)]
    reasons = {row.rollout_id: row.reason for row in left_out}
    assert len(reasons) == len(left_out)
    return [row for row in outcomes if not isinstance(row, LeftOut)], reasons


def by_loss(example, loss):
    return tuple(i for segment in example.segments for i in segment.token_ids if segment.loss is loss)


def traces():
    pairs = {"fixed": (0.0, 1.0), "kept": (1.0, 1.0), "spoilt": (1.0, 0.0), "lost": (0.0, 0.0)}
    pairs |= {"crash": (0.0, None), "unknown": (None, 1.0)}
    made = [chain(*values, name=name) for name, values in pairs.items()]
    return [pair[0] for pair in made], [pair[1] for pair in made]


def test_second_attempts_that_turned_a_wrong_one_right_are_imitated():
    first, second = traces()
    (example,), reasons = sorted_out(trace_rows(GROUP, first, second, keep_right=False))
    assert (example.rollout_ids, example.source) == (("fixed2",), "corrected")
    assert reasons == {row.rollout.id: "evidence" for row in first} | {
        "kept2": "right_before",
        "spoilt2": "wrong",
        "lost2": "wrong",
        "crash2": "ungraded: crash",
        "unknown2": "first attempt ungraded: crash",
    }
    # Every row is used or left out, none is both.
    assert reasons.keys() | {"fixed2"} == {row.rollout.id for row in (*first, *second)}
    assert by_loss(example, True) == second[0].rollout.completion_ids
    assert by_loss(example, False) == (*PROMPT_IDS, *first[0].rollout.completion_ids, *AGAIN)


def test_right_attempts_that_stayed_right_are_imitated_on_request():
    first, second = traces()
    examples, reasons = sorted_out(trace_rows(GROUP, first, second, keep_right=True))
    assert {example.rollout_ids: example.source for example in examples} == {
        ("fixed2",): "corrected",
        ("kept2",): "kept_right",
    }
    assert reasons.keys() == {row.rollout.id for row in (*first, *second)} - {"fixed2", "kept2"}


def samples(*values):
    """Independent samples of one problem, each with a text of its own."""
    return [attempt(f"s{i}", value, ids=(*SAID[: i + 1], EOS)) for i, value in enumerate(values)]


def test_a_right_sample_is_imitated_as_if_it_corrected_a_wrong_one():
    rows = samples(1.0, 0.0, 1.0, None)
    examples, reasons = sorted_out(paired_rows(GROUP, rows, said="again", keep_right=False))
    assert {example.rollout_ids: example.source for example in examples} == {
        ("s1", "s0"): "corrected",
        ("s1", "s2"): "corrected",
    }
    assert reasons == {"s3": "ungraded: crash"}
    for example in examples:
        wrong, right = (next(row.rollout for row in rows if row.rollout.id == id) for id in example.rollout_ids)
        assert by_loss(example, True) == right.completion_ids
        assert by_loss(example, False) == (*PROMPT_IDS, *wrong.completion_ids, *AGAIN)


def test_right_samples_are_paired_with_other_right_ones_on_request():
    examples, reasons = sorted_out(paired_rows(GROUP, samples(1.0, 0.0, 1.0), said="again", keep_right=True))
    sources = {example.rollout_ids: example.source for example in examples}
    assert sources == {
        ("s1", "s0"): "corrected",
        ("s1", "s2"): "corrected",
        ("s0", "s2"): "kept_right",
        ("s2", "s0"): "kept_right",
    }
    assert reasons == {}
    alone, reasons = sorted_out(paired_rows(GROUP, samples(1.0), said="again", keep_right=True))
    assert (alone, reasons) == ([], {"s0": "nothing_to_pair_with"})


def test_at_most_cap_pairs_of_a_kind_are_chosen_by_the_seed_and_the_rest_is_accounted_for():
    rows = samples(*[1.0] * 4, *[0.0] * 4)

    def chosen(**options):
        examples, reasons = sorted_out(paired_rows(GROUP, rows, said="again", cap=2, **options))
        pairs = [example.rollout_ids for example in examples]
        used = {id for pair in pairs for id in pair}
        assert reasons.keys() == {row.rollout.id for row in rows} - used and set(reasons.values()) == {"over_cap"}
        return pairs, Counter(example.source for example in examples)

    pairs, counts = chosen(keep_right=False)
    assert counts == {"corrected": 2} and chosen(keep_right=False)[0] == pairs
    assert any(chosen(keep_right=False, seed=seed)[0] != pairs for seed in (1, 2, 3))
    assert chosen(keep_right=True)[1] == {"corrected": 2, "kept_right": 2}


def test_samples_that_are_all_wrong_have_nothing_to_pair_with():
    examples, reasons = sorted_out(paired_rows(GROUP, samples(0.0, 0.0), said="again", keep_right=True))
    assert (examples, reasons) == ([], {"s0": "nothing_to_pair_with", "s1": "nothing_to_pair_with"})
