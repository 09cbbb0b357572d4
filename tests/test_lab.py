"""The verbs through a method of the test's own: names, scopes, turns, curation rules, plans that tell the truth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import reasonrun
from reasonrun.cli.progress import SilentProgress
from reasonrun.contracts import Method
from reasonrun.curate.filtering import star_rows
from reasonrun.curate.group import curation, imitate
from reasonrun.errors import RecipeError, RunConflict, RunFailed
from reasonrun.planning import Assumptions, compare, plan
from reasonrun.recipe import load
from reasonrun.records import LeftOut, PreferenceExample, Rollout, Sampling
from reasonrun.running import RunOptions, run
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import PreferenceSettings, SFTSettings

SMALL = ["task.num_train=8", "task.num_dev=4", "task.num_test=4"]
SAMPLING = Sampling(temperature=1.0, max_new_tokens=64)
BODY = None  # what the toy method does, set by each test
SEEN: dict = {}


class Toy(Method):
    """Runs ``BODY``."""

    class Settings(SettingsBase):
        name: str = "test_lab.Toy"
        rounds: int = setting(1, Effect.HORIZON, "Rounds.")

    def run(self, lab):
        return BODY(lab)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Run a body as a method, on the scripted engine."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        "defaults:\n  - model: tiny\n  - engine: scripted\n  - launcher: local\n  - _self_\n"
        "task: {name: arith}\nmethod: {name: test_lab.Toy}\n"
    )

    def go(body, directory="run"):
        import test_lab

        test_lab.BODY = body
        return run(load(recipe, SMALL), RunOptions(directory=tmp_path / directory), SilentProgress())

    return go


def learn(lab, rows):
    return lab.train("sft", rows, start=lab.base, settings=SFTSettings(lr=1e-4), num_steps=4)


def sampled(lab, **kwargs):
    return lab.grade(lab.sample(lab.base, lab.problems("train"), n=2, sampling=SAMPLING), **kwargs)


def test_two_steps_of_one_name_are_refused_with_the_way_out(toy):
    def body(lab):
        sampled(lab)
        lab.sample(lab.base, lab.problems("train"), n=1, sampling=SAMPLING)

    with pytest.raises(RecipeError, match=r"two steps are named sample[\s\S]*name=[\s\S]*lab.scope"):
        toy(body)


def test_scopes_name_steps(toy, tmp_path):
    def body(lab):
        for _ in lab.rounds(2):
            with lab.scope("probe", T=0.5):
                sampled(lab)
        with lab.scope("end"):
            return learn(lab, lab.curate(star_rows, sampled(lab), sampled_again(lab)))

    def sampled_again(lab):
        return lab.grade(
            lab.sample(lab.base, lab.problems("train"), n=1, sampling=SAMPLING, style="hinted", name="again"),
            name="grade-again",
        )

    toy(body)
    for name in ("round-001/probe-T=0.5/sample", "round-002/probe-T=0.5/grade", "end/star_rows", "end/train"):
        assert (tmp_path / "run" / "steps" / name / "_OK.json").exists()


def test_a_next_turn_keeps_the_ids_before_it_and_shows_the_first_attempt_whole(toy):
    def body(lab):
        first = lab.sample(lab.base, lab.problems("train"), n=2, sampling=SAMPLING)
        second = lab.sample(lab.base, first, n=1, sampling=SAMPLING, turn="Check it again.", name="second")
        SEEN["pairs"] = list(zip(first, second, strict=True))
        return learn(lab, lab.curate(star_rows, lab.grade(second), sampled_none(lab)))

    def sampled_none(lab):
        return lab.grade(
            lab.sample(lab.base, lab.problems("dev"), n=1, sampling=SAMPLING, name="other"), name="grade-other"
        )

    toy(body)
    import test_lab

    pairs = test_lab.SEEN.pop("pairs", None) or SEEN.pop("pairs")
    assert len(pairs) == 16
    for first, second in pairs:
        before = first.prompt_ids + first.completion_ids
        assert second.prompt_ids[: len(before)] == before
        assert second.parent_id == first.id
        assert [m.role for m in second.messages] == ["user", "assistant", "user"]
        assert second.messages[1].content == first.text and second.messages[2].content == "Check it again."


@pytest.mark.promise("G17", "rows lost by a method")
def test_curation_that_loses_a_row_is_stopped(toy):
    def body(lab):
        lab.curate(losing, sampled(lab))

    with pytest.raises(RunFailed, match=r"Of problem \w+ 2 rows were neither"):
        toy(body)


@curation(version=1)
def losing(group, rows):
    return iter(())


@curation(version=1)
def first_two_as_pair(group, rows):
    first, second = rows
    yield PreferenceExample(
        problem_id=group.problem.id,
        rollout_ids=(first.rollout.id, second.rollout.id),
        prefix_ids=first.rollout.prompt_ids,
        chosen_ids=first.rollout.completion_ids,
        rejected_ids=second.rollout.completion_ids,
    )


@curation(version=1)
def one_of_each_kind(group, rows):
    yield from first_two_as_pair(group, rows)
    yield imitate(group.prompt("plain"), rows[0])


def test_pairs_reach_the_trainer_of_pairs_and_no_other(toy):
    def body(lab):
        rows = lab.curate(first_two_as_pair, sampled(lab))
        assert len(rows) == 8 and rows.kind == "preference" and rows.rows[0].chosen_ids
        with pytest.raises(RecipeError, match=r"the trainer sft cannot learn from first_two_as_pair.*kind preference"):
            learn(lab, rows)
        return lab.train(
            "preference",
            rows,
            start=lab.base,
            reference=lab.base,
            settings=PreferenceSettings(lr=1e-4),
            num_steps=4,
            name="train-pairs",
        )

    kinds = {row["step"]: row["kind"] for row in toy(body).rows if row["verb"] == "curate"}
    assert kinds == {"first_two_as_pair": "preference"}


def test_a_curation_gives_one_kind_of_examples(toy):
    with pytest.raises(RunFailed, match="gave examples of kind preference and of kind sft"):
        toy(lambda lab: lab.curate(one_of_each_kind, sampled(lab)))


def test_a_lambda_or_an_unmarked_function_cannot_curate(toy):
    with pytest.raises(RecipeError, match=r"module-level function marked with @curation"):
        toy(lambda lab: lab.curate(lambda group, rows: iter(()), sampled(lab), name="x"))
    with pytest.raises(RecipeError, match=r"unmarked"):
        toy(lambda lab: lab.curate(unmarked, sampled(lab)), directory="other")


def unmarked(group, rows):
    return iter(())


KEEP_FIRST = True


@curation(version=1)
def choosing(group, rows):
    for position, row in enumerate(rows):
        if (position == 0) is KEEP_FIRST:
            yield imitate(group.prompt("plain"), row)
        else:
            yield LeftOut(rollout_id=row.rollout.id, reason="position")


@pytest.mark.promise("G7", "changed codes")
def test_changed_code_that_chooses_other_rows_stops_and_equal_code_goes_on(toy, monkeypatch):
    import reasonrun.running as running

    def fails(lab):
        lab.curate(choosing, sampled(lab))
        raise KeyboardInterrupt

    def body(lab):
        return learn(lab, lab.curate(choosing, sampled(lab)))

    with pytest.raises(KeyboardInterrupt):
        toy(fails)
    monkeypatch.setattr(running, "code_changed", lambda *_: True)
    import test_lab

    monkeypatch.setattr(test_lab, "KEEP_FIRST", False)
    monkeypatch.setattr(sys.modules[choosing.__module__], "KEEP_FIRST", False)
    with pytest.raises(RunConflict, match=r"choosing: the code[\s\S]*--accept-code[\s\S]*--redo choosing"):
        toy(body)
    monkeypatch.setattr(sys.modules[choosing.__module__], "KEEP_FIRST", True)
    monkeypatch.setattr(test_lab, "KEEP_FIRST", True)
    toy(body)


@pytest.mark.promise("G20", "plans against runs")
def test_the_plan_matches_the_run_where_it_says_exact(tmp_path):
    recipe = load("smoke_star", [*SMALL, "method.rounds=2"])
    planned = plan(recipe, Assumptions(), SilentProgress())
    run(recipe, RunOptions(directory=tmp_path / "run"), SilentProgress())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    done = {row["step"]: row.get("num_rollouts", row.get("num_steps")) for row in rows}
    evaluated = {row["step"] for row in rows if row["verb"] in ("evaluate", "problems", "preflight")}
    reached = [row["step"] for row in rows if row["step"] not in evaluated and "/test-best/" not in row["step"]]
    # Whether the best checkpoint is another one than the last depends on the samples.
    possible = [step for step in planned.steps if "/test-best/" in step.step]
    assert [step.step for step in planned.steps if step not in possible] == reached
    assert len(possible) == 4 and all(step.units.expected == 0 < step.units.worst for step in possible)
    exact = [step for step in planned.steps if step.units.exact and step.verb != "curate"]
    assert len(exact) >= 10
    for step in exact:
        assert step.units.expected == done[step.step], step.step
    guessed = [
        step for step in planned.steps if not step.units.exact and step.verb == "sample" and step not in possible
    ]
    assert [step.step.split("/")[-1] for step in guessed] == ["sample-hinted"] * 2
    for step in guessed:
        assert done[step.step] <= step.units.worst == 8


@pytest.mark.promise("G20", "plans against runs")
def test_a_run_is_compared_with_its_plan(tmp_path):
    recipe = load("smoke_star", SMALL)
    planned = plan(recipe, Assumptions(), SilentProgress())
    rows = run(recipe, RunOptions(directory=tmp_path / "run"), SilentProgress()).rows
    found = compare(planned, rows)
    assert not found.other_size and not found.not_run and not found.not_planned
    expected, worst, actual = found.tokens["generated"]
    assert 0.8 * expected < actual <= worst

    tampered = [{**row, "num_rollouts": 1} if row["step"] == "round-001/sample" else row for row in rows]
    without = [row for row in tampered if row["step"] != "round-001/grade"]
    found = compare(planned, without)
    assert found.other_size == {"round-001/sample": (32, 1)}
    assert found.not_run == ["round-001/grade"]


def test_the_plan_scales_to_the_real_problem_set_and_names_its_assumptions():
    planned = plan(load("smoke_star", ["task.num_train=900"]), Assumptions(accuracy=0.0), SilentProgress())
    sample = next(step for step in planned.steps if step.step == "round-001/sample")
    assert sample.units.expected == 900 * 4
    assert planned.to_json()["assumptions"]["accuracy"] == 0.0
    assert planned.finding is not None and "nothing to learn from" in planned.finding


TOY_METHOD = '''
from reasonrun.contracts import Method
from reasonrun.curate.filtering import star_rows
from reasonrun.records import Sampling
from reasonrun.settings import Effect, Settings as SettingsBase, setting
from reasonrun.training import SFTSettings


class BestOfOne(Method):
    """Learn every right sample once."""

    class Settings(SettingsBase):
        name: str = "my_method.BestOfOne"
        num_steps: int = setting(3, Effect.SEMANTIC, "Optimizer steps.", ge=1)

    def run(self, lab):
        tried = lab.grade(lab.sample(lab.base, lab.problems("train"), n=1, sampling=Sampling(max_new_tokens=64)))
        empty = lab.grade(lab.sample(lab.base, tried.no_problems(), n=1, sampling=Sampling(), name="none"), name="g2")
        rows = lab.curate(star_rows, tried, empty)
        return lab.train("sft", rows, start=lab.base, settings=SFTSettings(lr=1e-4), num_steps=self.config.num_steps)
'''


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_method_in_a_folder_of_its_own_runs_by_dotted_path(tmp_path, hash_seed):
    (tmp_path / "my_method.py").write_text(TOY_METHOD)
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - model: tiny\n  - engine: scripted\n  - launcher: local\n  - _self_\n"
        "task: {name: arith, num_train: 6, num_dev: 3, num_test: 3}\nmethod: {name: my_method.BestOfOne}\n"
    )
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", "mine.yaml", "--json"]
    env = {"PYTHONPATH": str(Path(reasonrun.__file__).parents[1]), "PYTHONHASHSEED": hash_seed, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    weights = json.loads(done.stdout)["result"]["last"]["weights"]
    assert weights == WEIGHTS.setdefault("weights", weights)  # the same under both hash seeds


WEIGHTS: dict[str, str] = {}


def test_rollouts_keep_everything_that_a_rerun_needs(toy):
    kept = []

    def body(lab):
        rollouts = lab.sample(lab.base, lab.problems("train"), n=1, sampling=SAMPLING)
        kept.extend(rollouts)
        return learn(lab, lab.curate(choosing, lab.grade(rollouts)))

    toy(body)
    first = kept[0]
    assert Rollout.model_validate_json(first.model_dump_json()) == first
    assert first.policy and first.sampling == SAMPLING and first.id.endswith("-0") and first.seed
