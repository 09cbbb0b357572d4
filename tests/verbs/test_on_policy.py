"""On-policy training as a durable step: what is committed, what stops it, what a kill may cost. Scripted engine."""

import json

import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.contracts import versioned
from reasonrun.curate.attempts import AttemptSettings, TurnRewards, attempts, turn_rewards
from reasonrun.errors import EnvironmentProblem, Finding, RecipeError, RunConflict
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.steps import OpenStep
from reasonrun.methods import score
from reasonrun.on_policy import plan_problems
from reasonrun.parts import load_part, part
from reasonrun.planning import Assumptions, compare, plan
from reasonrun.recipe import load
from reasonrun.records import Credit, Rollout, Score
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows
from reasonrun.training import ON_POLICY_FILE
from reasonrun.verbs.training_log import TrainingLog

SMALL = ["task.num_train=16", "task.num_dev=8", "task.num_test=4", "preflight=off", "method.rl.batch_size=8"]


def execute(directory, *overrides):
    return run(load("smoke_score", [*SMALL, *overrides]), RunOptions(directory=directory), SilentProgress())


def table(directory, step, name, record):
    return list(
        Rows.load(record, sorted((directory / "steps" / step).glob(f"{name}-*.parquet")), directory / "derived")
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("on-policy") / "run"
    return directory, execute(directory)


def test_every_rollout_is_kept_with_its_verdict_and_what_was_made_of_it(finished):
    directory, outcome = finished
    (row,) = [row for row in outcome.rows if row["step"] == "stage1-001/train"]
    rollouts, scores, credit = (
        table(directory, "stage1-001/train", name, record)
        for name, record in (("rollouts", Rollout), ("scores", Score), ("credit", Credit))
    )
    assert len(rollouts) == len(scores) == len(credit) == row["num_rollouts"] == 3 * 8 * 2
    assert [made.optimizer_step for made in credit] == sorted(made.optimizer_step for made in credit)
    assert {made.optimizer_step for made in credit} == {1, 2, 3}
    assert row["num_completion_tokens"] == sum(len(rollout.completion_ids) for rollout in rollouts)
    by_id = {rollout.id: score for rollout, score in zip(rollouts, scores, strict=True)}
    assert len(by_id) == len(rollouts)  # no two optimizer steps draw the same
    for rollout, score_, made in zip(rollouts, scores, credit, strict=True):
        is_second = rollout.parent_id is not None
        assert made.reward == (score_.value if is_second else 0.0)  # Stage I
        assert made.kl_coef == (0.01 if is_second else 0.1)
        assert not is_second or rollout.parent_id in by_id


def test_rounds_and_stages_draw_other_rollouts_of_other_problems_in_turn(finished):
    directory, _ = finished
    drawn = {
        step: table(directory, f"{step}/train", "rollouts", Rollout)
        for step in ("stage1-001", "stage2-001", "stage2-002")
    }
    orders = {step: [rollout.problem_id for rollout in rollouts] for step, rollouts in drawn.items()}
    assert len({tuple(order) for order in orders.values()}) == 3
    seeds = [rollout.seed for rollouts in drawn.values() for rollout in rollouts if rollout.index == 0]
    assert len(set(seeds)) == len(seeds)


def test_a_finished_run_and_a_replay_do_no_work(finished, monkeypatch):
    directory, outcome = finished
    seal = (directory / "_OK.json").read_bytes()
    assert execute(directory).already_finished
    (directory / "_OK.json").unlink()
    monkeypatch.setattr("reasonrun.trainers.scripted.ScriptedTrainer.train", None)
    assert execute(directory).result == outcome.result
    assert (directory / "_OK.json").read_bytes() == seal


@pytest.mark.promise("G20", "plans against runs")
def test_the_plan_counts_what_is_sampled_while_training(finished):
    _, outcome = finished
    planned = plan(load("smoke_score", SMALL), Assumptions(), SilentProgress())
    compared = compare(planned, outcome.rows)
    assert not compared.not_planned and not compared.not_run and not compared.other_size
    expected, worst, actual = compared.tokens["generated"]
    assert 0.8 * actual < expected < 1.3 * actual and worst >= actual
    (trained,) = [step for step in planned.steps if step.step == "stage1-001/train"]
    assert trained.units.expected == 3 and 0 < trained.generated.expected < trained.tokens.expected


def test_a_plan_of_large_batches_rehearses_few_problems_and_counts_all(finished):
    small, large = (
        plan(load("smoke_score", ["task.num_train=400", "preflight=off", size]), Assumptions(), SilentProgress())
        for size in ("method.rl.batch_size=16", "method.rl.batch_size=320")
    )
    trained = [next(s for s in planned.steps if s.step == "stage1-001/train") for planned in (small, large)]
    assert 15 < trained[1].generated.expected / trained[0].generated.expected < 25
    short = plan(
        load("smoke_score", ["task.num_train=20", "method.rl.batch_size=320"]), Assumptions(), SilentProgress()
    )
    assert short.finding and "80 of one sampling" in short.finding


def test_a_plan_knows_that_several_steps_learn_from_one_sampling(finished):
    once, twice = (
        next(
            s
            for s in plan(
                load("smoke_score", [*SMALL, "method.stage1.steps=8", every]), Assumptions(), SilentProgress()
            ).steps
            if s.step == "stage1-001/train"
        )
        for every in ("method.rl.num_iterations=1", "method.rl.num_iterations=4")
    )
    assert 3.5 < once.generated.expected / twice.generated.expected < 4.5
    assert 0.9 < once.tokens.expected / twice.tokens.expected < 1.1
    assert once.generated.worst > once.generated.expected


def test_a_plan_of_thousands_of_steps_rehearses_two(monkeypatch):
    planned = plan(load("smoke_score", [*SMALL, "method.stage1.steps=5000"]), Assumptions(), SilentProgress())
    (trained,) = [step for step in planned.steps if step.step == "stage1-001/train"]
    assert trained.units.expected == 5000 and trained.generated.expected > 5000 * 16 * 10


@pytest.mark.parametrize(("num_problems", "size"), [(4, 4), (10, 4), (100, 64), (1000, 128), (7, 3)])
def test_no_sampling_holds_a_problem_twice_and_all_are_used_alike(num_problems, size):
    plan = plan_problems(num_problems, size, 50, seed=3)
    assert all(len(set(places)) == size for places in plan)
    used = [sum(number in places for places in plan) for number in range(num_problems)]
    assert max(used) - min(used) <= 2
    assert plan_problems(num_problems, size, 20, seed=3) == plan[:20] != plan_problems(num_problems, size, 20, seed=4)


def test_too_few_problems_for_one_sampling_are_a_finding(tmp_path):
    with pytest.raises(Finding) as caught:
        execute(tmp_path / "run", "method.rl.batch_size=96")
    assert caught.value.evidence == {"problems": 16, "problems of a sampling": 24}


def test_a_trainer_that_is_past_the_checkpoint_loses_nothing(tmp_path):
    with RunDir.open(tmp_path / "run", identity={"recipe": {}}, command="test") as run_dir:
        step = run_dir.step("train", {"verb": "train"})
        log = TrainingLog(Bare(), step, tmp_path, on_policy=True)
        for number in (1, 2, 3):
            (tmp_path / f"experience-{number:08d}.jsonl").write_text(experience(number, "first"))
        (tmp_path / "experience-00000004.partial").write_text('{"half a')
        log.commit(2)
        assert [path.name for path in sorted(tmp_path.glob("experience-*"))] == [
            "experience-00000003.jsonl",
            "experience-00000004.partial",
        ]
        assert len(step.wal("experience")) == 2


@versioned(1)
def rewards_nothing(state, graded, settings):
    return state, []


def rewards_without_version(state, graded, settings):
    return turn_rewards(state, graded, settings)


@pytest.mark.promise("G13", "stub verdicts")
def test_no_row_at_all_is_a_finding_with_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "turn_rewards", rewards_nothing)
    with pytest.raises(Finding) as caught:
        execute(tmp_path / "run")
    assert caught.value.evidence["rollouts"] == 16


def test_functions_that_no_other_process_can_name_or_tell_apart_are_refused(tmp_path, monkeypatch):
    settings = TurnRewards()
    for thing in (lambda *_: None, finished_by(3), [].append):
        with pytest.raises(RecipeError, match="top of a module"):
            part(thing, settings)
    with pytest.raises(EnvironmentProblem, match="absent"):
        load_part(part(turn_rewards, settings).model_copy(update={"path": "absent.module:name"}))
    function, same = load_part(part(turn_rewards, settings))
    assert function is turn_rewards and same == settings
    monkeypatch.setattr(score, "turn_rewards", rewards_without_version)
    with pytest.raises(RecipeError, match="no version"):
        execute(tmp_path / "run")


def finished_by(number):
    def closure(state, graded, settings):
        return number

    return closure


def test_what_functions_are_called_with_is_part_of_the_fingerprint(finished, tmp_path):
    def fingerprint(directory):
        return json.loads((directory / "steps/stage1-001/train/step.json").read_text())

    first = json.dumps(fingerprint(finished[0]))
    for name in ("curate.attempts:attempts", "curate.attempts:turn_rewards", "number-1"):
        assert name in first
    execute(tmp_path / "run", "method.beta2=0.2")
    assert fingerprint(tmp_path / "run") != fingerprint(finished[0])


@pytest.mark.promise("G7", "changed codes")
def test_optimizer_steps_of_one_step_are_never_made_by_two_codes(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="half way"), monkeypatch.context() as broken:
        broken.setattr("reasonrun.trainers.scripted.ScriptedTrainer._on_policy", stop_half_way)
        execute(tmp_path / "run")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    monkeypatch.setattr(OpenStep, "latest_checkpoint", lambda self: (checkpoint, 1))
    (checkpoint / ON_POLICY_FILE).write_text('{"code": "another", "state": {}}')
    for _ in range(2):  # a second try is no way around it
        with pytest.raises(RunConflict) as caught:
            execute(tmp_path / "run")
        assert "stage1-001/train" in str(caught.value) and "--accept-code" in str(caught.value)
    recipe = load("smoke_score", SMALL)
    options = RunOptions(directory=tmp_path / "run", accept_code=True)
    monkeypatch.setattr("reasonrun.trainers.scripted.ScriptedTrainer._on_policy", stop_half_way)
    with pytest.raises(RuntimeError, match="half way"):  # it went on
        run(recipe, options, SilentProgress())


def stop_half_way(self, job, spec, events):
    raise RuntimeError("half way")


def experience(number, text):
    rollout = Rollout(
        id=f"r{number}-{text}",
        problem_id="p",
        index=0,
        kind="plain",
        messages=(),
        prompt_ids=(1,),
        segments=(),
        text=text,
        finish_reason="stop",
        policy="w",
        sampling={},
        seed=1,
    )
    kept = {
        "rollout": rollout,
        "score": Score(value=1.0, reason="correct", grader="g"),
        "credit": {"optimizer_step": number},
    }
    return score_line(kept)


def score_line(kept):
    from reasonrun.records import Experience

    return Experience.model_validate(kept).model_dump_json() + "\n"


class Bare:
    """As much of a context as the log of a training step asks for."""

    progress = SilentProgress()

    def check_stop(self):
        pass


def test_what_came_after_the_last_checkpoint_is_made_again_and_may_come_out_otherwise(tmp_path):
    with RunDir.open(tmp_path / "run", identity={"recipe": {}}, command="test") as run_dir:
        step = run_dir.step("train", {"verb": "train"})
        log = TrainingLog(Bare(), step, tmp_path, on_policy=True)
        for number in (1, 2, 3, 4):
            (tmp_path / f"experience-{number:08d}.jsonl").write_text(experience(number, "first"))
            log.receive({"event": "log", "step": number, "loss": float(number)})
        log.commit()
        assert not list(tmp_path.glob("experience-*"))
        log.rewind(2)
        for number in (3, 4):
            (tmp_path / f"experience-{number:08d}.jsonl").write_text(experience(number, "second"))
            log.receive({"event": "log", "step": number, "loss": -float(number)})
        log.seal()
        committed = step.commit({})
        assert [line["loss"] for line in committed.json("curve")] == [1.0, 2.0, -3.0, -4.0]
        texts = [rollout.text for rollout in table(tmp_path / "run", "train", "rollouts", Rollout)]
        assert texts == ["first", "first", "second", "second"]
        aside = b"".join(path.read_bytes() for path in (tmp_path / "run/quarantine").rglob("*") if path.is_file())
        assert aside.count(b'"first"') == 2


def test_attempts_settings_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="kl_coefs"):
        TurnRewards(kl_coefs=())
    with pytest.raises(ValueError):
        AttemptSettings(num_attempts=0)
    assert attempts.version == turn_rewards.version == 1
