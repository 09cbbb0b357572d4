"""The commands as a user meets them: exit codes, messages, one JSON document."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reasonrun

SMALL = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "method.rounds=1"]


def reasonrun_cli(folder: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reasonrun.cli.main", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return folder, reasonrun_cli(folder, "train", "smoke_star", *SMALL, "--run", "mine")


def test_train_ends_with_the_table_and_where_the_model_is(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert "round-001" in done.stdout and "test greedy" in done.stdout
    assert (folder / "mine" / "steps" / "round-001" / "train" / "model").is_dir()
    assert "model: mine/steps/round-001/train/model" in done.stdout


def test_a_finished_run_says_so_without_torch(finished):
    folder, _ = finished
    again = reasonrun_cli(folder, "train", "smoke_star", *SMALL, "--run", "mine", "--json")
    assert again.returncode == 0
    assert set(json.loads(again.stdout)["result"]) >= {"last", "best", "test"}


@pytest.mark.parametrize("arguments", [["--help"], ["check", "smoke_star"], ["plan", "smoke_star", *SMALL]])
def test_the_quick_commands_never_import_torch(tmp_path, arguments):
    code = (
        "import sys; sys.argv = ['reasonrun', *sys.argv[1:]]\n"
        "from reasonrun.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'trl', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_status_reads_a_run_and_refuses_another_folder(finished):
    folder, _ = finished
    state = json.loads(reasonrun_cli(folder, "status", "mine", "--json").stdout)
    assert state["state"] == "finished" and state["num_attempts"] == 1
    wrong = reasonrun_cli(folder, "status", ".")
    assert wrong.returncode == 2 and "is not a run directory" in wrong.stderr and "Traceback" not in wrong.stderr


def test_plan_prints_steps_and_assumptions_and_refuses_unknown_ones(tmp_path):
    document = json.loads(reasonrun_cli(tmp_path, "plan", "smoke_star", *SMALL, "--json").stdout)
    assert document["steps"][0]["step"] == "preflight/sample"
    assert list(tmp_path.iterdir()) == []
    wrong = reasonrun_cli(tmp_path, "plan", "smoke_star", "--assume", "acuracy=0.3")
    assert wrong.returncode == 2 and "accuracy (0.4)" in wrong.stderr


def test_a_finding_exits_5_with_its_evidence(tmp_path):
    nothing = ["engine.accuracy=0", "engine.spread=0", "engine.gain=0"]
    done = reasonrun_cli(tmp_path, "train", "smoke_star", *SMALL, *nothing)
    assert done.returncode == 5
    assert "nothing to learn from" in done.stderr and "wrong: " in done.stderr and "Traceback" not in done.stderr


def test_eval_measures_and_keeps_every_item(tmp_path):
    command = ["eval", "arith", "task.num_test=20", "--engine", "scripted", "--k", "4", "--run", "out"]
    done = reasonrun_cli(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    assert "pass@4" in done.stdout and "greedy" in done.stdout and "20 problems" in done.stdout
    assert list((tmp_path / "out" / "steps" / "evaluate" / "sampled").glob("rows-*.parquet"))


def test_eval_asks_several_times_and_says_what_that_changed(tmp_path):
    command = ["eval", "arith", "task.num_test=20", "--engine", "scripted", "--turns", "2", "--run", "out"]
    done = reasonrun_cli(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    change = json.loads(reasonrun_cli(tmp_path, *command, "--json").stdout)["result"]["correction"]["greedy"][
        "changes"
    ][0]
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert sum(line.endswith("(first attempt)") for line in lines) == 1
    assert any(line.startswith(f"attempt 2: {change['accuracy_last']:.1%} [") for line in lines)
    assert any(line.startswith(f"1 -> 2: delta {100 * change['delta']:+.1f} points [") for line in lines)
    flips = f"wrong to right {change['incorrect_to_correct']:.1%}, right to wrong {change['correct_to_incorrect']:.1%} of all"
    given = [change[f"{key}_given_{key.split('_')[0]}"] for key in ("incorrect_to_correct", "correct_to_incorrect")]
    assert f"{flips}; {given[0]:.1%} of wrong, {given[1]:.1%} of right" in lines
    assert any(f"edit ratio {change['edit_ratio']:.2f}" in line for line in lines)


def test_eval_refuses_a_number_of_turns_that_is_none(tmp_path):
    done = reasonrun_cli(tmp_path, "eval", "arith", "--engine", "scripted", "--turns", "0")
    assert done.returncode == 2 and "evaluate.turns" in done.stderr and "Traceback" not in done.stderr


def test_a_second_process_in_the_directory_is_refused_and_a_term_stops_with_75(tmp_path):
    slow = ["train", "smoke_star", *SMALL, "engine.seconds_per_unit=30", "--run", "mine"]
    first = subprocess.Popen(
        [sys.executable, "-m", "reasonrun.cli.main", *slow], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "mine" / "run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = reasonrun_cli(tmp_path, *slow)
        assert second.returncode == 4 and str(first.pid) in second.stderr
        time.sleep(0.5)
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 75
        assert "same command continues" in first.stderr.read()
    finally:
        first.kill()
        first.stderr.close()


def test_doctor_and_recipes_answer(tmp_path):
    document = json.loads(reasonrun_cli(tmp_path, "doctor", "--json").stdout)
    (torch,) = [check for check in document["checks"] if check["name"] == "torch"]
    assert document["ok"] and torch["state"] == "ok" and torch["found"].startswith("2.")
    listed = reasonrun_cli(tmp_path, "recipes").stdout
    assert "star_arith" in listed and "smoke_star" in listed


def test_an_unknown_recipe_names_the_nearest(tmp_path):
    done = reasonrun_cli(tmp_path, "train", "star_aritth")
    assert done.returncode == 2 and "star_arith" in done.stderr and "Traceback" not in done.stderr
