"""G20, G21: every number of a report is counted again from the rows that ``samples`` shows, and a plan is what was run.

The rows come from the command line alone, as a doubting reader would get them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bad_input import reasonrun

from promises import Counted

pytestmark = pytest.mark.attack

SMALL = {
    "smoke_star": ["task.num_train=14", "task.num_dev=6", "task.num_test=6", "method.rounds=2"],
    "smoke_step_dpo": ["task.num_train=14", "task.num_dev=6", "task.num_test=6"],
    "smoke_score": ["task.num_train=14", "task.num_dev=6", "task.num_test=6"],
    "smoke_self_rationalize": [],
}
SEEDS = (0, 1)
FINISHED = (0, 5)  # 5: with something to say


@pytest.fixture(
    scope="module", params=[(recipe, seed) for recipe in SMALL for seed in SEEDS], ids=lambda p: f"{p[0]}-{p[1]}"
)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run as its own commands tell it: plan, table, status."""
    recipe, seed = request.param
    run = tmp_path_factory.mktemp("numbers") / "run"
    arguments = [recipe, *SMALL[recipe], f"seed={seed}"]
    plan = json.loads(reasonrun("plan", *arguments, "--json").out)
    done = reasonrun("train", *arguments, "--run", str(run))
    assert done.exit_code in FINISHED, done.text
    return {"run": run, "plan": plan, "text": done.out, **json.loads(reasonrun("status", str(run), "--json").out)}


def rows(run: Path, step: str) -> list[dict[str, Any]]:
    """All rollouts of a step, evaluation or not, each with its scores."""
    done = reasonrun("samples", str(run), "--step", step, "--evaluation", "--limit", "100000", "--prompt", "--json")
    assert done.exit_code == 0, done.text
    found = json.loads(done.out)
    shown = [row for row in found["rollouts"] if row["step"] == step]
    assert found["num_matching"] == len(found["rollouts"])
    return shown


def scored_by(rollouts: list[dict[str, Any]], step: str) -> list[dict[str, Any]]:
    """The scores that a step gave, a rollout at a time."""
    scores = [[score for score in row["scores"] if score["step"] == step] for row in rollouts]
    assert all(len(of_row) == 1 for of_row in scores), f"{step} did not score every rollout once"
    return [of_row[0] for of_row in scores]


def test_every_count_of_the_steps_is_that_of_the_rows(told: dict[str, Any], counted: Counted) -> None:
    run, sampled, num_counts = told["run"], {}, 0
    for step in told["steps"]:
        if step["verb"] in ("sample", "train") and "num_rollouts" in step:
            rollouts = rows(run, step["step"])
            assert len(rollouts) == step["num_rollouts"]
            assert sum(row["num_tokens"] for row in rollouts) == step["num_completion_tokens"]
            if step["verb"] == "sample":
                assert dict(Counter(row["finish_reason"] for row in rollouts)) == step["finish_reasons"]
            assert all(row["question"] and row["prompt"] and "completion" in row for row in rollouts)
            sampled[step["step"]] = rollouts
            num_counts += 3
        if step["verb"] in ("grade", "judge") and "reasons" in step:
            (source,) = [
                rollouts
                for rollouts in sampled.values()
                if rollouts and any(score["step"] == step["step"] for score in rollouts[0]["scores"])
            ] or [[]]
            if not source:
                continue
            scores = scored_by(source, step["step"])
            assert dict(Counter(score["reason"] for score in scores)) == step["reasons"]
            assert sum(score["value"] == 1 for score in scores) == step["num_correct"]
            num_counts += len(step["reasons"]) + 1
    assert num_counts > 30
    counted("G21", "counts of steps", num_counts)


def test_every_accuracy_is_the_mean_of_its_rows(told: dict[str, Any], counted: Counted) -> None:
    num_figures = 0
    for step in told["steps"]:
        if step["verb"] != "evaluate":
            continue
        for part in ("greedy", "sampled"):
            if part not in step or "accuracy" not in step[part]:
                continue
            scores = scored_by(rows(told["run"], f"{step['step']}/{part}"), f"{step['step']}/grade-{part}")
            values = [score["value"] or 0 for score in scores]
            assert step[part]["num_samples"] == len(values)
            assert step[part]["accuracy"] == pytest.approx(sum(values) / len(values), abs=1e-12)
            num_figures += 1
    assert num_figures > 0 or told["run"].joinpath("steps/seed").exists()  # a judge has no right answers, but scores
    counted("G21", "accuracies", num_figures)


def test_the_table_of_rounds_is_a_sum_of_rows(told: dict[str, Any], counted: Counted) -> None:
    lines = [line for line in told["text"].splitlines() if re.match(r"(round|preflight|round-\d+) ", line)]
    names = re.split(r"  +", lines[0].strip())
    assert {"tried", "right", "tokens"} <= set(names)
    for line in lines[1:]:
        cells = dict(zip(names, re.split(r"  +", line.strip()), strict=True))
        if cells["tried"] == "-":
            continue
        number = cells["round"].removeprefix("round-")
        where = ["--round", str(int(number))] if number.isdigit() else ["--step", "preflight"]
        found = json.loads(reasonrun("samples", str(told["run"]), *where, "--limit", "100000", "--json").out)
        rollouts = found["rollouts"]
        assert int(cells["tokens"].replace(",", "")) == sum(row["num_tokens"] for row in rollouts), line
        graded = [row for row in rollouts if row["scores"]]
        right = sum(any(score["value"] == 1 for score in row["scores"]) for row in graded)
        assert int(cells["tried"].replace(",", "")) == len(graded), line
        assert int(cells["right"].replace(",", "")) == right, line
        counted("G21", "cells of tables", 3)


UNITS = {"completions": "num_rollouts", "rows": "num_rows", "optimizer steps": "num_steps", "pairs": "num_pairs"}


def test_a_plan_is_what_the_run_does_where_it_is_sure_and_no_less_elsewhere(
    told: dict[str, Any], counted: Counted
) -> None:
    made, num_exact, num_bounded = {step["step"]: step for step in told["steps"]}, 0, 0
    assert told["plan"]["finding"] is None
    for step in told["plan"]["steps"]:
        done, units, key = made.get(step["step"]), step["units"], UNITS.get(step["unit"], "")
        if done is None:  # such as a test of the best policy, where the last one is the best
            assert not units["exact"], f"{step['step']} was planned and not made"
            continue
        if key in done:
            assert done[key] == units["expected"] if units["exact"] else done[key] <= units["worst"], (step, done)
            num_exact, num_bounded = num_exact + units["exact"], num_bounded + (not units["exact"])
        if "num_completion_tokens" in done:
            assert done["num_completion_tokens"] <= step["tokens"]["worst"], (step, done)
            num_bounded += 1
    planned = {step["step"]: step["verb"] for step in told["plan"]["steps"]}
    not_planned = made.keys() - planned.keys()
    assert not {made[name]["verb"] for name in not_planned} & set(planned.values()), (
        f"made and not planned: {not_planned}"
    )
    counted("G20", "exact steps of plans", num_exact)
    counted("G20", "bounded ones", num_bounded)
