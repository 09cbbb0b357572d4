"""Two runs side by side: numbers by hand, pairs that must not be compared, runs that are not finished."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_runs import MakeRun

from reasonrun.errors import RecipeError
from reasonrun.ledger.catalogue import read_lines
from reasonrun.ledger.run_dir import RunDir
from reasonrun.metrics import mcnemar_exact
from reasonrun.records import Problem
from reasonrun.report.comparison import (
    ABSENT,
    RecipeDifference,
    compare_parts,
    compare_runs,
    cost,
    mismatches,
    recipe_differences,
)
from reasonrun.report.comparison_text import describe_comparison, verdict
from reasonrun.report.evaluations import EvaluationPart, Item, evaluation_steps, read_part
from reasonrun.report.run_record import attempt_notes, open_run

STRONGER = "engine.accuracy=0.8"


def part_of(counts: list[int], num_samples: int = 1, **settings: object) -> EvaluationPart:
    """An evaluation whose n-th problem was right that often."""
    items = {
        f"p{n}": Item(reference=str(n), prompt="asked", num_correct=count, num_samples=num_samples)
        for n, count in enumerate(counts)
    }
    known = {"style": "plain", "num_samples": num_samples, "seed": 17, "temperature": 0.0, "max_new_tokens": 64}
    return EvaluationPart(name="test last", part="greedy", split="test", settings=known | settings, items=items)


def test_flips_by_hand() -> None:
    # Items: 2 right in both, 5 wrong -> right, 1 right -> wrong, 2 wrong in both.
    a = part_of([1, 1, 0, 0, 0, 0, 0, 1, 0, 0])
    b = part_of([1, 1, 1, 1, 1, 1, 1, 0, 0, 0])
    found = compare_parts(a, b)
    assert (found.baseline, found.other) == (0.3, 0.7)
    assert (found.num_improved, found.num_worsened) == (5, 1)
    assert found.mcnemar_p == pytest.approx(2 * (1 + 6) / 2**6)  # 0 or 1 heads of 6 fair flips, both tails
    assert found.difference.difference == pytest.approx(0.4)
    # Differences: five of 1, one of -1, four of 0. Their squares sum to 6, so sd^2 = (6 - 10 * 0.4^2) / 9 = 4.4 / 9 and
    # n = (1.959964 + 0.841621)^2 * (4.4 / 9) / 0.4^2 = 7.848880 * 3.055556 = 23.98.
    assert found.items_needed == 24
    back = compare_parts(b, a)
    assert back.difference.difference == pytest.approx(-0.4) and (back.num_improved, back.num_worsened) == (1, 5)


def test_items_are_paired_by_id_and_not_by_place() -> None:
    a, b = part_of([1, 1, 0, 0]), part_of([1, 1, 0, 0])
    b = replace(b, items=dict(reversed(b.items.items())))
    found = compare_parts(a, b)
    assert (found.num_improved, found.num_worsened) == (0, 0) and found.difference.high == 0.0


def test_several_samples_have_shares_and_no_mcnemar() -> None:
    found = compare_parts(part_of([0, 2, 4, 4], 4), part_of([1, 2, 4, 3], 4))
    assert (found.baseline, found.other, found.mcnemar_p) == (0.625, 0.625, None)
    assert (found.num_improved, found.num_worsened) == (1, 1)
    assert found.items_needed is None
    assert verdict(found) == "not distinguishable: the difference is 0"


def test_verdicts() -> None:
    def said(a: list[int], b: list[int]) -> str:
        return verdict(compare_parts(part_of(a), part_of(b)))

    assert said([0] * 30, [1] * 15 + [0] * 15) == "better"
    assert said([1] * 30, [1] * 15 + [0] * 15) == "worse"
    assert said([1, 0], [1, 0]) == "not distinguishable: the same on every item"
    # One of four improves: mean 0.25, sd^2 = (1 - 4 / 16) / 3 = 0.25; n = 7.848880 * 0.25 / 0.0625 = 31.4
    assert said([0, 0, 0, 0], [1, 0, 0, 0]) == "not distinguishable; needs about 32 items"


def test_an_interval_without_0_is_not_enough_when_the_exact_test_disagrees() -> None:
    # 4 of 40 wrong -> right, none back: p = 2 / 2^4. sd^2 = (4 - 40 * 0.01) / 39, n = 7.848880 * 0.0923077 / 0.01 = 72.5
    found = compare_parts(part_of([0] * 40), part_of([1] * 4 + [0] * 36))
    assert found.difference.low > 0 and found.mcnemar_p == 0.125
    assert verdict(found) == "not distinguishable; needs about 73 items"
    assert verdict(compare_parts(part_of([0] * 40), part_of([1] * 6 + [0] * 34))) == "better"  # p = 2 / 2^6


def test_unequal_evaluations_are_told_apart() -> None:
    a = part_of([1, 0, 1])
    assert mismatches(a, part_of([0, 0, 0])) == []
    assert mismatches(a, part_of([1, 0])) == ["1 problems only in the first: p2"]
    assert mismatches(part_of([1] * 2), part_of([1] * 7)) == ["5 problems only in the second: p2, p3, p4, …"]
    other = {**a.items, "p1": Item(reference="9", prompt="asked", num_samples=1)}
    assert mismatches(a, replace(a, items=other)) == ["1 problems with another reference: p1"]
    other = {**a.items, "p0": Item(reference="0", prompt="asked otherwise", num_samples=1)}
    assert mismatches(a, replace(a, items=other)) == ["1 problems asked with another prompt: p0"]
    for setting, value in (("temperature", 0.5), ("seed", 18), ("style", "few_shot"), ("max_new_tokens", 65)):
        assert mismatches(a, part_of([1, 0, 1], **{setting: value})) == [
            f"{setting} is {a.settings[setting]} and {value}"
        ]
    assert mismatches(a, part_of([2, 0, 2], num_samples=2)) == ["num_samples is 1 and 2"]


def test_recipe_differences() -> None:
    old = {"seed": 0, "method": {"name": "star", "rounds": 3, "sft": {"lr": 1e-6}}, "engine": {"name": "hf", "b": 1}}
    new = {
        "seed": 1,
        "method": {"name": "star", "rounds": 3, "sft": {"lr": 1e-5}, "cap": 0},
        "engine": {"name": "scripted", "c": 2},
    }
    assert recipe_differences(old, new) == [
        RecipeDifference(path="engine.name", old="hf", new="scripted"),
        RecipeDifference(path="method.cap", old=ABSENT, new=0),
        RecipeDifference(path="method.sft.lr", old=1e-6, new=1e-5),
        RecipeDifference(path="seed", old=0, new=1),
    ]
    assert recipe_differences(old, old) == []


def right_by_problem(run: Path, evaluation: str, part: str) -> dict[str, list[bool]]:
    """The verdicts of an evaluation, read without the code under test."""
    folder = run / "steps" / evaluation
    ids = pq.read_table(folder / part / "rows-00000.parquet", columns=["problem_id"]).column(0).to_pylist()
    values = pq.read_table(folder / f"grade-{part}" / "rows-00000.parquet", columns=["value"]).column(0).to_pylist()
    verdicts: dict[str, list[bool]] = {}
    for problem_id, value in zip(ids, values, strict=True):
        verdicts.setdefault(problem_id, []).append(value == 1.0)
    return verdicts


def test_real_runs_are_compared_item_by_item(make_run: MakeRun) -> None:
    a, b = make_run(), make_run(STRONGER)
    compared = compare_runs(open_run(a), open_run(b))
    assert [f"{part.name} {part.part}" for part in compared.parts] == [
        f"{name} {part}"
        for name in (
            "test base",
            "test last",
            "test best",
            "round-001/evaluate",
            "round-002/evaluate",
            "final/evaluate",
        )
        for part in ("greedy", "sampled")
    ]
    assert compared.recipe == (RecipeDifference(path="engine.accuracy", old=0.4, new=0.8),)
    greedy = next(part for part in compared.parts if (part.name, part.part) == ("test last", "greedy"))
    old = right_by_problem(a, "final-trainings=2/test-last", "greedy")
    new = right_by_problem(b, "final-trainings=2/test-last", "greedy")
    gained = sum(new[i][0] and not old[i][0] for i in old)
    lost = sum(old[i][0] and not new[i][0] for i in old)
    assert len(old) == 20 and gained > 0
    assert (greedy.num_improved, greedy.num_worsened) == (gained, lost)
    assert greedy.difference.difference == pytest.approx((gained - lost) / 20)
    assert greedy.mcnemar_p == mcnemar_exact(lost, gained)
    sampled = next(part for part in compared.parts if (part.name, part.part) == ("test base", "sampled"))
    shares = {i: sum(v) / 4 for i, v in right_by_problem(b, "final-trainings=2/test-base", "sampled").items()}
    assert (sampled.num_samples, sampled.other) == (4, pytest.approx(sum(shares.values()) / 20))


def test_scores_are_those_of_the_metrics_record(make_run: MakeRun) -> None:
    run = open_run(make_run())
    rows = {row["step"]: row for row in run.rows if row["verb"] == "evaluate"}
    for name, step in evaluation_steps(run).items():
        for part in ("greedy", "sampled"):
            shares = [item.share for item in read_part(run, name, step, part).items.values()]
            assert sum(shares) / len(shares) == pytest.approx(rows[step][part]["accuracy"])


def test_the_best_checkpoint_stands_for_itself_when_it_was_not_measured_apart(make_run: MakeRun) -> None:
    run = open_run(make_run("method.rounds=1", STRONGER, "engine.gain=0.2"))
    assert run.result is not None and run.result["best"] == run.result["last"]
    assert "final-trainings=1/test-best" not in run.names("evaluate")
    assert evaluation_steps(run)["test best"] == evaluation_steps(run)["test last"]


def test_costs_add_up(make_run: MakeRun) -> None:
    path = make_run()
    rows, took = read_lines(path / "metrics.jsonl"), cost(open_run(path))
    sampled = [row for row in rows if row["verb"] == "sample"]
    assert took.num_generated_tokens + took.num_evaluation_tokens == sum(r["num_completion_tokens"] for r in sampled)
    assert took.num_generated_tokens == sum(r["num_completion_tokens"] for r in sampled if "/sample" in r["step"][:17])
    assert took.num_optimizer_steps == 40 + 48  # steps_start, and that times steps_growth 1.2
    assert took.seconds == pytest.approx(sum(note["seconds"] for note in attempt_notes(path)), abs=1e-3)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("task.num_test=16", r"4 problems only in the first: \w+, \w+, \w+, … \(test base greedy, test base sampled"),
        ("evaluate.num_samples=2", r"num_samples is 4 and 2 \(test base sampled"),
        ("evaluate.seed=3", r"seed is 17 and 3"),
        ("evaluate.temperature=0.5", r"temperature is 1.0 and 0.5 \(test base sampled, test last sampled"),
        ("evaluate.style=few_shot", r"style is plain and few_shot"),
        ("evaluate.max_new_tokens=60", r"max_new_tokens is 64 and 60"),
        ("task.seed=5", r"20 problems only in the second"),
    ],
)
def test_runs_that_were_not_evaluated_alike_are_refused(make_run: MakeRun, override: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        compare_runs(open_run(make_run()), open_run(make_run(override)))


def test_second_attempts_are_compared_item_by_item_although_their_prompts_hold_other_answers(make_run: MakeRun) -> None:
    paths = make_run("evaluate.turns=2"), make_run("evaluate.turns=2", STRONGER)
    a, b = (open_run(path) for path in paths)
    compared = compare_runs(a, b)
    parts = [part.part for part in compared.parts if part.name == "test last"]
    assert parts == ["greedy", "greedy turn 2", "sampled", "sampled turn 2"]
    for part, step, num_samples in (("greedy turn 2", "greedy-turn-2", 1), ("sampled turn 2", "sampled-turn-2", 4)):
        found = next(p for p in compared.parts if (p.name, p.part) == ("test last", part))
        old, new = (right_by_problem(path, "final-trainings=2/test-last", step) for path in paths)
        assert (found.num_items, found.num_samples) == (20, num_samples)
        assert found.baseline == pytest.approx(sum(sum(v) / num_samples for v in old.values()) / 20)
        assert found.num_improved == sum(sum(new[i]) > sum(old[i]) for i in old)
    assert any(line.startswith("test last greedy turn 2") for line in describe_comparison(a, b, compared))
    assert compare_runs(open_run(make_run()), a).only_other[0] == "test base greedy turn 2"


def test_another_question_or_another_turn_is_another_prompt(make_run: MakeRun) -> None:
    run = open_run(make_run("evaluate.turns=2"))
    step = evaluation_steps(run)["test last"]
    first, second = (read_part(run, "test last", step, part) for part in ("greedy", "greedy turn 2"))
    assert first.settings | {"seed": 17} == second.settings | {"seed": 17}
    assert all(first.items[i].prompt != item.prompt for i, item in second.items.items())  # it asks once more
    assert len({item.prompt for item in second.items.values()}) == len(second.items)  # and holds the question
    few = open_run(make_run("evaluate.turns=2", "evaluate.style=few_shot"))
    shown = read_part(few, "test last", evaluation_steps(few)["test last"], "greedy turn 2")
    assert shown.settings["style"] == "few_shot"
    assert all(shown.items[i].prompt != item.prompt for i, item in second.items.items())


def test_a_changed_reference_is_found_in_the_tables(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(make_run(), path)
    run = open_run(path)
    problems = [p for part in run.table(Problem, "problems/test").parts() for p in part]
    changed = [problems[0].model_copy(update={"reference": "-1"}), *problems[1:]]
    fingerprint = run.fingerprint("problems/test")
    shutil.rmtree(path / "steps" / "problems" / "test")
    (path / "_OK.json").unlink()
    with RunDir.open(path, identity={}, command="test") as run_dir:
        step: Any = run_dir.step("problems/test", fingerprint)
        step.seal_table("rows", Problem, changed)
        step.commit({"num_problems": 20})
    with pytest.raises(RecipeError, match=f"1 problems with another reference: {problems[0].id} "):
        compare_runs(open_run(make_run()), open_run(path))


def test_an_unfinished_run_is_compared_on_what_it_has(make_run: MakeRun) -> None:
    whole, part = open_run(make_run()), open_run(make_run("engine.unit_rows=32", "engine.fail_at_unit=2"))
    assert (whole.state, part.state) == ("finished", "unfinished")
    compared = compare_runs(whole, part)
    assert [f"{p.name} {p.part}" for p in compared.parts] == [
        "round-001/evaluate greedy",
        "round-001/evaluate sampled",
    ]
    assert len(compared.only_baseline) == 10 and compared.only_other == ()
    text = describe_comparison(whole, part, compared)
    assert text[-1].startswith(f"only {whole.path} (finished) has: test base greedy, test base sampled, test last")


def test_nothing_in_common_is_an_error_that_lists_both(make_run: MakeRun) -> None:
    whole, empty = open_run(make_run()), open_run(make_run("engine.fail_at_unit=1"))
    with pytest.raises(RecipeError, match=r"no evaluation in common\s+the first has test base greedy.*second has none"):
        compare_runs(whole, empty)
