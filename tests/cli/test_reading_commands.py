"""``samples`` and ``compare`` as a user meets them: text, one JSON document, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import SMALL, reasonrun_cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, ``a`` and the stronger ``b``, one on other problems, and one that stopped in round 1."""
    folder = tmp_path_factory.mktemp("reading")
    for name, *overrides in (
        ("a",),
        ("b", "engine.accuracy=0.9"),
        ("other", "task.num_test=5"),
        ("stopped", "engine.unit_rows=16", "engine.fail_at_unit=2"),
    ):
        reasonrun_cli(folder, "train", "smoke_star", *SMALL, "preflight=off", *overrides, "--run", name)
    return folder


def test_samples_says_what_was_written_and_why_it_was_scored_so(folder: Path) -> None:
    done = reasonrun_cli(folder, "samples", "a", "--verdict", "wrong", "--limit", "2", "--prompt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round 1  round-001/sample") == 2
    assert done.stdout.count("wrong: score 0, answer") == 2 and "(number-1, round-001/grade)" in done.stdout
    for label in ("question ", "prompt ", "completion ", "reference "):
        assert done.stdout.count(f"  {label}") == 2
    assert "2 shown of " in done.stdout and "--evaluation shows them" in done.stdout


def test_samples_as_json_holds_the_same(folder: Path) -> None:
    command = ["samples", "a", "--round", "1", "--verdict", "correct", "--limit", "1000"]
    document = json.loads(reasonrun_cli(folder, *command, "--json").stdout)
    lines = [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]
    graded = {row["step"]: row["num_correct"] for row in lines if row["verb"] == "grade"}
    assert document["num_matching"] == graded["round-001/grade"] + graded["round-001/grade-hinted"]
    assert len(document["rollouts"]) == document["num_matching"] == document["verdicts"]["correct"]
    text = reasonrun_cli(folder, *command).stdout
    for rollout in document["rollouts"]:
        assert rollout["scores"][0]["answer"] == rollout["reference"]
        assert rollout["problem_id"] in text and rollout["completion"].split("\n")[0] in text


def test_samples_reads_an_unfinished_run(folder: Path) -> None:
    done = reasonrun_cli(folder, "samples", "stopped")
    assert done.returncode == 0 and "stopped is unfinished: 1 steps" in done.stdout
    evaluated = reasonrun_cli(folder, "samples", "stopped", "--evaluation", "--limit", "1")
    assert evaluated.returncode == 0 and "round-001/evaluate/greedy" in evaluated.stdout


def test_compare_as_text_and_json(folder: Path) -> None:
    done = reasonrun_cli(folder, "compare", "a", "b")
    assert done.returncode == 0, done.stderr
    assert "  engine.accuracy: 0.4 -> 0.9" in done.stdout
    document = json.loads(reasonrun_cli(folder, "compare", "a", "b", "--json").stdout)
    (pair,) = document["comparisons"]
    assert (document["baseline"], pair["run"]) == ("a", "b")
    for part in pair["evaluations"]:
        line = next(row for row in done.stdout.splitlines() if row.startswith(f"{part['name']} {part['part']} "))
        assert f"{part['baseline']:.1%} -> {part['other']:.1%}" in line and line.endswith(part["verdict"])
        assert f"  {part['num_improved']}/{part['num_worsened']}  " in line
        if part["part"] == "greedy":
            assert f"  {part['mcnemar_p']:.3g}  " in line
            assert part["difference"] * part["num_items"] == pytest.approx(part["num_improved"] - part["num_worsened"])
    for run, name in zip(document["runs"], ("a", "b"), strict=True):
        results = json.loads((folder / name / "_OK.json").read_text())["content"]["result"]["test"]
        side = "baseline" if name == "a" else "other"
        scores = {(part["name"], part["part"]): part[side] for part in pair["evaluations"]}
        for which, tables in results.items():
            assert scores[f"test {which}", "greedy"] == pytest.approx(tables["greedy"]["accuracy"])
        assert run["cost"]["num_optimizer_steps"] == 40


def test_compare_takes_more_than_two_and_an_unfinished_one(folder: Path) -> None:
    done = reasonrun_cli(folder, "compare", "a", "b", "stopped")
    assert done.returncode == 0, done.stderr
    assert "a -> b" in done.stdout and "a -> stopped" in done.stdout
    assert "only a (finished) has: test base greedy" in done.stdout and "stopped (unfinished)" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["samples", "nothing"], "is not a run directory"),
        (["samples", "a", "--step", "round-001/sampl3"], "nearest: round-001/sample"),
        (["samples", "a", "--problem", "zz"], "has no problem zz"),
        (["compare", "a"], "two runs or more"),
        (["compare", "a", "./a"], "named twice"),
        (["compare", "a", "nothing"], "is not a run directory"),
        (["compare", "a", "other"], "1 problems only in the second"),
    ],
)
def test_mistakes_exit_2_with_a_message(folder: Path, command: list[str], message: str) -> None:
    done = reasonrun_cli(folder, *command)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr and "Traceback" not in done.stderr


def test_a_mistake_is_one_json_document_too(folder: Path) -> None:
    done = reasonrun_cli(folder, "compare", "a", "other", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["exit_code"] == 2


def test_help_imports_neither_numpy_nor_pyarrow_and_reading_no_torch(folder: Path) -> None:
    code = (
        "import sys; heavy, sys.argv = set(sys.argv[1].split(',')), ['reasonrun', *sys.argv[2:]]\n"
        "from reasonrun.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    for heavy, *command in (
        ("numpy,pyarrow,hydra,torch", "--help"),
        ("torch,transformers,hydra", "samples", "a"),
        ("torch,transformers,hydra", "compare", "a", "b"),
    ):
        done = subprocess.run([sys.executable, "-c", code, heavy, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
