"""SCoRe and the baselines that imitate, on the scripted engine: stages, arms, findings, what is tested at the end."""

import json

import pytest
from typer.testing import CliRunner

from reasonrun.cli.main import app
from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import Finding, RecipeError
from reasonrun.methods.score import SCoRe
from reasonrun.recipe import RecipeProblems, load
from reasonrun.records import Rollout, SFTExample
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows

SMALL = ["task.num_train=16", "task.num_dev=8", "task.num_test=8", "preflight=off", "method.rl.batch_size=8"]
ARMS = ("score", "no_stage1", "no_bonus", "single_turn_rl", "naive_two_turn_rl")


def execute(directory, recipe="smoke_score", *overrides):
    small = SMALL if recipe == "smoke_score" else SMALL[:-1]
    return run(load(recipe, [*small, *overrides]), RunOptions(directory=directory), SilentProgress())


def stages(**settings):
    return list(SCoRe(SCoRe.Settings(**settings)).stages())


def test_the_stages_reward_and_hold_what_the_paper_says():
    first, second = stages()
    assert first.rewards.rewarded == (2,) and first.rewards.kl_coefs == (0.1, 0.01) and first.rewards.bonus == 0
    assert second.rewards.rewarded == (1, 2) and second.rewards.kl_coefs == (0.01,) and second.rewards.bonus == 10
    assert {stage.rewards.credit for stage in (first, second)} == {"own"}
    assert {stage.rewards.learnt for stage in (first, second)} == {(1, 2)}
    (naive,) = stages(arm="naive_two_turn_rl")
    assert naive.rewards.credit == "last" and naive.rewards.bonus == 0
    (single,) = stages(arm="single_turn_rl")
    assert single.num_attempts == 1
    assert stages(arm="no_bonus")[0] == first and stages(arm="no_bonus")[1].rewards.bonus == 0
    (no_stage1,) = stages(arm="no_stage1")
    assert no_stage1.rewards == second.rewards


def test_three_attempts_repeat_stage_one_with_all_earlier_ones_held():
    first, again, second = stages(num_attempts=3)
    assert first.num_attempts == 2 and again.num_attempts == 3 and second.num_attempts == 3
    assert again.rewards.rewarded == (3,) and again.rewards.kl_coefs == (0.1, 0.1, 0.01)
    assert len({first.name, again.name, second.name}) == 3


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("rounds", "steps"), [((1, 3), (2, 2)), ((2, 20), (2, 20)), ((1, 7), (2, 3))])
def test_every_arm_takes_as_many_optimizer_steps(arm, rounds, steps):
    lengths = {"stage1": dict(zip(("rounds", "steps"), rounds, strict=True))}
    lengths["stage2"] = dict(zip(("rounds", "steps"), steps, strict=True))
    total = sum(stage.length.rounds * stage.length.steps for stage in stages(arm=arm, **lengths))
    assert total == rounds[0] * rounds[1] + steps[0] * steps[1]


def test_all_arms_run_and_test_the_checkpoint_of_the_highest_training_reward_too(tmp_path):
    for arm in ARMS:
        outcome = execute(tmp_path / arm, "smoke_score", f"method.arm={arm}")
        rows = {row["step"]: row for row in outcome.rows if row["verb"] == "train"}
        assert sum(row["num_steps"] for row in rows.values()) == 7
        last_stage = next(iter(reversed(rows))).rpartition("-")[0]
        rewards = {step: row["mean_reward"] for step, row in rows.items() if step.startswith(last_stage)}
        best = outcome.result["nominees"]["by_training_reward"]["step"]
        assert rewards[best] == max(rewards.values())
        assert "correction" in outcome.result["test"]["by_training_reward"]


def test_offline_first_attempts_are_the_base_s_and_are_not_learnt(tmp_path):
    outcome = execute(tmp_path / "run", "smoke_score", "method.offline_share=1.0")
    (row,) = [row for row in outcome.rows if row["step"] == "stage2-001/train"]
    assert row["num_left_out"] == row["num_rollouts"] / 2
    folder = tmp_path / "run/steps"
    drawn = list(Rows.load(Rollout, [folder / "stage2-001/train/rollouts-00000.parquet"], tmp_path / "cache"))
    given = list(Rows.load(Rollout, [folder / "offline/rows-00000.parquet"], tmp_path / "cache"))
    assert {r.id for r in drawn if r.parent_id is None} <= {r.id for r in given}
    assert {row["step"]: row for row in outcome.rows}["stage1-001/train"]["num_left_out"] == 0


def test_problems_that_the_base_never_or_always_solves_can_be_left_out(tmp_path):
    outcome = execute(tmp_path / "run", "smoke_score", "method.filter.num_samples=4", "engine.spread=1.5")
    folder = tmp_path / "run/steps"
    tried = list(Rows.load(Rollout, [folder / "filter/sample/rows-00000.parquet"], tmp_path / "cache"))
    drawn = list(Rows.load(Rollout, [folder / "stage1-001/train/rollouts-00000.parquet"], tmp_path / "cache"))
    assert len(tried) == 64
    assert {r.problem_id for r in drawn} < {r.problem_id for r in tried}
    assert outcome.result["last"]["step"] == "stage2-002/train"


@pytest.mark.promise("G13", "stub verdicts")
def test_a_policy_that_repeats_itself_ends_with_a_finding_and_says_so_again(tmp_path):
    certain = ["engine.accuracy=1", "engine.spread=0", "engine.truncated=0", "engine.unanswered=0"]
    imitating = ["train", "smoke_correction_sft", *SMALL[:-1], *certain, "method.keep_right=true"]
    assert (
        "finding: second attempts repeat"
        in CliRunner().invoke(app, [*imitating, "--run", str(tmp_path / "sft")]).output
    )
    command = ["train", "smoke_score", *SMALL, *certain, "--run", str(tmp_path / "run")]
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 5
        assert "finding: second attempts repeat the first: 0.0%" in result.output
    assert "finding: second attempts" in CliRunner().invoke(app, ["status", str(tmp_path / "run")]).output
    as_json = CliRunner().invoke(app, [*command, "--json"])
    assert as_json.exit_code == 5
    assert json.loads(as_json.stdout)["result"]["findings"]


def test_a_model_that_cannot_be_asked_again_or_batches_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(RecipeProblems, match="group_size"):
        load("smoke_score", ["method.rl.batch_size=10"])
    with pytest.raises(RecipeProblems, match="expected gradient of zero"):
        load("smoke_score", ["method.rl.kl=k1_in_loss"])


def test_an_evaluation_with_fewer_attempts_than_the_method_s_is_refused():
    for recipe in ("smoke_score", "smoke_correction_sft"):
        with pytest.raises(RecipeProblems, match="2 attempts in a row"):
            load(recipe, ["evaluate.turns=1"])


def test_a_conversation_that_may_not_fit_is_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(RecipeError, match="2 turns may need"):
        execute(tmp_path / "run", "smoke_score", "method.max_new_tokens=220")
    with pytest.raises(RecipeError, match="2 turns may need"):
        execute(tmp_path / "sft", "smoke_correction_sft", "method.max_new_tokens=500")
    with pytest.raises(Finding, match="fewer than the 24"):
        execute(tmp_path / "few", "smoke_score", "method.rl.batch_size=96")
    for run_ in ("run", "sft", "few"):
        assert [path.name for path in (tmp_path / run_ / "steps").iterdir()] == ["problems"]


@pytest.mark.parametrize(("arm", "last"), [("score", "stage2-003"), ("no_stage1", "stage2-009")])
def test_more_rounds_of_the_last_stage_go_on_from_a_finished_run(arm, last, tmp_path):
    first = execute(tmp_path / "run", "smoke_score", f"method.arm={arm}")
    more = execute(tmp_path / "run", "smoke_score", f"method.arm={arm}", "method.stage2.rounds=3")
    assert more.result["last"]["step"] == f"{last}/train"
    trained = {row["step"]: row for row in more.rows if row["verb"] == "train"}
    assert all(trained[row["step"]] == row for row in first.rows if row["verb"] == "train")


def test_the_training_reward_is_the_sum_of_the_attempts_whatever_their_number(tmp_path):
    outcome = execute(tmp_path / "run", "smoke_score", "method.offline_share=0.5", "method.alpha=0")
    (row,) = [row for row in outcome.rows if row["step"] == "stage2-001/train"]
    curve = json.loads((tmp_path / "run/steps/stage2-001/train/curve.json").read_text())
    for line in curve:
        assert line["reward"] == pytest.approx(line["reward_1"] + line["reward_2"])
    assert row["mean_reward"] == pytest.approx(sum(line["reward"] for line in curve) / len(curve))


@pytest.mark.parametrize("arm", ["star_traces", "pair_sft"])
def test_the_arms_that_imitate_learn_second_attempts_given_the_first(arm, tmp_path):
    outcome = execute(tmp_path / "run", "smoke_correction_sft", f"method.arm={arm}")
    name = "trace_rows" if arm == "star_traces" else "paired_rows"
    (row,) = [row for row in outcome.rows if row["step"] == f"round-001/{name}"]
    assert set(row["sources"]) == {"corrected", "kept_right"}
    rows = Rows.load(SFTExample, [tmp_path / f"run/steps/round-001/{name}/rows-00000.parquet"], tmp_path / "cache")
    for example in rows:
        before, answer = example.segments
        assert (
            not before.loss and answer.loss and len(before.token_ids) > 60
        )  # question, first attempt, correction turn
    assert sum(row["verb"] == "train" for row in outcome.rows) == (2 if arm == "star_traces" else 1)
