"""Step-DPO on the scripted engine: every arm from the same rows, prefixes that go on token by token."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import Finding
from reasonrun.methods.step_dpo import StepDPO
from reasonrun.models import resolve
from reasonrun.planning import Assumptions, compare, plan
from reasonrun.recipe import RecipeProblems, load
from reasonrun.records import PreferenceExample, Rollout, SFTExample
from reasonrun.rendering import Renderer
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows

SMALL = ["task.num_train=16", "task.num_dev=8", "task.num_test=4", "evaluate.num_samples=2", "preflight=off"]
ARMS = {"step_dpo": "step", "full_dpo": "response", "step_dpo_teacher": "teacher", "sft_chosen_step": "sft"}


def execute(directory, *overrides):
    return run(load("smoke_step_dpo", [*SMALL, *overrides]), RunOptions(directory=directory), SilentProgress())


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    return {arm: (folder / arm, execute(folder / arm, f"method.arm={arm}")) for arm in ARMS}


def rows(directory, step, record):
    return list(Rows.load(record, sorted((directory / "steps" / step).glob("rows-*.parquet")), directory / "derived"))


def test_all_arms_learn_from_the_same_errors_and_are_measured_on_the_same_pairs(arms):
    shared = {}
    for arm, (directory, _) in arms.items():
        kind = SFTExample if arm == "sft_chosen_step" else PreferenceExample
        examples = rows(directory, f"round-001/pairs-{ARMS[arm]}", kind)
        assert examples
        shared[arm] = ([example.rollout_ids for example in examples], (directory / "steps/held-out/pairs-step"))
    errors = {arm: {ids[-1] for ids in found} for arm, (found, _) in shared.items()}
    assert errors["step_dpo"] == errors["full_dpo"] == errors["sft_chosen_step"]
    assert errors["step_dpo_teacher"] <= errors["step_dpo"]
    assert shared["step_dpo"][0] == shared["full_dpo"][0] == shared["sft_chosen_step"][0]
    held_out = {hashlib.sha256((path / "rows-00000.parquet").read_bytes()).hexdigest() for _, path in shared.values()}
    assert len(held_out) == 1
    for _, outcome in arms.values():
        (pairs,) = [row for row in outcome.rows if row["verb"] == "evaluate_pairs"]
        assert pairs["num_pairs"] > 0 and {"reward_margin", "pair_accuracy"} <= pairs.keys()
        (trained,) = [row for row in outcome.rows if row["verb"] == "train"]
        assert trained["num_steps"] == 8


def test_continuations_go_on_from_the_prefix_as_it_was_sampled(arms):
    directory, outcome = arms["step_dpo"]
    collected = {row.id: row for row in rows(directory, "round-001/collect", Rollout)}
    rectified = rows(directory, "round-001/rectify", Rollout)
    renderer = Renderer.load(resolve(load("smoke_step_dpo").model).path)
    assert rectified
    for row in rectified:
        parent = collected[row.parent_id]
        given, sampled = row.completion_ids[: row.num_given_tokens], row.segments[-1]
        assert row.kind == "continuation" and sampled.loss and row.num_given_tokens
        assert parent.prompt_ids == row.prompt_ids and parent.completion_ids[: len(given)] == given
        assert row.text == renderer.decode(row.completion_ids) and renderer.decode(given).rstrip(
            "0123456789 "
        ).endswith((":", "Step"))
    (line,) = [row for row in outcome.rows if row["step"] == "round-001/rectify"]
    assert line["num_completion_tokens"] == sum(len(row.segments[-1].token_ids) for row in rectified)


def test_steps_that_are_not_last_hold_no_end_of_sequence(arms):
    directory, _ = arms["step_dpo"]
    renderer = Renderer.load(resolve(load("smoke_step_dpo").model).path)
    num_inner = 0
    for pair in rows(directory, "round-001/pairs-step", PreferenceExample):
        text = renderer.decode(pair.chosen_ids)
        assert renderer.decode(pair.prefix_ids).endswith(":")
        if text.endswith("\n"):
            num_inner += 1
            assert not set(pair.chosen_ids + pair.rejected_ids) & set(renderer.eos_ids)
    assert num_inner


def test_held_out_pairs_are_of_problems_that_no_arm_learns_from(arms):
    for arm, (directory, _) in arms.items():
        kind = SFTExample if arm == "sft_chosen_step" else PreferenceExample
        learnt = {row.problem_id for row in rows(directory, f"round-001/pairs-{ARMS[arm]}", kind)}
        held_out = {row.problem_id for row in rows(directory, "held-out/pairs-step", PreferenceExample)}
        assert learnt and held_out and not learnt & held_out


@pytest.mark.promise("G17", "conserved arms")
def test_every_row_is_used_or_left_out_with_a_reason(arms):
    for _, outcome in arms.values():
        for row in outcome.rows:
            if row["verb"] in ("curate", "cut"):
                left_out = sum(row["left_out"].values())
                assert row["num_rows"] <= left_out + row["num_examples"] * (2 if row["verb"] == "curate" else 1)
                assert left_out <= row["num_rows"]


@pytest.mark.promise("G20", "plans against runs")
def test_the_plan_names_the_steps_of_the_run(arms):
    recipe = load("smoke_step_dpo", SMALL)
    found = compare(plan(recipe, Assumptions(), SilentProgress()), arms["step_dpo"][1].rows)
    assert not found.not_planned and not found.other_size


def test_epochs_count_the_steps_of_the_rows_there_are(tmp_path):
    epochs = ["method.num_steps=0", "method.epochs=3", "method.dpo.batch_size=4"]
    outcome = execute(tmp_path / "run", *epochs)
    (trained,) = [row for row in outcome.rows if row["verb"] == "train"]
    assert trained["num_steps"] == -(-3 * trained["num_examples"] // 4)
    planned = plan(load("smoke_step_dpo", ["task.num_train=4000", *epochs]), Assumptions(), SilentProgress())
    (step,) = [step for step in planned.steps if step.verb == "train"]
    assert (
        not step.units.exact and 500 < step.units.expected < step.units.worst
    )  # not those of the 16 rehearsed problems


def test_halving_needs_fewer_probes_and_checks_need_more(tmp_path):
    whole = execute(tmp_path / "all")
    halved = execute(tmp_path / "halved", "method.localize.search=binary")
    probed = [
        sum(
            row["num_rollouts"]
            for row in outcome.rows
            if row["verb"] == "sample" and "round-001/localize" in row["step"]
        )
        for outcome in (whole, halved)
    ]
    assert probed[1] < probed[0]
    check = [
        "method.rectify.check=continuations",
        "method.rectify.check_continuations=2",
        "method.rectify.min_gain=0.5",
    ]
    checked = execute(tmp_path / "checked", *check)
    reasons = next(row["left_out"] for row in checked.rows if row["step"] == "round-001/pairs-step")
    assert reasons["not_better"] > 0 and reasons["evidence"] > 0


def test_more_rounds_collect_with_the_trained_model(tmp_path):
    outcome = execute(tmp_path / "run", "method.rounds=2", "method.localize.kind=programmatic")
    first, second = (row for row in outcome.rows if row["verb"] == "train")
    fingerprint = json.loads((tmp_path / "run/steps/round-002/train/step.json").read_text())["fingerprint"]
    assert fingerprint["start"] == fingerprint["reference"] == first["weights"] != second["weights"]
    measured = json.loads((tmp_path / "run/steps/round-002/evaluate-pairs/step.json").read_text())["fingerprint"]
    assert measured["inputs"] == ["round-002/evaluate-pairs/logprobs", "held-out/logprobs"]  # the base is the reference
    execute(tmp_path / "base", "method.rounds=2", "method.localize.kind=programmatic", "method.reference=base")
    fingerprint = json.loads((tmp_path / "base/steps/round-002/train/step.json").read_text())["fingerprint"]
    assert fingerprint["reference"] == resolve(load("smoke_step_dpo").model).weights != fingerprint["start"]


def test_errors_that_cannot_be_repaired_are_a_finding_with_counts(tmp_path):
    with pytest.raises(Finding, match="nothing to learn from") as finding:
        execute(tmp_path / "run", "engine.accuracy=0", "engine.spread=0")
    evidence = finding.value.evidence
    assert finding.value.exit_code == 5 and evidence["not_located"] == evidence["localize/locate: never_solved"] > 0


def test_what_the_settings_need_of_the_task_is_checked():
    with pytest.raises(RecipeProblems, match="this needs steps, which the task arith does not offer"):
        load("smoke_step_dpo", ["method.style=steps"])
    with pytest.raises(RecipeProblems, match="this needs first_error"):
        load("step_dpo_gsm8k", ["method.localize.kind=programmatic"])


def test_a_gain_that_nothing_measures_is_refused():
    with pytest.raises(RecipeProblems, match="min_gain is what check=continuations measures"):
        load("smoke_step_dpo", ["method.rectify.min_gain=0.5"])


def test_the_defaults_are_the_papers():
    settings = StepDPO.Settings()
    collect, rectify, dpo = settings.collect, settings.rectify, settings.dpo
    assert (collect.num_samples, collect.temperature, collect.top_p) == (2, 0.8, 0.95)
    assert (rectify.num_samples, rectify.temperature, rectify.top_p) == (20, 0.8, 0.95)
    assert (dpo.beta, dpo.lr, dpo.schedule, dpo.warmup_ratio, dpo.batch_size) == (0.4, 5e-7, "cosine", 0.1, 128)
    assert (dpo.loss, dpo.max_length, settings.rounds, settings.epochs) == ("sigmoid", 1024, 1, 8)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_run_and_its_replay_do_not_depend_on_the_hash_seed(arms, tmp_path, hash_seed):
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", "smoke_step_dpo", *SMALL, "--run", "run", "--json"]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["result"]["last"]["weights"] == arms["step_dpo"][1].result["last"]["weights"]
