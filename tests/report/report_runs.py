"""Builders of run directories for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import RunFailed
from reasonrun.ledger.run_dir import RunDir
from reasonrun.recipe import load
from reasonrun.records import Message, Problem, Record, Rollout, Sampling, Score, Segment
from reasonrun.running import RunOptions, run

MakeRun = Callable[..., Path]
SMALL = ("task.num_train=12", "task.num_dev=6", "task.num_test=20", "method.rounds=2", "preflight=off")

HOSTILE = "\x1b[2J\x1b]0;title\x07Answer:\x9b31m 7\u202e8\r\x00\n\tend"


def write_scripted_run(path: Path, *overrides: str) -> Path:
    """A run of the scripted engine; ``engine.fail_at_unit`` leaves it unfinished."""
    recipe = load("smoke_star", [*SMALL, *overrides])
    with suppress(RunFailed):
        run(recipe, RunOptions(directory=path), SilentProgress())
    return path


def problem(problem_id: str, question: str, reference: str) -> Problem:
    return Problem(
        id=problem_id,
        task="toy",
        split="train",
        messages=(Message(role="user", content=question),),
        reference=reference,
    )


def rollout(problem_id: str, index: int, text: str, num_tokens: int, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "id": f"key-{problem_id}-{index}",
        "problem_id": problem_id,
        "index": index,
        "kind": "plain",
        "messages": (Message(role="system", content="Think."), Message(role="user", content=f"Q {problem_id}")),
        "prompt_ids": (1, 2, 3),
        "segments": (Segment(token_ids=tuple(range(num_tokens)), src="model", loss=True),),
        "text": text,
        "finish_reason": "stop",
        "policy": "weights",
        "sampling": Sampling(),
        "seed": 1,
    }
    return Rollout(**(fields | changes))


def score(value: float | None, reason: str, answer: str | None, grader: str = "number-1") -> Score:
    return Score(value=value, reason=reason, answer=answer, grader=grader)


def write_handmade_run(path: Path) -> Path:
    """An unfinished run of two rounds on two problems, with texts and verdicts that no scripted engine gives.

    Round 1 has three rollouts of 5, 9 and 3 tokens with the verdicts of two graders; round 2 continues one of them and
    is not graded yet: its grading was begun.
    """
    with RunDir.open(path, identity={"recipe": {"seed": 0}}, command="test") as run_dir:
        rows: list[dict[str, Any]] = []

        def commit(name: str, verb: str, inputs: list[str], records: Sequence[Record], result: dict[str, Any]) -> None:
            step: Any = run_dir.step(name, {"verb": verb, "inputs": inputs, "seed": [0, name]})
            step.seal_table("rows", type(records[0]), records)
            step.commit(result)
            rows.append({"step": name, "verb": verb, **result})
            run_dir.write_projection("metrics.jsonl", rows)

        commit(
            "problems/train",
            "problems",
            [],
            [problem("aa11", "What is 3 + 4?", "7"), problem("aa22", "What is 6 + 6?", "12")],
            {"num_problems": 2},
        )
        first = [
            rollout("aa11", 0, HOSTILE, 5),
            rollout("aa11", 1, "Answer: 8", 9),
            rollout("aa22", 0, "no idea", 3, finish_reason="length"),
        ]
        commit("round-001/sample", "sample", ["problems/train"], first, {"num_completion_tokens": 17})
        commit(
            "round-001/grade",
            "grade",
            ["round-001/sample"],
            [score(1.0, "correct", "7\x1b[0m8"), score(0.0, "wrong", "8"), score(0.0, "truncated", None)],
            {"num_rollouts": 3},
        )
        commit(
            "round-001/grade-judge",
            "grade",
            ["round-001/sample"],
            [
                score(1.0, "correct", "7", "judge-2"),
                score(None, "deadline", None, "judge-2"),
                score(0.0, "wrong", "?", "judge-2"),
            ],
            {"num_rollouts": 3},
        )
        continued = (
            Segment(token_ids=(7,) * 20, src="model", loss=False),  # what it goes on from: not sampled here
            Segment(token_ids=(1, 2, 3, 4), src="model", loss=True),
        )
        commit(
            "round-002/sample",
            "sample",
            ["round-001/sample"],
            [rollout("aa11", 0, "Answer: 7", 4, id="second", parent_id="key-aa11-1", segments=continued)],
            {"num_completion_tokens": 4},
        )
        run_dir.step("round-002/grade", {"verb": "grade", "inputs": ["round-002/sample"]})
    return path
