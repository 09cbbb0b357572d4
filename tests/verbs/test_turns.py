"""Several attempts in a row: what the second is asked, what the tables say of it, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import RecipeError
from reasonrun.ledger.catalogue import stored_fingerprint
from reasonrun.models import resolve
from reasonrun.prompts import arith as words
from reasonrun.recipe import load
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Checkpoint
from reasonrun.rendering import Renderer
from reasonrun.running import RunOptions, conclude, run
from reasonrun.verbs.evaluating import Evaluation, describe

SMALL = ["task.num_test=20", "evaluate.max_new_tokens=48"]


def measure(folder: Path, *overrides: str, engine: str = "scripted") -> dict[str, Any]:
    recipe = load("eval", [f"engine={engine}", *SMALL, *overrides])
    return run(recipe, RunOptions(directory=folder), SilentProgress()).result


def sealed(folder: Path, step: str) -> list[dict[str, Any]]:
    """The rows of a step, read without the code under test."""
    return [
        row
        for path in sorted((folder / "steps" / step).glob("rows-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("turns") / "run"
    return folder, measure(folder, "evaluate.turns=3", "evaluate.num_samples=2")


def edits(first: str, second: str) -> int:
    """Levenshtein's distance by the table of all prefixes (Wagner & Fischer 1974)."""
    above = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        line = [i]
        for j, b in enumerate(second, start=1):
            line.append(min(above[j] + 1, line[j - 1] + 1, above[j - 1] + (a != b)))
        above = line
    return above[-1]


def recomputed(folder: Path, first: str, second: str) -> dict[str, float]:
    """Numbers of a change from the sealed rows, joined by parent and not by place."""
    earlier = {
        row["id"]: (row, score)
        for row, score in zip(
            sealed(folder, f"evaluate/{first}"), sealed(folder, f"evaluate/grade-{first}"), strict=True
        )
    }
    pairs = [
        (*earlier[row["parent_id"]], row, score)
        for row, score in zip(
            sealed(folder, f"evaluate/{second}"), sealed(folder, f"evaluate/grade-{second}"), strict=True
        )
    ]
    n = len(pairs)
    assert n == len(earlier)
    return {
        "accuracy_first": sum(a["value"] == 1 for _, a, _, _ in pairs) / n,
        "accuracy_last": sum(b["value"] == 1 for *_, b in pairs) / n,
        "incorrect_to_correct": sum(a["value"] != 1 and b["value"] == 1 for _, a, _, b in pairs) / n,
        "correct_to_incorrect": sum(a["value"] == 1 and b["value"] != 1 for _, a, _, b in pairs) / n,
        "changed_share": sum(a["answer"] != b["answer"] for _, a, _, b in pairs) / n,
        "identical_text_share": sum(x["text"] == y["text"] for x, _, y, _ in pairs) / n,
        "edit_ratio": sum(edits(x["text"], y["text"]) / len(x["text"] + y["text"]) for x, _, y, _ in pairs) / n,
    }


def check_numbers(folder: Path, result: dict[str, Any], part: str, last: int) -> None:
    names = [part, *(f"{part}-turn-{turn}" for turn in range(2, last + 1))]
    section = result["correction"][part]
    for change in section["changes"][: last - 1]:
        found = recomputed(folder, names[change["from"] - 1], names[change["to"] - 1])
        assert {key: change[key] for key in found} == pytest.approx(found)
    for name, attempt in zip(names, section["attempts"], strict=True):
        values = [score["value"] == 1 for score in sealed(folder, f"evaluate/grade-{name}")]
        assert attempt["accuracy"] == pytest.approx(sum(values) / len(values))
        tokens = [
            sum(len(s["token_ids"]) for s in row["segments"] if s["loss"]) for row in sealed(folder, f"evaluate/{name}")
        ]
        assert attempt["mean_num_tokens"] == pytest.approx(sum(tokens) / len(tokens))


@pytest.mark.parametrize("part", ["greedy", "sampled"])
def test_the_tables_are_those_of_the_sealed_rows(scripted: tuple[Path, dict[str, Any]], part: str) -> None:
    folder, result = scripted
    check_numbers(folder, result, part, 3)
    whole = result["correction"][part]["changes"][-1]
    assert (whole["from"], whole["to"], whole["num_rows"]) == (1, 3, 20 if part == "greedy" else 40)
    assert 0 < whole["changed_share"] < 1  # the script does change answers here
    assert result[part]["accuracy"] == result["correction"][part]["attempts"][0]["accuracy"]


def test_one_turn_is_what_it_was_and_the_first_attempt_does_not_depend_on_the_others(
    scripted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, result = scripted
    once = measure(tmp_path / "run", "evaluate.num_samples=2")
    assert "correction" not in once and once["greedy"] == result["greedy"] and once["sampled"] == result["sampled"]
    for name in ("evaluate/greedy", "evaluate/grade-greedy", "evaluate/sampled"):
        assert sealed(tmp_path / "run", name) == sealed(folder, name)
    fingerprint = stored_fingerprint(tmp_path / "run", "evaluate")
    assert list(fingerprint["parts"]) == ["greedy", "sampled"]
    assert fingerprint["inputs"] == ["evaluate/grade-greedy", "evaluate/grade-sampled"]


def test_the_evaluation_is_a_function_of_all_its_attempts(scripted: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = scripted
    fingerprint = stored_fingerprint(folder, "evaluate")
    names = [f"{part}{turn}" for part in ("greedy", "sampled") for turn in ("", "-turn-2", "-turn-3")]
    assert sorted(fingerprint["parts"]) == sorted(names)
    assert fingerprint["inputs"] == [f"evaluate/grade-{name}" for name in names]
    asked = stored_fingerprint(folder, "evaluate/greedy-turn-2")
    assert asked["seed"] == ["evaluate", 17, "greedy-turn-2"] and asked["n"] == 1
    assert asked["sampling"] == stored_fingerprint(folder, "evaluate/greedy")["sampling"]


def test_the_second_prompt_shows_the_first_attempt_whole_whatever_its_verdict(
    scripted: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = scripted
    renderer = Renderer.load(Path(resolve(ModelSettings(name="tiny")).path))
    first = {row["id"]: row for row in sealed(folder, "evaluate/greedy")}
    verdicts = {row: score["value"] for row, score in zip(first, sealed(folder, "evaluate/grade-greedy"), strict=True)}
    around = set()
    for row in sealed(folder, "evaluate/greedy-turn-2"):
        before = first[row["parent_id"]]
        if before["finish_reason"] != "stop":
            continue  # its turn is closed by the template
        prompt = renderer.decode(row["prompt_ids"], skip_special=False)
        question = before["messages"][-1]["content"]
        start, said = prompt.index(question), prompt.index(before["text"])
        assert start + len(question) <= said < said + len(before["text"]) <= prompt.index(words.CORRECTION)
        assert prompt.count(words.CORRECTION) == 1
        rest = prompt.replace(question, "Q", 1).replace(before["text"], "A", 1)
        around.add((rest, verdicts[row["parent_id"]]))
    assert {verdict for _, verdict in around} == {0.0, 1.0}
    assert len({rest for rest, _ in around}) == 1  # right or wrong: byte by byte the same


def test_the_real_engine_answers_twice(tmp_path: Path) -> None:
    result = measure(tmp_path / "run", "evaluate.turns=2", engine="hf")
    check_numbers(tmp_path / "run", result, "greedy", 2)
    table = result["correction"]["greedy"]["changes"][0]
    assert len(result["correction"]["greedy"]["changes"]) == 1 and table["num_rows"] == 20
    rows = sealed(tmp_path / "run", "evaluate/greedy-turn-2")
    before = {row["id"]: row for row in sealed(tmp_path / "run", "evaluate/greedy")}
    for row in rows:
        parent = before[row["parent_id"]]
        ids = parent["prompt_ids"] + [i for segment in parent["segments"] for i in segment["token_ids"]]
        assert row["prompt_ids"][: len(ids)] == ids  # what the engine saw and wrote, never tokenised again


def test_attempts_that_do_not_fit_are_refused_whole(tmp_path: Path) -> None:
    """The tiny model holds 768 tokens: question and 670 new ones fit, and not with the first attempt between them."""
    with pytest.raises(
        RecipeError, match=r"greedy-turn-2: \d+ of 20 prompts do not fit.*with its earlier answers"
    ) as caught:
        measure(tmp_path / "run", "evaluate.turns=2", "evaluate.max_new_tokens=670")
    assert "fewer turns" in str(caught.value)


def evaluation(last: float, first: float = 0.5, *, turns: int = 2, step: str = "e") -> Evaluation:
    table = {"accuracy": first, "interval": [0.0, 1.0]}
    change = {"to": turns, "delta": last - first, "accuracy_last": last}
    section = {"attempts": [table, {"accuracy": last}], "changes": [change]}
    metrics = {"greedy": table, "correction": {"greedy": section}} if turns > 1 else {"greedy": table}
    return Evaluation(
        policy=Checkpoint(path="p", weights=step, tokenizer="t", step=step), split="dev", step=step, metrics=metrics
    )


def test_checkpoints_are_compared_by_the_last_attempt_then_by_what_it_gains() -> None:
    assert evaluation(0.7).rank == (0.7, pytest.approx(0.2)) and evaluation(0.7).headline == 0.7
    assert evaluation(0.7, turns=1).rank == (0.5, 0.0)
    assert "attempt 2 70.0% (+20.0)" in describe(evaluation(0.7))
    low = {"accuracy": 0.1, "interval": [0.0, 1.0]}
    section = {"attempts": [low, {"accuracy": 0.3}], "changes": [{"to": 2, "delta": 0.2, "accuracy_last": 0.3}]}
    sampled = Evaluation(
        policy=None, split="dev", step="e", metrics={"sampled": low, "correction": {"sampled": section}}
    )  # type: ignore[arg-type]
    assert sampled.rank == (0.3, 0.2)  # greedy is off


def test_the_best_checkpoint_is_that_of_the_highest_rank() -> None:
    class Lab(SimpleNamespace):
        """Dev evaluations as given; tests are of whatever is asked."""

        def scope(self, name: str, **labels: Any) -> Any:
            import contextlib

            return contextlib.nullcontext()

        def evaluate(self, policy: Checkpoint, **kwargs: Any) -> Evaluation:
            found = evaluation(0.1, step=policy.step)
            self.evaluations += [found] if not kwargs else []
            return found

    def chosen(*given: Evaluation) -> str:
        lab = Lab(evaluations=list(given), base=given[0].policy, is_rehearsal=False, nominees={})
        return str(conclude(lab, Checkpoint(path="p", weights="last", tokenizer="t", step="last"))["selected_by"])  # type: ignore[arg-type]

    high_first = evaluation(0.6, 0.9, step="high-first")
    assert chosen(high_first, evaluation(0.7, 0.5, step="high-last")) == "high-last"
    assert chosen(high_first, evaluation(0.6, 0.5, step="gains")) == "gains"
    assert chosen(evaluation(0.6, 0.5, step="early"), evaluation(0.6, 0.5, step="late")) == "early"


def test_the_result_is_what_was_committed(scripted: tuple[Path, dict[str, Any]]) -> None:
    folder, result = scripted
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["verb"] == "evaluate")
    assert row["correction"] == json.loads(json.dumps(result["correction"]))
