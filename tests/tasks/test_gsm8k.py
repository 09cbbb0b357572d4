"""GSM8K: rows are read or refused with every reason, prompts are golden, and the gold solutions pass the grader."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from reasonrun.errors import EnvironmentProblem, RecipeError
from reasonrun.tasks.gsm8k import Gsm8k, bare_solution

GOLDEN_DIR = Path(__file__).parent.parent / "golden"
NAMES = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo")


def row(number: int, *, shift: int = 0) -> dict[str, Any]:
    """A problem in GSM8K's form; every third has two steps."""
    name, start = NAMES[number % len(NAMES)], 1_000 + number + shift
    question = f"{name} has {start} pens and buys {number + 1} more."
    lines = [f"{name} has {start}+{number + 1}=<<{start}+{number + 1}={start + number + 1}>>{start + number + 1} pens."]
    total = start + number + 1
    if number % 3 == 0:
        question += f" {name} sells half for $2 a pen."
        lines.append(f"That makes {total}/2*2=$<<{total}/2*2={total}>>{total}.")
    return {"question": f"{question} How many?", "answer": "\n".join([*lines, f"#### {total:,}"])}


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows), "utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty training rows and five test rows."""
    write_rows(tmp_path / "train.jsonl", [row(number) for number in range(20)])
    write_rows(tmp_path / "test.jsonl", [row(number, shift=5_000) for number in range(5)])
    return tmp_path


def gsm8k(folder: Path, **settings: Any) -> Gsm8k:
    return Gsm8k(Gsm8k.Settings(**{"path": str(folder), "num_dev": 4, **settings}))


def refused(task: Gsm8k, split: str = "train") -> str:
    with pytest.raises(RecipeError) as caught:
        task.problems(split)
    return str(caught.value)


def test_splits_are_disjoint_and_gold_solutions_pass_the_grader(folder: Path) -> None:
    task = gsm8k(folder)
    splits = {split: task.problems(split) for split in ("train", "dev", "test")}
    assert {split: len(problems) for split, problems in splits.items()} == {"train": 16, "dev": 4, "test": 5}
    everything = [problem for problems in splits.values() for problem in problems]
    assert len({problem.id for problem in everything}) == 25
    assert all(problem.split == split for split, problems in splits.items() for problem in problems)
    grader = task.grader()
    for problem in everything:
        for text in (str(problem.meta["solution"]), bare_solution(problem), task.direct_answer(problem)):
            assert grader.grade(problem, text, truncated=False).correct


def test_dev_does_not_depend_on_the_order_of_rows(folder: Path) -> None:
    before = {problem.id for problem in gsm8k(folder).problems("dev")}
    write_rows(folder / "train.jsonl", [row(number) for number in reversed(range(20))])
    assert {problem.id for problem in gsm8k(folder).problems("dev")} == before


def test_filters_and_caps(folder: Path) -> None:
    short = gsm8k(folder, max_steps=1, num_dev=3, num_train=2, num_test=1)
    assert [len(short.problems(split)) for split in ("train", "dev", "test")] == [2, 3, 1]
    assert all(problem.meta["num_steps"] == 1 for problem in short.problems("train"))
    assert gsm8k(folder, num_train=2).problems("train") == gsm8k(folder).problems("train")[:2]


def test_an_empty_split_says_which_filter_emptied_it(folder: Path) -> None:
    assert "split train is empty: num_dev=20 took all 20 problems" in refused(gsm8k(folder, num_dev=20))
    assert "split dev is empty: num_dev is 0" in refused(gsm8k(folder, num_dev=0), "dev")
    write_rows(folder / "test.jsonl", [row(0, shift=5_000)])
    assert "split test is empty: max_steps=1 left none of 1 problems" in refused(gsm8k(folder, max_steps=1), "test")
    only_train = Gsm8k(Gsm8k.Settings(train_path=str(folder / "train.jsonl"), num_dev=2))
    assert "split test is empty: test_path is not set" in refused(only_train, "test")
    assert "no split 'val'; it has train, dev, test" in refused(only_train, "val")


BAD_LINES = {
    "truncated": (b'{"question": "How many?", "ans', "not valid JSON"),
    "not an object": (b'"How many?"', "must be a JSON object, not str"),
    "missing field": (
        b'{"question": "How many?", "answr": "#### 3"}',
        "'answer' is missing; did you mean to rename 'answr'",
    ),
    "wrong type": (b'{"question": "How many?", "answer": 3}', "'answer' must be str, not int"),
    "empty": (b'{"question": " ", "answer": "#### 3"}', "'question' is empty"),
    "raw NUL": (b'{"question": "How\0many?", "answer": "#### 3"}', "NUL byte in column 18"),
    "escaped NUL": (b'{"question": "How\\u0000many?", "answer": "#### 3"}', "'question' holds a NUL"),
    "no marker": (b'{"question": "Which sum?", "answer": "It is 3."}', "no line '#### number'"),
    "unreadable gold": (b'{"question": "How few?", "answer": "#### three"}', "not a number: 'three'"),
    "solution as hint": (b'{"question": "How many?", "answer": "#### 1234567890123456789012"}', "has 22 characters"),
    "Latin-1": (
        '{"question": "Zoé?", "answer": "#### 3"}'.encode("latin-1"),
        "byte 0xe9 in column 17; is the file Latin-1",
    ),
    "surrogate": (b'{"question": "How \\ud83d many?", "answer": "#### 3"}', "lone surrogate (\\ud83d)"),
    "NaN": (b'{"question": "How many?", "answer": NaN}', "NaN is not JSON"),
    "repeated key": (b'{"question": "a?", "question": "b?", "answer": "#### 3"}', "'question' occurs twice"),
    "deep": (b"[" * 20_000, "not readable as JSON"),
}


def test_every_fault_is_named_with_its_line_at_once(folder: Path) -> None:
    path = folder / "train.jsonl"
    lines = [json.dumps(row(0)).encode()]
    for content, _ in BAD_LINES.values():
        lines += [content, b""]
    path.write_bytes(b"\r\n".join([*lines, json.dumps(row(1)).encode()]))
    message = refused(gsm8k(folder))
    assert message.startswith(f"{len(BAD_LINES)} faults in the problem files:")
    for index, (name, (_, what)) in enumerate(BAD_LINES.items()):
        named = [line for line in message.splitlines() if line.startswith(f"{path}:{2 + 2 * index}: ")]
        assert len(named) == 1, name
        assert what in named[0], name


def test_duplicates_name_both_lines(folder: Path) -> None:
    path = folder / "train.jsonl"
    spaced = {**row(0), "question": row(0)["question"].replace(" ", "  ").upper()}
    write_rows(path, [{**row(0), "id": "a"}, {**row(1), "id": "a"}, spaced])
    message = refused(gsm8k(folder))
    assert f"{path}:2: same id as {path}:1" in message
    assert f"{path}:3: same question as {path}:1" in message


def test_a_test_question_in_train_is_a_leak(folder: Path) -> None:
    write_rows(folder / "test.jsonl", [row(100), row(7)])
    message = refused(gsm8k(folder))
    assert message.splitlines()[1:-1] == [
        f"{folder}/test.jsonl:2: this test question is also in train, as {folder}/train.jsonl:8"
    ]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"<!DOCTYPE html>\n<html>\n</html>\n", "HTML"),
        (b'[{"question": "a?", "answer": "#### 3"},\n{"question": "b?", "answer": "#### 3"}]', "JSON array"),
        (b'{\n  "question": "a?",\n  "answer": "#### 3"\n}\n', "spread over several lines"),
        (b"\x1f\x8b\x08\0", "gzip"),
        ('{"question": "a?", "answer": "#### 3"}'.encode("utf-16"), "UTF-16"),
    ],
)
def test_a_file_of_another_kind_is_one_fault(folder: Path, content: bytes, what: str) -> None:
    (folder / "train.jsonl").write_bytes(content)
    message = refused(gsm8k(folder))
    assert message.startswith("1 fault in the problem files:")
    assert what in message.splitlines()[1]


def test_a_missing_file_names_what_is_there(folder: Path) -> None:
    (folder / "train.jsonl").rename(folder / "trian.jsonl")
    message = refused(gsm8k(folder))
    assert f"{folder}/train.jsonl: no such file; {folder} has trian.jsonl" in message
    assert "the nearest existing folder is" in refused(gsm8k(folder / "a" / "b"))
    assert "is a folder" in refused(Gsm8k(Gsm8k.Settings(train_path=str(folder))))


def test_a_byte_order_mark_and_odd_line_separators_are_no_fault(folder: Path) -> None:
    odd = {**row(0), "question": "Line one\u2028line two \u200b: how many?"}
    (folder / "train.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r, ensure_ascii=False).encode() for r in [odd, row(1)])
    )
    problems = gsm8k(folder, num_dev=0).problems("train")
    assert [problem.messages[0].content for problem in problems] == [odd["question"], row(1)["question"]]


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"path": "a", "train_path": "b"}, "both given"), ({"test_path": "b"}, "without train_path")],
)
def test_contradicting_paths_are_refused(settings: dict[str, str], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        Gsm8k(Gsm8k.Settings(**settings))


def test_prompts_are_the_golden_ones(folder: Path) -> None:
    """Prompt text that changes needs a new prompt_version: the golden file is named after it."""
    path = GOLDEN_DIR / f"prompts-gsm8k-{Gsm8k.prompt_version}.json"
    assert path.exists(), f"a new prompt version needs its own golden file: {path.name}"
    task = gsm8k(folder, num_shots=2, num_hinted_shots=1)
    asked = task.problems("test")[0]
    rendered = {
        style: [[message.role, message.content] for message in task.messages(asked, style)]
        for style in sorted(task.styles)
    }
    rendered["correction"] = [["user", task.correction()]]
    assert rendered == json.loads(path.read_text("utf-8"))


def test_demonstrations_never_hold_the_asked_solution_or_dev(folder: Path) -> None:
    task = gsm8k(folder)
    train = task.problems("train")
    for asked in (*train[:8], *task.problems("dev")):
        *turns, question = task.messages(asked, "few_shot")
        assert question.content == asked.messages[0].content
        assert [turn.role for turn in turns] == ["user", "assistant"] * 6
        shown = [turn.content for turn in turns[::2]]
        assert asked.messages[0].content not in shown
        assert set(shown) <= {problem.messages[0].content for problem in train[:7]}
    assert "<<" not in "".join(turn.content for turn in turns)
    with pytest.raises(RecipeError, match="17 demonstrations were asked for, train has 16"):
        gsm8k(folder, num_shots=17).messages(task.problems("dev")[0], "few_shot")


def test_the_hint_is_the_final_answer_and_nothing_else(folder: Path) -> None:
    task = gsm8k(folder)
    for problem in task.problems("train"):
        content = task.messages(problem, "hinted")[-1].content
        question = problem.messages[0].content
        assert content.startswith(question + " (")
        assert content.endswith(f"{problem.reference})")
        assert any(marker in content[len(question) :] for marker in task.hint_markers)
        assert len(problem.reference) < 20
    with pytest.raises(RecipeError, match="no style 'plane'"):
        task.messages(task.problems("dev")[0], "plane")


def test_a_question_may_hold_braces(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [{"question": "What is {answer} of {question}?", "answer": "#### 3"}, row(1)])
    task = gsm8k(folder, num_dev=0, num_hinted_shots=0)
    hinted = task.messages(task.problems("train")[0], "hinted")[-1].content
    assert hinted.startswith("What is {answer} of {question}? (")


def test_scripted_answers_are_right_or_wrong_on_purpose(folder: Path) -> None:
    task = gsm8k(folder)
    grader = task.grader()
    for seed, problem in enumerate(task.problems("train")):
        right = grader.grade(problem, task.scripted_answer(problem, correct=True, seed=seed), truncated=False)
        wrong = grader.grade(problem, task.scripted_answer(problem, correct=False, seed=seed), truncated=False)
        assert (right.reason, wrong.reason) == ("correct", "wrong")


def hub(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_rows_from_the_hub_are_checked_like_those_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(source: str, config: str, *, split: str, revision: str) -> list[dict[str, Any]]:
        asked.append((source, config, split, revision))
        return [row(number, shift=5_000 if split == "test" else 0) for number in range(8)]

    hub(monkeypatch, load_dataset)
    task = Gsm8k(Gsm8k.Settings(revision="v1", num_dev=2))
    assert [len(task.problems(split)) for split in ("train", "dev", "test")] == [6, 2, 8]
    assert asked == [("openai/gsm8k", "main", "train", "v1"), ("openai/gsm8k", "main", "test", "v1")]
    hub(monkeypatch, lambda *args, split, **kwargs: [{"question": "a?", "answer": None}])
    message = refused(Gsm8k(Gsm8k.Settings()))
    assert "openai/gsm8k/train:1: field 'answer' must be str, not NoneType" in message


def test_no_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("name or service not known")

    hub(monkeypatch, load_dataset)
    with pytest.raises(EnvironmentProblem, match="name or service not known") as caught:
        Gsm8k(Gsm8k.Settings()).problems("train")
    assert "task.path" in str(caught.value)


def test_the_style_steps_labels_every_step_from_the_opening_on(folder: Path) -> None:
    task = gsm8k(folder)
    asked = task.problems("test")[0]
    solution = task.solution(asked)
    assert solution.startswith(task.opening("steps")) and task.opening("steps").endswith("\nStep 1:")
    assert [match[0] for match in re.finditer(r"^Step \d+:", solution, re.MULTILINE)] == ["Step 1:", "Step 2:"]
    assert task.grader().grade(asked, solution, truncated=False).correct
    assert task.opening("plain") == task.opening("few_shot") == ""
    for given in (task.opening("steps"), solution[: solution.index("Step 2:")], solution[: solution.index(" That")]):
        assert given + task.scripted_answer(asked, correct=True, seed=0, prefix=given) == solution
        wrong = given + task.scripted_answer(asked, correct=False, seed=0, prefix=given)
        assert wrong.startswith(given) and not task.grader().grade(asked, wrong, truncated=False).correct
