"""Every data file of the corpus is refused as its ``.expected`` file says, before a model is loaded."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import CORPUS, Done, Expected, assert_as_expected, cases, input_of, place, read_expected, reasonrun

pytestmark = [pytest.mark.attack, pytest.mark.promise("G17", "bad data")]

GSM8K, JUDGE = cases(CORPUS / "data" / "gsm8k"), cases(CORPUS / "data" / "judge")
FOLDER = ["eval", "gsm8k", "--engine", "scripted", "--split", "train", "evaluate.max_new_tokens=64", "task.num_dev=0"]
ITEMS = ["eval", "judge", "--engine", "scripted", "evaluate.max_new_tokens=64", "--data", "{file}"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def gsm8k_command(name: str, expected: Expected) -> list[str]:
    """Put the file where ``task.path`` finds it, or under its own name where the case says the arguments."""
    source = input_of(GSM8K[name])
    place(CORPUS / "data" / "gsm8k-test.jsonl", Path("rows/test.jsonl"))
    place(source, Path(source.name if expected.arguments else "rows/train.jsonl"))
    return [word.replace("{file}", source.name) for word in expected.arguments or [*FOLDER, "task.path=rows"]]


def judge_command(name: str, expected: Expected) -> list[str]:
    source = input_of(JUDGE[name])
    place(source, Path(source.name))
    return [word.replace("{file}", source.name) for word in expected.arguments or ITEMS]


CASES: dict[str, tuple[Path, Callable[[str, Expected], list[str]]]] = {
    **{f"gsm8k/{name}": (path, gsm8k_command) for name, path in GSM8K.items()},
    **{f"judge/{name}": (path, judge_command) for name, path in JUDGE.items()},
}
GOOD = [case for case, (path, _) in CASES.items() if not read_expected(path).exit_code]


def test_every_file_of_the_corpus_has_its_expectation() -> None:
    for folder, known in ((CORPUS / "data" / "gsm8k", GSM8K), (CORPUS / "data" / "judge", JUDGE)):
        assert {path.stem for path in folder.iterdir() if path.suffix != ".expected"} == set(known)
    assert len(CASES) >= 60


@pytest.mark.parametrize("case", CASES)
def test_eval_says_what_is_wrong_and_where(case: str) -> None:
    path, command = CASES[case]
    expected = read_expected(path)
    assert_as_expected(expected, reasonrun(*command(path.stem, expected)))


@pytest.mark.parametrize("case", CASES)
def test_json_is_one_document_with_the_same_facts(case: str) -> None:
    path, command = CASES[case]
    expected = read_expected(path)
    done = reasonrun(*command(path.stem, expected), "--json")
    document = json.loads(done.out)
    assert done.exit_code == expected.exit_code
    if expected.exit_code:
        assert document["exit_code"] == expected.exit_code
        shown = Done(exit_code=done.exit_code, out=document["message"], err=done.err, seconds=done.seconds)
        assert_as_expected(expected, shown)


@pytest.mark.parametrize("case", GOOD)
def test_rows_in_are_rows_measured(case: str) -> None:
    path, command = CASES[case]
    arguments = command(path.stem, read_expected(path))
    text = input_of(path).read_text("utf-8-sig")
    num_rows = len(json.loads(text)) if text.startswith("[") else sum(bool(line.strip()) for line in text.split("\n"))
    result = json.loads(reasonrun(*arguments, "--json").out)["result"]
    assert result["num_problems"] == num_rows


ROW = '{"question": "How many?", "answer": "#### 3"}\n'
LONG = "x" * 50_000_000
LONG_LINES = {
    "text": (f'{{"question": "{LONG}", "answer": "#### 3"}}\n', "field 'question' holds 50,000,000 characters"),
    "cut off": (f'{{"question": "{LONG}', "not valid JSON: Unterminated string starting"),
    "number": (
        f'{{"question": {LONG.replace("x", "1")}, "answer": "#### 3"}}\n',
        "not readable as JSON: a number of more than 4300 digits",
    ),
    "no JSON": (LONG + "\n", "not valid JSON: Expecting value, in column 1"),
    "field name": (f'{{"{LONG}": 1}}\n', "fields 'question' and 'answer' are missing; the row has 'xxxxx"),
}


@pytest.mark.parametrize("kind", LONG_LINES)
def test_a_line_of_fifty_megabytes_is_a_short_message_soon(kind: str) -> None:
    line, says = LONG_LINES[kind]
    place(CORPUS / "data" / "gsm8k-test.jsonl", Path("rows/test.jsonl"))
    Path("rows/train.jsonl").write_text(ROW + line)
    done = reasonrun(*FOLDER, "task.path=rows")
    assert_as_expected(Expected(exit_code=2, lines=["1 fault", f"rows/train.jsonl:2: {says}"]), done)
    assert len(done.text) < 500


def test_an_item_of_fifty_megabytes_is_not_tokenised() -> None:
    good = json.loads((CORPUS / "data" / "judge" / "array-good.json").read_text())
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, {**good[0], "response": LONG}]))
    done = reasonrun(*[word.replace("{file}", "items.jsonl") for word in ITEMS])
    lines = ["1 fault", "items.jsonl:5: field 'response' holds 50,000,000 characters, more than 5,000,000"]
    assert_as_expected(Expected(exit_code=2, lines=lines), done)


def test_what_is_no_regular_file_is_refused_at_once() -> None:
    place(CORPUS / "data" / "gsm8k-test.jsonl", Path("rows/test.jsonl"))
    os.mkfifo("rows/train.jsonl")
    done = reasonrun(*FOLDER, "task.path=rows")
    assert_as_expected(Expected(exit_code=2, lines=["rows/train.jsonl is no regular file"]), done)
    Path("folder.jsonl").mkdir()
    done = reasonrun(*[word.replace("{file}", "folder.jsonl") for word in ITEMS])
    assert_as_expected(Expected(exit_code=2, lines=["folder.jsonl is a folder, not a file", "name the file"]), done)
    done = reasonrun(*[word.replace("{file}", "fodler.jsonl") for word in ITEMS])
    assert_as_expected(
        Expected(exit_code=2, lines=["fodler.jsonl: no such file; . has folder.jsonl", "command line"]), done
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_read_or_refused_with_a_line(seed: int) -> None:
    """Bytes are flipped, cut out and repeated; nothing but rows or a list of faults may come of it."""
    rng = random.Random(seed)
    content = bytearray((CORPUS / "data" / "gsm8k-test.jsonl").read_bytes())
    for _ in range(rng.randint(1, 4)):
        begin = rng.randrange(len(content))
        end = min(len(content), begin + rng.randint(1, 60))
        damage = rng.choice(
            [bytes([rng.randrange(256)]), b"", bytes(content[begin:end]) * 2, b"\n", b"\0", b"\xff\xfe"]
        )
        content[begin : end if rng.random() < 0.5 else begin + 1] = damage
    place(CORPUS / "data" / "gsm8k-test.jsonl", Path("rows/train.jsonl"))
    Path("rows/test.jsonl").write_bytes(bytes(content))
    done = reasonrun(*[*FOLDER, "task.path=rows"])
    assert done.exit_code == 2
    assert "Traceback" not in done.text
    # the good rows are in train too, so a file that lost nothing is a leak: each line is named by its place
    lines = done.err.splitlines()
    assert "problem files" in lines[0] and all(line.startswith(("rows/", "… and ")) for line in lines[1:-1]), done.err
