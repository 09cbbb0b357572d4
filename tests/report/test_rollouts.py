"""Which rollouts of a run are shown, with which verdicts."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_runs import MakeRun, score, write_handmade_run

from reasonrun.errors import RecipeError, RunFailed
from reasonrun.ledger.catalogue import read_lines
from reasonrun.ledger.run_dir import RunDir
from reasonrun.records import Score
from reasonrun.report.printable import printable
from reasonrun.report.rollout_text import describe_page, describe_rollout
from reasonrun.report.rollouts import RolloutFilters, RolloutPage, choose_steps, find_problem, read_rollouts
from reasonrun.report.run_record import open_run


def page_of(path: Path, **filters: Any) -> RolloutPage:
    return read_rollouts(open_run(path), RolloutFilters(**filters))


def ids(page: RolloutPage) -> list[str]:
    return [shown.rollout.id for shown in page.shown]


def test_every_grader_of_a_rollout_is_shown_and_none_is_said(handmade: Path) -> None:
    page = page_of(handmade)
    assert ids(page) == ["key-aa11-0", "key-aa11-1", "key-aa22-0", "second"]
    verdicts = [[(step, s.reason, s.grader) for step, s in shown.scores] for shown in page.shown]
    assert verdicts[1] == [("round-001/grade", "wrong", "number-1"), ("round-001/grade-judge", "deadline", "judge-2")]
    assert verdicts[3] == []
    assert "not graded" in describe_rollout(page.shown[3], with_prompt=False)[-1]
    assert page.verdicts == Counter({"correct": 2, "wrong": 2, "truncated": 1, "deadline": 1, "not graded": 1})


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"verdict": "correct"}, ["key-aa11-0"]),
        ({"verdict": "wrong"}, ["key-aa11-1", "key-aa22-0"]),  # by one grader each
        ({"verdict": "incorrect", "step": "round-001/grade"}, ["key-aa11-1", "key-aa22-0"]),
        ({"verdict": "truncated"}, ["key-aa22-0"]),
        ({"verdict": "ungraded"}, ["key-aa11-1", "second"]),  # a grader that failed, and no grader
        ({"min_tokens": 5}, ["key-aa11-0", "key-aa11-1"]),
        ({"max_tokens": 4}, ["key-aa22-0", "second"]),
        ({"min_tokens": 4, "max_tokens": 5}, ["key-aa11-0", "second"]),
        ({"round": 2}, ["second"]),
        ({"problem": "aa1"}, ["key-aa11-0", "key-aa11-1", "second"]),
        ({"problem": "aa11", "verdict": "wrong"}, ["key-aa11-1"]),
        ({"step": "round-002"}, ["second"]),
        ({"limit": 2}, ["key-aa11-0", "key-aa11-1"]),
    ],
)
def test_filters(handmade: Path, filters: dict[str, object], expected: list[str]) -> None:
    assert ids(page_of(handmade, **filters)) == expected


def test_a_rollout_as_text(handmade: Path) -> None:
    first, second, _, last = page_of(handmade).shown
    assert [printable(line) for line in describe_rollout(first, with_prompt=True)] == [
        "round 1  round-001/sample  problem aa11  sample 0  5 tokens, stop",
        "  question    What is 3 + 4?",
        "  prompt      system: Think.",
        "              user: Q aa11",
        "  completion  Answer: 78",
        "              \tend",
        "  reference   7",
        "  verdict     correct: score 1, answer 78 (number-1, round-001/grade)",
        "  verdict     correct: score 1, answer 7 (judge-2, round-001/grade-judge)",
    ]
    assert "  verdict     deadline: no score, no answer read (judge-2, round-001/grade-judge)" in describe_rollout(
        second, with_prompt=False
    )
    assert "  parent      key-aa11-1" in describe_rollout(last, with_prompt=False)


def test_what_is_unfinished_or_unlisted_is_said(handmade: Path, tmp_path: Path) -> None:
    lines = describe_page(open_run(handmade), page_of(handmade))
    assert lines[-1] == f"{handmade} is unfinished: 1 steps are begun and not committed, not shown"
    copy = tmp_path / "copy"
    shutil.copytree(handmade, copy)
    rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(rows[:-1]) + rows[-1][:20])  # a torn last line
    page = page_of(copy)
    assert ids(page) == ["key-aa11-0", "key-aa11-1", "key-aa22-0"]
    assert "1 committed steps that metrics.jsonl does not list" in describe_page(open_run(copy), page)[1]


def test_a_listed_step_that_is_not_committed_any_more_is_not_read(handmade: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(handmade, copy)
    (copy / "steps" / "round-002" / "sample" / "_OK.json").unlink()  # as between --redo and its new commit
    assert ids(page_of(copy)) == ["key-aa11-0", "key-aa11-1", "key-aa22-0"]
    assert open_run(copy).num_unfinished == 2


def test_an_empty_result_names_the_filter_and_what_there_is(handmade: Path) -> None:
    text = describe_page(open_run(handmade), page_of(handmade, problem="aa22", min_tokens=2, max_tokens=2))
    assert text[:4] == [
        "no rollout matches, of 4 rollouts in 2 steps: round-001/sample, round-002/sample",
        "  --problem leaves 1",
        "  --min-tokens 2 leaves 1",
        "  --max-tokens 2 leaves 0; completions have 3 to 3 tokens",
    ]
    text = describe_page(open_run(handmade), page_of(handmade, round=1, verdict="right", min_tokens=1))
    assert text[1:3] == [
        "  --verdict right leaves 0; there are correct 2, wrong 2, truncated 1, deadline 1",
        f"{handmade} is unfinished: 1 steps are begun and not committed, not shown",
    ]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"step": "round-001/sampel"}, r"no step round-001/sampel\s+nearest: round-001/sample"),
        ({"step": "problems/train"}, "is a problems step"),
        ({"step": "round-002/grade"}, "is not finished"),
        ({"round": 3}, r"no rollouts of round 3\s+rounds with rollouts: 1, 2"),
        ({"round": 2, "step": "round-001/sample"}, "of round 2 among the steps that --step round-001/sample names"),
        ({"problem": "bb"}, r"no problem bb\s+ids look like aa11, aa22"),
        ({"problem": "aa"}, "2 problems of .* begin with aa"),
    ],
)
def test_what_is_not_there_is_an_error_with_alternatives(
    handmade: Path, filters: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        page_of(handmade, **filters)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"it has no run\.json"):
        open_run(tmp_path)
    with pytest.raises(RecipeError, match="does not exist"):
        open_run(tmp_path / "nothing")


def test_counts_are_those_of_the_metrics_record(make_run: MakeRun) -> None:
    path = make_run()
    graded = [row for row in read_lines(path / "metrics.jsonl") if row["verb"] == "grade"]
    assert len(graded) == 14  # two rounds of two, and five evaluations of two parts
    for row in graded:
        page = page_of(path, step=row["step"], limit=10_000)
        assert page.verdicts == row["reasons"], row["step"]
        assert page.num_matching == page.num_rollouts == len(page.shown) == row["num_rollouts"]
        correct = page_of(path, step=row["step"], verdict="correct", limit=10_000)
        assert correct.num_matching == len(correct.shown) == row["num_correct"]
    sampled = [row for row in read_lines(path / "metrics.jsonl") if row["verb"] == "sample"]
    shown = page_of(path, evaluation=True, limit=10_000).shown
    assert Counter(row.step for row in shown) == {r["step"]: r["num_rollouts"] for r in sampled if r["num_rollouts"]}
    assert sum(row.num_tokens for row in shown) == sum(row["num_completion_tokens"] for row in sampled)


def test_verdicts_stand_beside_the_rollouts_they_belong_to(make_run: MakeRun) -> None:
    path = make_run()
    page = page_of(path, step="round-002/sample", verdict="incorrect", limit=10_000)
    folder = path / "steps" / "round-002"
    written = pq.read_table(folder / "sample" / "rows-00000.parquet", columns=["id"]).column("id").to_pylist()
    scores = pq.read_table(folder / "grade" / "rows-00000.parquet").to_pylist()
    expected = [(i, s["answer"], s["reason"]) for i, s in zip(written, scores, strict=True) if s["value"] == 0.0]
    assert [(r.rollout.id, r.scores[0][1].answer, r.scores[0][1].reason) for r in page.shown] == expected
    assert all(row.problem is not None and row.problem.id == row.rollout.problem_id for row in page.shown)


def test_evaluations_are_read_only_when_asked_for(make_run: MakeRun) -> None:
    run = open_run(make_run())
    names = [step.name for step in choose_steps(run, RolloutFilters())[0]]
    assert names == [f"round-00{n}/sample{kind}" for n in (1, 2) for kind in ("", "-hinted")]
    assert len(choose_steps(run, RolloutFilters(evaluation=True))[0]) == 14
    in_round, num_left_out = choose_steps(run, RolloutFilters(step="round-001"))
    assert [step.name for step in in_round] == names[:2] and num_left_out == 2
    named, _ = choose_steps(run, RolloutFilters(step="round-001/evaluate"))
    assert [step.name for step in named] == ["round-001/evaluate/greedy", "round-001/evaluate/sampled"]
    by_grader, _ = choose_steps(run, RolloutFilters(step="round-001/evaluate/grade-greedy"))
    assert [step.name for step in by_grader] == ["round-001/evaluate/greedy"]


def test_a_problem_is_followed_through_the_rounds(make_run: MakeRun) -> None:
    run = open_run(make_run())
    problem_id = page_of(run.path).shown[0].rollout.problem_id
    assert find_problem(run, problem_id[:12]) == problem_id
    shown = page_of(run.path, problem=problem_id, step="round-", limit=100).shown
    plain = [(row.round, row.rollout.index) for row in shown if row.step.endswith("/sample")]
    assert plain == [(number, index) for number in (1, 2) for index in range(4)]
    assert {row.rollout.problem_id for row in shown} == {problem_id}


def test_reading_leaves_the_run_as_it_is(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run()

    def files() -> dict[str, int]:
        return {str(f): f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file() and "derived" not in f.parts}

    before = files()
    whole = ids(page_of(path, evaluation=True, limit=10_000))
    assert files() == before
    caches = sorted(f.name for f in (path / "derived").iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)  # as in the run of somebody else
    for cache in (path / "derived").iterdir():
        cache.unlink()
    assert ids(page_of(path, evaluation=True, limit=10_000)) == whole
    assert caches and not list((path / "derived").iterdir())


def test_a_table_of_another_length_than_its_rollouts_is_damage(tmp_path: Path) -> None:
    path = write_handmade_run(tmp_path / "run")
    with RunDir.open(path, identity={}, command="test") as run_dir:
        step: Any = run_dir.step("round-002/grade", {"verb": "grade", "inputs": ["round-002/sample"]})
        step.seal_table("rows", Score, [score(1.0, "correct", "7")] * 2)
        step.commit({})
        lines = [*read_lines(path / "metrics.jsonl"), {"step": "round-002/grade", "verb": "grade"}]
        run_dir.write_projection("metrics.jsonl", lines)
    with pytest.raises(RunFailed, match="2 scores for 1 rollouts of round-002/sample"):
        page_of(path)
