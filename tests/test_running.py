"""Whole runs on the scripted engine: replay, resume, conflicts, findings, and nothing lost."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import Finding, RecipeError, RunConflict, RunFailed, Stopped
from reasonrun.recipe import load
from reasonrun.records import Checkpoint
from reasonrun.running import RunOptions, _best, run
from reasonrun.verbs.evaluating import Evaluation

SMALL = ["task.num_train=12", "task.num_dev=6", "task.num_test=6", "method.rounds=2", "evaluate.num_samples=2"]


def execute(directory, *overrides, recipe="smoke_star", **options):
    return run(load(recipe, [*SMALL, *overrides]), RunOptions(directory=directory, **options), SilentProgress())


def content(directory):
    """Digest of every file outside attempts/, derived/ and quarantine/, which hold clocks and caches."""
    skipped = {"attempts", "derived", "quarantine", "lock"}
    files = [
        p for p in sorted(directory.rglob("*")) if p.is_file() and p.relative_to(directory).parts[0] not in skipped
    ]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clean") / "run"
    outcome = execute(directory)
    return directory, outcome


@pytest.mark.promise("G1", "finished runs started again")
def test_a_run_ends_with_a_result_and_a_second_one_writes_nothing(clean):
    directory, outcome = clean
    assert set(outcome.result["test"]) == {"base", "last", "best"}
    before = content(directory), sorted(directory.glob("attempts/*"))
    again = execute(directory)
    assert again.already_finished and again.result == json.loads(json.dumps(outcome.result))
    assert (content(directory), sorted(directory.glob("attempts/*"))) == before


def test_the_same_recipe_gives_the_same_bytes(clean, tmp_path):
    execute(tmp_path / "run")
    assert content(tmp_path / "run") == content(clean[0])


def test_another_seed_gives_other_samples(clean, tmp_path):
    execute(tmp_path / "run", "seed=1")
    name = "steps/round-001/sample/rows-00000.parquet"
    assert content(tmp_path / "run")[name] != content(clean[0])[name]
    greedy = "steps/round-001/evaluate/greedy/rows-00000.parquet"
    assert content(tmp_path / "run")[greedy] == content(clean[0])[greedy]  # evaluation seeds name no run
    looked = "steps/preflight/sample/rows-00000.parquet"
    assert content(tmp_path / "run")[looked] == content(clean[0])[looked]  # nor does the look at the base


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.promise("G1", "failures gone on from")
@pytest.mark.promise("G2", "failures gone on from")
def test_a_failed_run_goes_on_where_it_was_and_ends_with_the_same_bytes(clean, tmp_path, unit):
    with pytest.raises(RunFailed, match=f"failed at unit {unit}"):
        execute(tmp_path / "run", f"engine.fail_at_unit={unit}", "engine.unit_rows=8")
    execute(tmp_path / "run", "engine.unit_rows=16")
    mine, theirs = content(tmp_path / "run"), content(clean[0])
    assert {k: v for k, v in mine.items() if k != "run.json"} == {k: v for k, v in theirs.items() if k != "run.json"}


def test_a_stop_ends_with_75_and_the_same_command_continues(clean, tmp_path):
    calls = iter(range(10_000))
    with pytest.raises(Stopped) as stop:
        execute(tmp_path / "run", interrupted=lambda: 75 if next(calls) > 12 else 0)
    assert stop.value.exit_code == 75 and "same command continues" in str(stop.value)
    execute(tmp_path / "run")
    assert content(tmp_path / "run") == content(clean[0])


@pytest.mark.promise("G7", "changed recipes")
def test_a_changed_recipe_stops_and_names_field_and_step(clean, tmp_path):
    with pytest.raises(RunFailed):
        execute(tmp_path / "run", "engine.fail_at_unit=1")
    with pytest.raises(RunConflict) as conflict:
        execute(tmp_path / "run", "method.temperature=0.5")
    assert "method.temperature" in str(conflict.value) and "1.0 -> 0.5" in str(conflict.value)
    assert "--run" in str(conflict.value) and conflict.value.exit_code == 4


@pytest.mark.promise("G7", "changed recipes")
@pytest.mark.parametrize("num_looks", [4, 8, 12, 16])
def test_a_change_that_was_refused_can_be_taken_back(clean, tmp_path, num_looks):
    calls = iter(range(10_000))
    with pytest.raises(Stopped):
        execute(tmp_path / "run", interrupted=lambda: 75 if next(calls) > num_looks else 0)
    before = content(tmp_path / "run")
    with pytest.raises(RunConflict, match=r"evaluate\.max_new_tokens: None -> 32"):
        execute(tmp_path / "run", "evaluate.max_new_tokens=32")
    assert content(tmp_path / "run") == before
    execute(tmp_path / "run")
    assert content(tmp_path / "run") == content(clean[0])


@pytest.mark.promise("G7", "changed recipes")
def test_a_change_goes_in_where_redo_names_the_step_that_it_begins_with(tmp_path):
    changed = ("method.temperature=0.5",)
    calls = iter(range(10_000))
    with pytest.raises(Stopped):
        execute(tmp_path / "run", interrupted=lambda: 75 if next(calls) > 30 else 0)
    with pytest.raises(RunConflict) as refused:
        execute(tmp_path / "run", *changed)
    named = str(refused.value).split("--redo ")[1].split()[0]
    with pytest.raises(RunConflict, match=r"method\.temperature: 1\.0 -> 0\.5"):
        execute(tmp_path / "run", *changed, redo="round-002/sampel")
    for _ in range(20):  # each conflict names the next step that the change concerns
        try:
            execute(tmp_path / "run", *changed, redo=named)
            break
        except RunConflict as conflict:
            named = str(conflict).split("--redo ")[1].split()[0]
    assert execute(tmp_path / "run", *changed).already_finished
    execute(tmp_path / "fresh", *changed)
    assert content(tmp_path / "run") == content(tmp_path / "fresh")


@pytest.mark.promise("G7", "changed recipes")
def test_a_finished_run_is_made_again_from_a_step_on_with_a_changed_recipe(tmp_path):
    execute(tmp_path / "run")
    with pytest.raises(RunConflict):
        execute(tmp_path / "run", "method.sft.lr=1e-5")
    outcome = execute(tmp_path / "run", "method.sft.lr=1e-5", redo="round-001/train")
    assert not outcome.already_finished
    execute(tmp_path / "fresh", "method.sft.lr=1e-5")
    assert content(tmp_path / "run") == content(tmp_path / "fresh")


def test_a_mistake_in_model_or_data_leaves_no_run_behind(tmp_path):
    with pytest.raises(RecipeError):
        execute(tmp_path / "run", "model.name=null", f"model.path={tmp_path / 'nowhere'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.promise("G7", "changed recipes")
def test_a_finished_run_refuses_another_recipe(clean):
    with pytest.raises(RunConflict, match=r"method\.rounds: 2 -> 1"):
        execute(clean[0], "method.rounds=1")


def test_operational_fields_are_free(clean):
    assert execute(clean[0], "engine.seconds_per_unit=0.5").already_finished


NEVER_RIGHT = ("engine.accuracy=0", "engine.gain=0", "engine.spread=0")
ALWAYS_RIGHT = ("engine.accuracy=1", "engine.spread=0", "engine.unanswered=0", "engine.truncated=0")


@pytest.mark.promise("G13", "stub verdicts")
def test_preflight_refuses_a_base_that_solves_nothing_and_can_be_told_to_go_on(tmp_path):
    for _ in range(2):
        with pytest.raises(Finding, match="preflight: no answer of the base is right") as finding:
            execute(tmp_path / "run", *NEVER_RIGHT)
    assert finding.value.exit_code == 5 and finding.value.evidence["samples"] == 12 * 8
    assert "preflight=report" in str(finding.value) and "easier problems" in str(finding.value)
    assert sorted(path.name for path in (tmp_path / "run" / "steps").iterdir()) == ["preflight", "problems"]
    with pytest.raises(Finding, match="step round-001/train: nothing to learn from"):
        execute(tmp_path / "run", *NEVER_RIGHT, "preflight=report")


@pytest.mark.promise("G13", "stub verdicts")
def test_preflight_names_the_cause(tmp_path):
    with pytest.raises(Finding, match="most answers were cut off: raise max_new_tokens"):
        execute(tmp_path / "cut", *NEVER_RIGHT, "engine.truncated=1")
    with pytest.raises(Finding, match="most answers cannot be read: choose a prompt style"):
        execute(tmp_path / "mute", *NEVER_RIGHT, "engine.unanswered=1", "engine.truncated=0")


@pytest.mark.promise("G13", "stub verdicts")
def test_preflight_asks_for_what_the_method_learns_from(tmp_path):
    small = ("task.num_train=8", "task.num_dev=4", "task.num_test=4", *ALWAYS_RIGHT)
    recipe = load("smoke_step_dpo", list(small))
    with pytest.raises(Finding, match="preflight: every answer of the base is right") as finding:
        run(recipe, RunOptions(directory=tmp_path / "wrong"), SilentProgress())
    assert "take harder problems" in str(finding.value)
    execute(tmp_path / "right", *ALWAYS_RIGHT)  # STaR learns from right answers


@pytest.mark.promise("G13", "stub verdicts")
def test_nothing_to_learn_from_is_a_finding_with_counts_and_says_so_again(tmp_path):
    for _ in range(2):
        with pytest.raises(Finding) as finding:
            execute(tmp_path / "run", *NEVER_RIGHT, "preflight=report")
        assert finding.value.exit_code == 5
        assert finding.value.evidence["wrong"] > 0
        assert "best model so far: the base model" in str(finding.value)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_generated(tmp_path):
    with pytest.raises(
        RecipeError, match=r"the answer up to 800\. The model's context holds 768\n.*lower max_new_tokens to \d"
    ):
        execute(tmp_path / "run", "method.max_new_tokens=800", "evaluate.max_new_tokens=32")


def test_every_rollout_is_used_or_left_out_with_a_reason(clean):
    rows = [json.loads(line) for line in (clean[0] / "metrics.jsonl").read_text().splitlines()]
    curated = [row for row in rows if row["verb"] == "curate"]
    assert len(curated) == 2
    for row in curated:
        assert row["num_rows"] == row["num_examples"] + sum(row["left_out"].values())


def test_a_hinted_rollout_is_a_row_of_its_own_and_kept_against_the_bare_prompt(clean):
    from reasonrun.records import Rollout, SFTExample
    from reasonrun.sets import Rows

    def rows(kind, step):
        return Rows.load(kind, sorted((clean[0] / "steps" / step).glob("rows-*.parquet")), clean[0] / "derived")

    tried = {r.problem_id: r.prompt_ids for r in rows(Rollout, "round-001/evaluate/greedy")}
    hinted = {r.id: r for r in rows(Rollout, "round-001/sample-hinted")}
    assert all("(The answer is" in r.messages[-1].content for r in hinted.values())
    examples = [e for e in rows(SFTExample, "round-001/star_rows") if e.source == "hinted"]
    for example in examples:
        assert example.segments[0].token_ids != hinted[example.rollout_ids[0]].prompt_ids
    assert tried


def test_redo_makes_a_step_and_its_dependents_again(clean, tmp_path):
    execute(tmp_path / "run")
    outcome = execute(tmp_path / "run", redo="round-002/grade")
    assert not outcome.already_finished
    moved = {p.parent.name for p in Path(tmp_path / "run" / "quarantine").rglob("_OK.json")}
    assert {"grade", "train"} <= moved
    assert content(tmp_path / "run") == content(clean[0])


def test_more_rounds_go_on_from_a_finished_run(clean, tmp_path):
    execute(tmp_path / "run", "method.rounds=1")
    outcome = execute(tmp_path / "run")
    assert not outcome.already_finished and outcome.result["last"]["step"] == "round-002/train"
    mine, theirs = content(tmp_path / "run"), content(clean[0])
    assert {name: mine[name] for name in theirs} == theirs


def test_fewer_rounds_need_prune(clean, tmp_path):
    with pytest.raises(RunFailed):
        execute(tmp_path / "run", "engine.fail_at_unit=2", "engine.unit_rows=8", "method.rounds=3")
    with pytest.raises(RunConflict, match=r"rounds: 3 -> 2 \(horizon\); --prune"):
        execute(tmp_path / "run")
    execute(tmp_path / "run", prune=True)
    assert content(tmp_path / "run") == content(clean[0])


def test_pruning_takes_steps_that_were_only_begun(clean, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(clean[0], path)
    begun = path / "steps/round-003/sample"
    begun.mkdir(parents=True)
    shutil.copy(path / "steps/round-002/sample/step.json", begun)
    (path / "_OK.json").unlink()
    execute(path, prune=True)
    assert not begun.exists() or not list(begun.iterdir())


def test_a_mistake_that_is_corrected_at_once_leaves_one_folder_of_what_was_read(clean, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(clean[0] / "steps/problems", path / "steps/problems")
    shutil.copy(clean[0] / "run.json", path)
    execute(path, "seed=7", "method.rounds=1")
    moved = {folder.parent.name for folder in path.glob("quarantine/*/steps")}
    assert len(moved) == 1


def test_where_dev_tells_nothing_the_last_policy_is_the_best():
    """Of items without gold decisions an evaluation says what share could be read: no reason to choose a policy."""

    def evaluation(step, accuracy, exact):
        table = {"accuracy": accuracy}
        judging = {"greedy": {"exact": {"value": exact}}}
        policy = Checkpoint(path="p", weights=step, tokenizer="t", step=step)
        return Evaluation(policy=policy, split="dev", step=step, metrics={"greedy": table, "judging": judging})

    assert _best([evaluation("a", 0.9, None), evaluation("b", 0.8, None)]).step == "b"
    assert _best([evaluation("a", 0.9, 0.9), evaluation("b", 0.8, 0.8)]).step == "a"
