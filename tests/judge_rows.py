"""Small rows in every form that the task ``judge`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DESCRIPTIONS = ["Rude.", "Curt.", "Neutral.", "Kind.", "Most kind."]
SCORE_KEYS = [f"score{number}_description" for number in range(1, 6)]


def feedback(number: int, **changes: Any) -> dict[str, Any]:
    score = 1 + number % 5
    row = {
        "orig_instruction": f"Greet guest {number}.",
        "orig_response": f"Hello, guest {number}!",
        "orig_reference_answer": f"A warm welcome, guest {number}!",
        "orig_criteria": "Is it polite?",
        **{f"orig_{key}": text for key, text in zip(SCORE_KEYS, DESCRIPTIONS, strict=True)},
        "orig_score": str(score),
        "orig_feedback": f"Greeting {number} is plain.",
        "instruction": prompt(number),  # as published: the whole prompt, and what it should be answered by
        "output": f"Feedback: Greeting {number} is plain. [RESULT] {score}",
    }
    return {**row, **changes}


def biggen(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": "greeting_0",
        "capability": "refinement",
        "task": "greeting",
        "system_prompt": "You are a host.",
        "input": f"Greet guest {number}.",
        "reference_answer": f"A warm welcome, guest {number}!",
        "score_rubric": {"criteria": "Is it polite?", **dict(zip(SCORE_KEYS, DESCRIPTIONS, strict=True))},
        "response": f"Hello, guest {number}!",
        "human_score": None,
        "gpt4_score": 1 + number % 5,
    }
    return {**row, **changes}


def pair(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": f"Greet guest {number}.",
        "chosen": f"Welcome, guest {number}!",
        "rejected": f"Go, guest {number}.",
    }
    return {**row, "subset": "chat" if number % 2 else "safety", **changes}


def prompt(number: int, response: str = "", reference: str = "A warm welcome!") -> str:
    """A judge prompt in the Prometheus layout."""
    rubric = "\n".join(f"Score {score}: {text}" for score, text in enumerate(DESCRIPTIONS, start=1))
    blocks = [
        "###Task Description:\nAn instruction, a response and a rubric are given.",
        f"###The instruction to evaluate:\nGreet guest {number}.",
        f"###Response to evaluate:\n{response or f'Hello, guest {number}!'}",
        *([f"###Reference Answer (Score 5):\n{reference}"] if reference else []),
        f"###Score Rubrics:\n[Is it polite?]\n{rubric}",
        "###Feedback: ",
    ]
    return "\n\n".join(blocks)


def prometheus_text(number: int, **changes: Any) -> dict[str, Any]:
    row = {"idx": 7, "category": "chat", "instruction": prompt(number)}
    return {**row, "gpt4_score": [3, 2, 3], "gpt4_feedback": ["So so.", "Poor.", "Fair."], **changes}


def own(number: int, **changes: Any) -> dict[str, Any]:
    row = {"instruction": f"Greet guest {number}.", "response": f"Hello, guest {number}!", "criteria": "Is it polite?"}
    return {**row, "score_descriptions": DESCRIPTIONS, "score": 1 + number % 5, "feedback": "Plain.", **changes}


def write(path: Path, rows: list[Any], *, array: bool = False) -> Path:
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path
