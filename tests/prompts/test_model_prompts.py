"""What judges and teachers are asked, word for word: a prompt that changes needs another version and golden file."""

from __future__ import annotations

import json
from pathlib import Path

from reasonrun.grading.verdict import StepVerdictGrader
from reasonrun.prompts import step_correction, step_verdict
from reasonrun.records import Message, Problem

GOLDEN_DIR = Path(__file__).parent.parent / "golden"
QUESTION = "Tom has 8."
STEPS = "Step 1: 8 * 9 = 72\nStep 2: 72 + 3 = 76"
REFERENCE = "8 * 9 = 72, 72 + 3 = 75"


def golden(name: str, version: int) -> dict[str, str]:
    path = GOLDEN_DIR / f"prompts-{name}-{version}.json"
    assert path.exists(), f"a new prompt version needs its own golden file: {path.name}"
    return json.loads(path.read_text("utf-8"))


def text(messages: tuple[Message, ...]) -> str:
    (message,) = messages
    assert message.role == "user"
    return message.content


def test_the_judges_prompts_are_the_golden_ones() -> None:
    assert golden("step_verdict", step_verdict.VERSION) == {
        "no_ref": text(step_verdict.messages(QUESTION, STEPS)),
        "with_ref": text(step_verdict.messages(QUESTION, STEPS, REFERENCE)),
    }


def test_the_teachers_prompts_are_the_golden_ones() -> None:
    assert golden("step_correction", step_correction.VERSION) == {
        "labelled": text(step_correction.messages(QUESTION, "Step 1: 8 * 9 = 72\nStep 2:", 2)),
        "first": text(step_correction.messages(QUESTION, "Step 1:", 1)),
        "lines": text(step_correction.messages(QUESTION, "Eight times nine is 72.\n", 2)),
    }


def test_braces_in_a_problem_stay_braces() -> None:
    assert "{x} {number} {against}" in text(step_verdict.messages("{x} {number} {against}", STEPS, "{y}"))
    assert "{number}" in text(step_correction.messages("{number}", "", 1))


def test_the_script_answers_its_own_prompts_and_no_others() -> None:
    problem = Problem(id="p", task="t", split="dev", messages=(), reference="")
    asked = step_verdict.messages(QUESTION, STEPS)
    named = set()
    for seed in range(20):
        said = step_verdict.scripted(asked, seed)
        assert said is not None
        named.add(StepVerdictGrader().grade(problem, said, truncated=False).answer)
    assert named == {"1", "2"}
    seen = []

    def answer(prefix: str) -> str:
        seen.append(prefix)
        return " 72 + 3 = 75\nAnswer: 75"

    teach = step_correction.messages(QUESTION, "Step 1: 8 * 9 = 72\nStep 2:", 2)
    assert step_correction.scripted(teach, answer) == "Step 2: 72 + 3 = 75"
    assert seen == ["Step 1: 8 * 9 = 72\nStep 2:"]
    plain = (Message(role="user", content=QUESTION),)
    assert step_verdict.scripted(plain, 0) is None and step_correction.scripted(plain, answer) is None
    assert step_verdict.scripted(teach, 0) is None and step_correction.scripted(asked, answer) is None
