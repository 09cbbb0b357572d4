"""No secret reaches a run directory or the terminal, and no text of a model or of a file steers the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import TERMINAL, reasonrun

from reasonrun.recipe import load
from reasonrun.report.printable import printable
from reasonrun.trackers._wandb_privacy import Scrubber, secret_values

pytestmark = [pytest.mark.attack, pytest.mark.promise("G18", "looks at what leaves a run")]

CANARY = "CANARYcanary0123456789CANARY"
SMALL = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "method.rounds=1"]
JUDGE = """\
defaults: [smoke_step_dpo]
models:
  judge:
    endpoint:
      url: http://127.0.0.1:9/v1
      model: some-judge
      api_key_env: MY_JUDGE_KEY
      timeout_seconds: 1
      max_retries: 0
method:
  localize: {kind: llm_no_ref, judge: judge}
launcher:
  name: local
  python: ${oc.env:MY_PYTHON}
"""


@pytest.fixture(autouse=True)
def _canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("MY_JUDGE_KEY", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PYTHON"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(CANARY)
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {CANARY}\n")
    (home / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(home))


def files_with_canary(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_the_search_finds_a_canary() -> None:
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/file").write_bytes(b"\0" + CANARY.encode())
    assert files_with_canary(Path()) == ["deep/er/file"]


def test_a_run_with_an_endpoint_that_is_away_keeps_no_secret() -> None:
    Path("mine.yaml").write_text(JUDGE)
    done = reasonrun("train", "mine.yaml", *SMALL, "--run", "run")
    assert done.exit_code not in (0, 2), done.text  # it met the endpoint, which nobody serves
    assert "127.0.0.1:9" in done.text and "Traceback" not in done.text
    assert CANARY not in done.text
    assert list(Path("run").rglob("*.parquet")) and files_with_canary(Path()) == []
    for arguments in (["status", "run"], ["samples", "run"], ["check", "mine.yaml"], ["plan", "mine.yaml", *SMALL]):
        for as_json in ([], ["--json"]):
            assert CANARY not in reasonrun(*arguments, *as_json).text
    assert files_with_canary(Path()) == []


def test_a_tracker_is_given_no_path_and_nothing_from_the_environment() -> None:
    Path("mine.yaml").write_text(JUDGE)
    Path("rows").mkdir()
    recipe = load("mine.yaml", [f"model.path={Path('rows').absolute()}", "model.name=null"])
    sent = json.dumps(Scrubber(secret_values({"MY_JUDGE_KEY": CANARY})).recipe(recipe.resolved))
    assert CANARY not in sent and str(Path().absolute()) not in sent and "oc.env" not in sent
    assert json.loads(sent)["model"] == {**json.loads(sent)["model"]} and "path" not in json.loads(sent)["model"]
    assert json.loads(sent)["models"]["judge"]["endpoint"]["model"] == "some-judge"


SEQUENCES = {
    "colour": "\x1b[31;1m",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\text\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x07",
    "c1 csi": "\x9b31m",
    "c1 osc": "\x9d0;owned\x9c",
    "dcs": '\x1bP$q"p\x1b\\',
    "apc": "\x1b_G\x1b\\",
    "reset": "\x1bc",
    "charset": "\x1b(0",
    "bidi": "\u202e\u2066\u2069\u202c\u200f\u061c",
    "backspace": "a\x08\x08b",
    "overwrite": "good\rbad",
    "bell and nul": "\x07\x00",
    "delete": "\x7f",
    "nested": "\x1b\x1b[31m[32m",
    "split": "\x1b]0;\x1b[31m",
    "unfinished": "\x1b]0;never closed",
    "next line": "\x85\x84",
    "line separator": "a\u2028b\u2029c",
    "surrogate": "\ud83d",
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_nothing_to_obey_is_left_of_a_sequence(name: str) -> None:
    for text in (SEQUENCES[name], f"before{SEQUENCES[name]}after", SEQUENCES[name] * 3):
        shown = printable(text)
        assert not TERMINAL.search(shown) and shown.encode("utf-8") is not None
        assert printable(shown) == shown
        if text.startswith("before"):
            assert shown.startswith("before") and (shown.endswith("after") or name in ("split", "unfinished"))


def test_every_command_shows_hostile_rows_and_steers_nothing() -> None:
    own: dict[str, Any] = {
        "criteria": "Polite?",
        "score_descriptions": list("abcde"),
        "score": 3,
    }
    rows = [
        {**own, "instruction": f"Greet {number}. {text}", "response": f"{text}Hello", "category": f"c{text}"}
        for number, text in enumerate(SEQUENCES.values())
        if "\x00" not in text and "\ud83d" not in text
    ]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["--engine", "scripted", "evaluate.max_new_tokens=64", "--data", "items.jsonl"]
    for run, seed in (("one", 1), ("two", 2)):
        assert reasonrun("eval", "judge", *small, f"evaluate.seed={seed}", "--run", run).exit_code in (0, 5)
    for arguments in (
        ["samples", "one", "--evaluation", "--prompt", "--limit", "100"],
        ["status", "one"],
        ["compare", "one", "two"],
    ):
        for as_json in ([], ["--json"]):
            done = reasonrun(*arguments, *as_json)
            assert "Traceback" not in done.text
            assert not TERMINAL.search(done.text), ascii(done.text)
    shown = reasonrun("samples", "one", "--evaluation", "--prompt", "--limit", "100").out
    assert shown.count("Greet ") >= len(rows)
