"""Runs whose evaluations ask several times: the table of rounds, the last lines, plans, sweeps and samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import SMALL, MakeRun

from reasonrun.cli.progress import SilentProgress
from reasonrun.planning import Assumptions, compare, plan
from reasonrun.recipe import load
from reasonrun.records import Graded
from reasonrun.report.rollouts import RolloutFilters, read_rollouts
from reasonrun.report.rounds import format_result, format_table, round_table
from reasonrun.report.run_record import open_run
from reasonrun.report.sweeps import sweep_table
from reasonrun.sweeping import SweepOptions, expand, run_sweep

TURNS = "evaluate.turns=2"


def points(change: dict[str, object]) -> str:
    return f"{100 * float(str(change['delta'])):+.1f} ["


def test_the_table_of_rounds_has_the_second_attempt_and_its_gain(make_run: MakeRun) -> None:
    run = open_run(make_run(TURNS))
    header, *lines = format_table(round_table(run.rows, []))
    names = ["dev greedy ", "dev greedy t2", "delta", "dev sampled ", "dev sampled t2", "tried"]
    assert [header.index(name) for name in names] == sorted(header.index(name) for name in names)
    assert header.count("delta") == 2
    rows = [row for row in run.rows if row["verb"] == "evaluate" and row["split"] == "dev"]
    for line, row in zip(lines, rows, strict=True):
        sections = [row["correction"][part] for part in ("greedy", "sampled")]
        shown = [
            text
            for part, section in zip(("greedy", "sampled"), sections, strict=True)
            for text in (
                f"{row[part]['accuracy']:.1%} [",
                f"{section['attempts'][1]['accuracy']:.1%} [",
                points(section["changes"][0]),
            )
        ]
        place = 0
        for text in shown:
            place = line.index(text, place) + len(text)


def test_runs_of_one_attempt_show_no_such_columns(make_run: MakeRun) -> None:
    run = open_run(make_run())
    text = "\n".join(format_table(round_table(run.rows, [])) + format_result(run.result or {}))
    assert "delta" not in text and "t2" not in text and text.count("test sampled  base ") == 1


def test_the_last_lines_have_base_last_and_best_of_both_attempts(make_run: MakeRun) -> None:
    result = open_run(make_run(TURNS)).result or {}
    lines = format_result(result)
    assert [" ".join(line.split()[:3]) for line in lines] == [
        *("test greedy base", "test greedy t2", "test greedy delta"),
        *("test sampled base", "test sampled t2", "test sampled delta"),
    ]
    for which in ("base", "last", "best"):
        section = result["test"][which]["correction"]["sampled"]
        assert f"{which} {section['attempts'][1]['accuracy']:.1%} [" in lines[4]
        assert f"{which} {points(section['changes'][0])}" in lines[5]


@pytest.mark.promise("G20", "plans against runs")
def test_the_plan_of_several_attempts_is_what_is_run(make_run: MakeRun) -> None:
    planned = plan(load("smoke_star", [*SMALL, TURNS]), Assumptions(), SilentProgress())
    second = {step.step: step for step in planned.steps if step.step.endswith("/test-last/sampled-turn-2")}
    (step,) = second.values()
    assert step.units.exact and step.units.expected == 20 * 4 and step.tokens.worst == 20 * 4 * 64
    found = compare(planned, open_run(make_run(TURNS)).rows)
    assert not found.other_size and not found.not_planned and not found.not_run


def test_a_recipe_of_the_real_engine_is_planned_with_two_turns() -> None:
    planned = plan(load("star_arith", [TURNS]), Assumptions(), SilentProgress())
    greedy = [step for step in planned.steps if "/evaluate/" in step.step and step.step.endswith("/greedy-turn-2")]
    assert len(greedy) == 4 and all(step.units.expected == 300 for step in greedy)


def test_turns_show_with_their_verdicts(make_run: MakeRun) -> None:
    run = open_run(make_run(TURNS))
    page = read_rollouts(run, RolloutFilters(step="final-trainings=2/test-last/greedy-turn-2", limit=100))
    row = next(row for row in run.rows if row["step"] == "final-trainings=2/test-last/grade-greedy-turn-2")
    assert (page.num_rollouts, len(page.shown)) == (20, 20)
    verdicts = [Graded(rollout=shown.rollout, score=shown.scores[0][1]).correct for shown in page.shown]
    assert sum(verdicts) == row["num_correct"]
    assert all(shown.rollout.parent_id and shown.problem is not None for shown in page.shown)


def test_summaries_of_a_sweep_hold_the_tables_of_base_last_and_best(tmp_path: Path) -> None:
    runs = expand("smoke_star", [*SMALL[:3], "method.rounds=1", "preflight=off", TURNS, "seed=0,1"])
    summaries = list(run_sweep(runs, SweepOptions(out=tmp_path), SilentProgress()))
    stored = [json.loads(path.read_text()) for path in sorted((tmp_path / "summaries").glob("*.json"))]
    assert [set(one["test"]) for one in stored] == [{"base", "last", "best"}] * 2
    for one in stored:
        lines = (tmp_path / one["run"] / "metrics.jsonl").read_text().splitlines()
        rows = {row["step"]: row for row in map(json.loads, lines)}
        assert one["test"]["last"]["correction"] == rows["final-trainings=1/test-last"]["correction"]
        dev = rows["round-001/evaluate"]["correction"]["greedy"]["attempts"][1]["accuracy"]
        assert one["dev"][0]["greedy_last_attempt"] == dev
    (arm,) = sweep_table(summaries).arms
    deltas = [one["test"]["last"]["correction"]["sampled"]["changes"][0]["delta"] for one in stored]
    assert arm.correction["sampled t1→t2 delta"].mean == pytest.approx(sum(deltas) / 2)


def test_a_sweep_of_measurements_alone_has_them_too(tmp_path: Path) -> None:
    runs = expand("eval", ["engine=scripted", "task.num_test=10", TURNS])
    (summary,) = run_sweep(runs, SweepOptions(out=tmp_path), SilentProgress())
    assert summary["test"]["last"]["correction"]["greedy"]["changes"][0]["num_rows"] == 10
