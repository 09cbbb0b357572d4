"""The mistakes that a stranger makes first: each message holds the command or the edit that leads on, in one step."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_input import CORPUS, Done, place, reasonrun

pytestmark = [pytest.mark.attack, pytest.mark.promise("G17", "mistakes of a stranger")]

RECIPE = """\
task: {name: gsm8k, path: rows, num_dev: 2, num_shots: 1, num_hinted_shots: 1}
engine: scripted
method:
  name: star
  rounds: 1
  num_samples: 2
  max_new_tokens: 64
evaluate: {max_new_tokens: 64}
"""


@pytest.fixture(autouse=True)
def _rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = json.loads((CORPUS / "data" / "gsm8k" / "array.jsonl").read_text())
    rows = [{**row, "question": f"{row['question']} ({number})"} for number in range(6) for row in train]
    place(CORPUS / "data" / "gsm8k-test.jsonl", Path("rows/test.jsonl"))
    Path("rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(text: str) -> None:
    Path("mine.yaml").write_text(text)


def succeeds(*arguments: str) -> Done:
    done = reasonrun(*arguments)
    assert done.exit_code in (0, 5), done.text  # 5: a result, such as nothing to learn from
    return done


def refused(exit_code: int, *arguments: str) -> str:
    done = reasonrun(*arguments)
    assert done.exit_code == exit_code and "Traceback" not in done.text, done.text
    return done.err


def test_a_misspelt_key_is_replaced_by_the_nearest() -> None:
    write(RECIPE.replace("rounds:", "ruonds:"))
    found = re.search(r"mine\.yaml:5:3: method\.(\w+): unknown key; nearest is (\w+)", refused(2, "train", "mine.yaml"))
    assert found
    write(Path("mine.yaml").read_text().replace(found[1], found[2]))
    succeeds("train", "mine.yaml")


def test_a_wrong_path_is_replaced_by_what_is_there_and_the_same_command_goes_on() -> None:
    Path("rows").rename("data")
    write(RECIPE.replace("path: rows", "path: ./dta"))
    message = refused(2, "train", "mine.yaml")
    found = re.search(r"(\w+)/train\.jsonl: no such file; .*; \. has (\w+)", message)
    assert found, message
    write(Path("mine.yaml").read_text().replace(found[1], found[2]))
    assert not Path("runs").exists()
    succeeds("train", "mine.yaml")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_that_no_model_reads_is_named_by_the_plan_and_left_out(split: str) -> None:
    path = Path(f"rows/{split}.jsonl")
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines] * (1 if split == "train" else 3)
    rows = [{**row, "question": f"{row['question']} [{split} {number}]"} for number, row in enumerate(rows)]
    long = {"question": "How many pens are " + "1 and " * 2000 + "1?", "answer": "#### 2001"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    write(RECIPE)
    for command in ("plan", "train") if split == "train" else ("plan",):  # a run comes to its test at the end
        message = refused(2, command, "mine.yaml")
        found = re.search(rf"leave this row out: problem \w+ of {split}\.jsonl:(\d+); or use fewer", message)
        assert found and int(found[1]) == len(rows) + 1, message
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    succeeds("plan", "mine.yaml")


def test_a_prompt_that_is_too_long_fits_after_the_first_proposal() -> None:
    write(RECIPE.replace("max_new_tokens: 64\neval", "max_new_tokens: 700\neval"))
    message = refused(2, "train", "mine.yaml")
    found = re.search(r"the answer up to (\d+)\..*\n.*lower max_new_tokens to (\d+),", message)
    assert found, message
    write(Path("mine.yaml").read_text().replace(f"max_new_tokens: {found[1]}", f"max_new_tokens: {found[2]}"))
    succeeds("train", "mine.yaml")


def test_a_changed_recipe_begins_a_run_of_its_own_or_is_taken_back() -> None:
    write(RECIPE)
    succeeds("train", "mine.yaml", "method.sft.lr=1e-5", "--run", "first")
    message = refused(4, "train", "mine.yaml", "method.sft.lr=1e-4", "--run", "first")
    assert "method.sft.lr: 1e-05 -> 0.0001" in message and "--run NEW" in message and "revert the change" in message
    succeeds("train", "mine.yaml", "method.sft.lr=1e-4", "--run", "NEW")
    assert "finished; nothing to do" in succeeds("train", "mine.yaml", "method.sft.lr=1e-5", "--run", "first").out


def test_a_second_run_in_the_directory_waits_or_takes_another() -> None:
    write(RECIPE.replace("engine: scripted", "engine: {name: scripted, seconds_per_unit: 0.5}"))
    code = "from reasonrun.cli.main import main; main()"
    command = ["train", "mine.yaml", "--run", "mine"]
    first = subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not Path("mine/run.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        message = refused(4, *command)
        assert str(first.pid) in message and "--run" in message, message
        write(RECIPE)
        succeeds("train", "mine.yaml", "--run", "another")
    finally:
        first.terminate()
        first.wait(60)
