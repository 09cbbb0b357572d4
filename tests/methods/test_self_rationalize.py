"""The self-rationalizing judge on the scripted engine: rounds, arms, findings, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import reasonrun
from judge_rows import own, pair, write
from reasonrun.cli.main import app
from reasonrun.cli.progress import SilentProgress
from reasonrun.engines.scripted import Scripted
from reasonrun.errors import Finding, RecipeError
from reasonrun.models import resolve
from reasonrun.planning import Assumptions, plan
from reasonrun.recipe import RecipeProblems, load
from reasonrun.records import PreferenceExample, Problem, Rollout, Score, SFTExample
from reasonrun.rendering import Renderer
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows

SMALL = ["task.num_train=36", "task.num_dev=12", "task.num_test=8", "evaluate.num_samples=2"]


def execute(directory, *overrides, recipe="smoke_self_rationalize"):
    return run(load(recipe, [*SMALL, *overrides]), RunOptions(directory=directory), SilentProgress())


def rows(directory, step, record):
    return list(Rows.load(record, sorted((directory / "steps" / step).glob("rows-*.parquet")), directory / "derived"))


def scores(directory, number):
    judged = rows(directory, f"round-{number:03d}/judge", Rollout)
    read = rows(directory, f"round-{number:03d}/read", Score)
    return {rollout.id: score for rollout, score in zip(judged, read, strict=True)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("judge") / "run"
    return directory, execute(directory)


def test_rounds_draw_disjoint_items_and_go_on_from_the_judge_before(finished):
    directory, outcome = finished
    items = [{row.problem_id for row in rows(directory, f"round-00{n}/judge", Rollout)} for n in (1, 2)]
    assert [len(found) for found in items] == [20, 10] and not items[0] & items[1]
    steps = {row["step"]: row for row in outcome.rows}
    made = {step: steps[step]["weights"] for step in ("seed/train", "round-001/train", "round-002/train")}
    for number, before in ((1, "seed/train"), (2, "round-001/train")):
        fingerprint = json.loads((directory / f"steps/round-00{number}/train/step.json").read_text())
        text = json.dumps(fingerprint)
        assert text.count(made[before]) >= 2, "start and reference"
    assert outcome.result["nominees"]["seed_judge"] == {"step": "seed/train", "weights": made["seed/train"]}
    assert outcome.result["last"]["weights"] == made["round-002/train"]


def test_winners_have_the_gold_score_and_losers_are_two_away(finished):
    directory, _ = finished
    gold = {}
    for number in (1, 2):
        read = scores(directory, number)
        pairs = rows(directory, f"round-00{number}/pairs", PreferenceExample)
        assert pairs
        for duel in pairs:
            won, lost = (read[name] for name in duel.rollout_ids)
            assert won.correct and abs(int(won.answer) - int(lost.answer)) >= 2
            assert gold.setdefault(duel.problem_id, won.answer) == won.answer
            assert duel.chosen_ids != duel.rejected_ids


def test_the_first_judge_learns_gold_judgements_in_both_styles(finished):
    directory, _ = finished
    examples = rows(directory, "seed/gold", SFTExample)
    assert len(examples) == 2 * 36
    bare = [row for row in examples if len(row.segments) == 3]
    assert len(bare) == 36 and not any(row.segments[1].loss for row in bare)
    assert all(row.segments[-1].loss and not row.segments[0].loss for row in examples)
    renderer = Renderer.load(resolve(load("smoke_self_rationalize").model).path)
    gold = {row.id: row.reference for row in rows(directory, "problems/train", Problem)}
    for row in bare:
        given, learnt = row.segments[1:]
        assert renderer.decode(given.token_ids) == "[RESULT]"
        assert (
            renderer.decode(learnt.token_ids) == f" {gold[row.problem_id]}" and learnt.token_ids[-1] in renderer.eos_ids
        )


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["method.pairs.strategy=majority"], PreferenceExample),
        (["method.pairs.strategy=meta_judge", "method.pairs.margin=1"], PreferenceExample),
        (["method.learn=chosen"], SFTExample),
        (["method.judge.style=score_only", "evaluate.style=score_only"], PreferenceExample),
        (["method.pairs.balance=none", "method.pairs.num_pairs=[0]", "method.pairs.margin=1"], PreferenceExample),
    ],
)
def test_every_arm_runs_and_is_replayed_without_work(tmp_path, overrides, kind):
    outcome = execute(tmp_path / "run", *overrides)
    assert rows(tmp_path / "run", "round-001/pairs", kind)
    assert "judging" in outcome.result["test"]["last"]
    assert execute(tmp_path / "run", *overrides).already_finished
    (tmp_path / "run/_OK.json").unlink()
    again = execute(tmp_path / "run", *overrides)
    assert again.result == outcome.result and again.rows == outcome.rows


def test_the_meta_judge_rates_what_could_be_read_and_gold_is_not_asked(tmp_path, monkeypatch):
    outcome = execute(tmp_path / "run", "method.pairs.strategy=meta_judge", "method.pairs.margin=1")
    (rated,) = [row for row in outcome.rows if row["step"] == "round-001/rate"]
    read = scores(tmp_path / "run", 1)
    assert rated["num_rollouts"] == sum(score.answer is not None for score in read.values()) < len(read)
    asked = rows(tmp_path / "run", "round-001/rate/ask", Rollout)
    assert {row.parent_id for row in asked} == {name for name, score in read.items() if score.answer is not None}


def test_a_pair_of_scores_alone_begins_after_the_marker(tmp_path):
    execute(tmp_path / "run", "method.judge.style=score_only")
    judged = {row.id: row for row in rows(tmp_path / "run", "round-001/judge", Rollout)}
    for duel in rows(tmp_path / "run", "round-001/pairs", PreferenceExample):
        won, lost = (judged[name] for name in duel.rollout_ids)
        assert won.text.startswith("[RESULT]") and won.num_given_tokens
        assert duel.prefix_ids == won.prompt_ids + won.completion_ids[: won.num_given_tokens]
        assert duel.prefix_ids + duel.rejected_ids == lost.prompt_ids + lost.completion_ids


def test_no_rounds_end_with_the_judge_of_gold_judgements_and_more_go_on(tmp_path):
    first = execute(tmp_path / "run", "method.rounds=0")
    assert first.result["last"]["step"] == "seed/train"
    assert execute(tmp_path / "run").result["last"]["step"] == "round-002/train"


def test_a_judge_that_always_says_five_is_a_finding(tmp_path, monkeypatch):
    complete = Scripted._complete

    def always_five(self, request, problem, index):
        row = complete(self, request, problem, index)
        if self.skill <= self.settings.accuracy + self.settings.gain + 1e-9:  # the judges before the last round
            return row
        ids = (*self._renderer.encode(" 5" if request.num_given else "Fine. [RESULT] 5"), self._renderer.eos_ids[0])
        given = "[RESULT]" if request.num_given else ""
        text = given + self._renderer.decode(ids)
        return row.model_copy(update={"token_ids": ids, "text": text, "finish_reason": "stop"})

    monkeypatch.setattr(Scripted, "_complete", always_five)
    arguments = ["train", "smoke_self_rationalize", *SMALL, "method.rounds=1", "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 5, result.output
    assert "finding: greedy: judgements collapse: 100.0% are 5" in result.output


def test_items_without_a_qualifying_pair_end_with_their_reasons(tmp_path):
    with pytest.raises(Finding, match="no_pair"):
        execute(tmp_path / "run", "engine.accuracy=1", "engine.spread=0", "engine.unanswered=0", "engine.truncated=0")


def test_gold_judgements_come_from_items_of_their_own_if_some_are_chosen(tmp_path):
    execute(tmp_path / "run", "method.seed_judge.num_items=6")
    learnt = {row.problem_id for row in rows(tmp_path / "run", "seed/gold", SFTExample)}
    judged = {row.problem_id for n in (1, 2) for row in rows(tmp_path / "run", f"round-00{n}/judge", Rollout)}
    assert len(learnt) == 6 and len(judged) == 30 and not learnt & judged


def test_pairs_without_a_counterpart_say_so(tmp_path):
    with pytest.raises(Finding, match="no_counterpart_of_its_scores"):
        execute(
            tmp_path / "run",
            "method.pairs.balance=both",
            "method.pairs.num_pairs=[0]",
            "method.num_items=[3]",
            "method.judge.num_samples=2",
        )


def test_more_items_than_there_are_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"30 \+ 10 different problems.*has 36"):
        execute(tmp_path / "run", "method.num_items=[30,10]")


def test_what_the_task_lacks_is_refused_by_its_setting():
    with pytest.raises(RecipeProblems, match=r"needs gold_score, which the task arith does not offer"):
        load("smoke_self_rationalize", ["task.name=arith"])
    with pytest.raises(RecipeProblems, match=r"method.judge.style.*needs poem, which the task arith_judge does not"):
        load("smoke_self_rationalize", ["method.judge.style=poem"])
    with pytest.raises(RecipeProblems, match=r"num_items.*greater than 0"):
        load("smoke_self_rationalize", ["method.num_items=[4,0]"])
    with pytest.raises(RecipeProblems, match="margin"):
        load("smoke_self_rationalize", ["method.pairs.margin=5"])


def recipe_on(tmp_path, rows, settings="", method=""):
    """A recipe of the judge's task on a file of ``rows``."""
    file = write(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [model: tiny, engine: scripted, launcher: local, _self_]\n"
        f"task: {{name: judge, train_path: {file}, num_dev: 2{settings}}}\n"
        f"method: {{name: self_rationalize, num_items: [2, 1]{method}}}\n"
    )
    return str(recipe)


def test_pairs_asked_in_both_orders_have_no_scores_to_learn_from(tmp_path):
    rows_of_pairs = [pair(number) for number in range(6)]
    with pytest.raises(RecipeProblems, match=r"needs gold_score, which the task judge with these settings does not"):
        load(recipe_on(tmp_path, rows_of_pairs, ", mode: pairwise, num_test: 1"))


def test_what_is_missing_at_the_end_is_said_at_the_beginning(tmp_path):
    recipe = recipe_on(tmp_path, [own(number) for number in range(9)])
    with pytest.raises(RecipeError, match="split test is empty"):
        run(load(recipe), RunOptions(directory=tmp_path / "run"), SilentProgress())
    assert not list((tmp_path / "run").glob("steps/*"))


def test_the_plan_counts_rounds_in_proportion():
    planned = {step.step: step for step in plan(load("smoke_self_rationalize"), Assumptions(), SilentProgress()).steps}
    assert planned["round-001/judge"].units.expected == 80 and planned["round-002/judge"].units.expected == 40
    assert planned["seed/train"].units.expected == 4


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_run_does_not_depend_on_the_hash_seed(finished, tmp_path, hash_seed):
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", "smoke_self_rationalize", *SMALL, "--json"]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [*command, "--run", "run"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (0, 5), done.stderr
    assert json.loads(done.stdout)["result"]["last"]["weights"] == finished[1].result["last"]["weights"]


def test_trainers_and_engines_do_not_know_the_method():
    package = Path(reasonrun.__file__).parent
    assert len((package / "methods/self_rationalize.py").read_text("utf-8").splitlines()) <= 100
    sources = [
        path.read_text("utf-8") for folder in ("trainers", "engines") for path in (package / folder).glob("*.py")
    ]
    assert not any("rationaliz" in source.casefold() for source in sources)


def test_a_further_judge_is_merged_with_the_first_one(tmp_path):
    merging = ["+models.pairwise.name=tiny", "method.seed_judge.merge_role=pairwise", "method.rounds=1"]
    outcome = execute(tmp_path / "run", *merging)
    steps = {row["step"]: row for row in outcome.rows}
    assert steps["seed/merge"]["verb"] == "merge"
    assert outcome.result["nominees"]["seed_judge"]["step"] == "seed/merge"
