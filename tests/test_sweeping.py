"""Sweeps on the scripted engine: what is expanded, skipped, survived and recorded."""

import json
from pathlib import Path

import pytest

from reasonrun.engines.scripted import Scripted
from reasonrun.errors import RecipeError, RunFailed, Stopped
from reasonrun.ledger.catalogue import read_lines
from reasonrun.recipe_sweep import values
from reasonrun.sweeping import SweepOptions, expand, run_sweep, sweep_directory, sweep_exit_code
from sweep_runs import NEVER_RIGHT, SMALL, Lines, alone, borrowed, made, sweep
from test_running import content


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # proves nothing while the machine stays up


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("donor") / "run"
    alone(directory)
    return directory


@pytest.fixture(scope="module")
def second_seed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("second") / "run"
    alone(directory, "seed=1")
    return directory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1,2", ["a=1", "a=2"]),
        ("a=x", ["a=x"]),
        ("a=[1,2]", ["a=[1,2]"]),
        ("a=[1,2],[3]", ["a=[1,2]", "a=[3]"]),
        ("a='x,y'", ["a='x,y'"]),
        ("a='x,y',z", ["a='x,y'", "a=z"]),
        ("a={x:1,y:2}", ["a={x:1,y:2}"]),
        ("a=range(0,3)", ["a=0", "a=1", "a=2"]),
        ("++a=1,2", ["a=1", "a=2"]),
        ("no equals sign, at all", ["no equals sign, at all"]),
        ("a=b=c,d", ["a=b=c,d"]),  # not Hydra's grammar: one plain text, as everywhere
    ],
)
def test_values_follow_the_grammar_of_overrides(text, expected):
    assert list(values(text)) == expected


def test_every_arm_comes_with_the_first_seed_before_any_with_the_next():
    runs = expand("smoke_star", ["method.num_samples=1,2", "seed=5,3", "method.rounds=1"])
    assert [one.name for one in runs] == [
        f"smoke_star-method.num_samples={n},method.rounds=1,seed={seed}" for seed in (5, 3) for n in (1, 2)
    ]
    assert [one.recipe.method.num_samples for one in runs] == [1, 2, 1, 2]
    assert [one.arm for one in runs[:2]] == ["smoke_star method.num_samples=1", "smoke_star method.num_samples=2"]
    assert runs[0].differences == {"method.num_samples": 1, "seed": 5}  # what all have in common is not in it


def test_arms_may_be_recipes_and_keep_their_own_values():
    runs = expand("star_arith,star_arith_no_filter", ["seed=0,1"])
    assert [(one.arm, one.recipe.seed) for one in runs] == [
        ("star_arith", 0),
        ("star_arith_no_filter", 0),
        ("star_arith", 1),
        ("star_arith_no_filter", 1),
    ]
    assert [one.differences["method.keep"] for one in runs[:2]] == ["correct", "any"]


def test_all_mistakes_of_all_runs_are_told_at_once_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as mistakes:
        expand("smoke_star,smoke_sta", ["method.num_samples=0,x", "seed=0,-1", "task.num_trian=1"])
    text = str(mistakes.value)
    for part in ("method.num_samples=0", "method.num_samples=x", "seed=-1", "task.num_trian=1", "smoke_sta'"):
        assert part in text
    assert text.count("method.num_samples=x") == 1  # once, although two of the combinations have it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overrides", [["seed=0,0"], ["seed=0,1", "seed=2"], ["engine.unit_rows=8,16"]])
def test_two_runs_that_would_be_one_are_refused(overrides):
    with pytest.raises(RecipeError, match="same experiment"):
        expand("smoke_star", overrides)


def test_the_default_folder_depends_on_the_arms_alone():
    def folder(*overrides):
        return sweep_directory(expand("smoke_star", overrides))

    first = folder("method.rounds=1,2", "seed=0")
    assert first.parent == Path("runs") and first.name.startswith("sweep-smoke_star-")
    assert folder("method.rounds=1,2", "seed=0,1,2") == folder("method.rounds=1,2", "engine.unit_rows=8") == first
    assert folder("method.rounds=1,3") != first


@pytest.mark.parametrize("after", [3, 20])
def test_a_stopped_sweep_goes_on_skips_what_is_finished_and_ends_with_the_same_bytes(
    after, donor, second_seed, tmp_path
):
    """``after`` checks for a stop in the second run."""
    first, second = expand("smoke_star", [*SMALL, "seed=0,1"])
    in_second = []

    def interrupted():
        in_second.append((tmp_path / second.name).exists())
        return 75 if sum(in_second) > after else 0

    with pytest.raises(Stopped) as stop:
        sweep(tmp_path, "seed=0,1", interrupted=interrupted)
    assert stop.value.exit_code == 75 and "same command continues" in str(stop.value)
    assert [path.stem for path in (tmp_path / "summaries").glob("*.json")] == [first.name]  # at once, not at the end
    summaries, lines = sweep(tmp_path, "seed=0,1")
    assert [one["exit_code"] for one in summaries] == [0, 0]
    assert [line.rsplit(": ", 1)[1] for line in lines if line.startswith("[") and ": " in line] == [
        "finished before",
        "done",
    ]
    assert content(tmp_path / first.name) == content(donor)
    assert content(tmp_path / second.name) == content(second_seed)


def test_a_stop_between_two_runs_leaves_the_next_one_alone(tmp_path):
    flag = [0]
    runs = expand("smoke_star", [*SMALL, "seed=0,1"])
    summaries = run_sweep(runs, SweepOptions(out=tmp_path, interrupted=lambda: flag[0]), Lines())
    next(summaries)
    flag[0] = 130
    with pytest.raises(Stopped) as stop:
        next(summaries)
    assert stop.value.exit_code == 130
    assert not (tmp_path / runs[1].name).exists()


def test_a_finding_ends_one_run_and_is_recorded_with_its_counts(tmp_path):
    for _ in range(2):
        summaries, lines = sweep(tmp_path, "engine.accuracy=0,0.4", *NEVER_RIGHT, "preflight=report")
        assert [one["exit_code"] for one in summaries] == [5, 0]
        assert sweep_exit_code(summaries) == 5
        assert summaries[0]["evidence"]["wrong"] > 0 and "nothing to learn from" in summaries[0]["message"]
        assert summaries[0]["dev"][0]["greedy"] == 0.0  # what was measured before is kept
        assert any("finding: " in line for line in lines)
    stored = [json.loads(path.read_text()) for path in sorted((tmp_path / "summaries").glob("*.json"))]
    assert stored == sorted(summaries, key=lambda one: one["run"])


def test_a_run_that_borrows_all_it_needs_for_its_finding_has_its_numbers_too(tmp_path):
    summaries, _ = sweep(tmp_path, "engine.accuracy=0", *NEVER_RIGHT, "preflight=report", "method.sft.lr=1e-6,1e-5")
    first, second = (tmp_path / one["run"] for one in summaries)
    assert made(second) == [] and len(borrowed(second)) > 5
    assert (second / "metrics.jsonl").read_bytes() == (first / "metrics.jsonl").read_bytes()
    assert summaries[1]["dev"] == summaries[0]["dev"] != []


@pytest.mark.parametrize("error", [RunFailed("the disk is gone"), TypeError("a bug")])
def test_a_failure_or_a_bug_ends_one_run_and_the_next_command_tries_again(error, tmp_path, monkeypatch):
    generate = Scripted.generate

    def failing(self, requests):
        if self.settings.accuracy == 0.3:
            raise error
        return generate(self, requests)

    monkeypatch.setattr(Scripted, "generate", failing)
    summaries, _ = sweep(tmp_path, "engine.accuracy=0.3,0.4")
    assert [one["exit_code"] for one in summaries] == [1, 0]
    assert str(error) in summaries[0]["message"] and sweep_exit_code(summaries) == 1
    assert ("Traceback" in summaries[0]["message"]) == isinstance(error, TypeError)
    monkeypatch.undo()
    summaries, _ = sweep(tmp_path, "engine.accuracy=0.3,0.4")
    assert [one["exit_code"] for one in summaries] == [0, 0]


def test_a_failure_outweighs_a_finding():
    codes = [[0, 0], [0, 5], [5, 1, 0], [4, 0], [3, 5]]
    assert [sweep_exit_code([{"exit_code": code} for code in each]) for each in codes] == [0, 5, 1, 1, 1]


def test_a_summary_has_the_numbers_of_its_run(tmp_path):
    (one,), _ = sweep(tmp_path, "method.rounds=2")
    rows = read_lines(tmp_path / one["run"] / "metrics.jsonl")
    assert one["num_optimizer_steps"] == 40 + 48  # 40 * 1.2
    assert one["num_generated_tokens"] == sum(row.get("num_completion_tokens", 0) for row in rows)
    assert [dev["step"] for dev in one["dev"]] == [
        "round-001/evaluate",
        "round-002/evaluate",
        "final-trainings=2/evaluate",
    ]
    seal = json.loads((tmp_path / one["run"] / "_OK.json").read_text())
    assert one["test"] == seal["content"]["result"]["test"] and set(one["test"]) == {"base", "last", "best"}
    assert one["train_metrics"] == {"loss": 1.0}  # what the scripted trainer says of a start from the base
    assert one["command"].split() == [
        *["reasonrun", "train", "smoke_star", *SMALL, "method.rounds=2"],
        *["--run", str(tmp_path / one["run"])],
    ]
    assert one["seconds"] > 0


def test_train_continues_a_run_of_a_sweep(tmp_path):
    (one,), _ = sweep(tmp_path)
    assert alone(tmp_path / one["run"]).already_finished


def test_arms_that_only_measure_are_compared_too(tmp_path):
    overrides = ["engine=scripted", "task.name=arith", "task.num_test=5", "evaluate.style=plain,few_shot"]
    summaries = list(run_sweep(expand("eval", overrides), SweepOptions(out=tmp_path), Lines()))
    assert [one["exit_code"] for one in summaries] == [0, 0]
    accuracy = [read_lines(tmp_path / one["run"] / "metrics.jsonl")[-1]["greedy"]["accuracy"] for one in summaries]
    assert [one["test"]["last"]["greedy"]["accuracy"] for one in summaries] == accuracy
    assert "base" not in summaries[0]["test"]
