"""What judges are asked about responses: golden words, and item texts that stay what they are wherever they stand."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reasonrun.prompts
from reasonrun.code_digest import code_digests
from reasonrun.methods.self_rationalize import SelfRationalize
from reasonrun.prompts import judge
from reasonrun.prompts.judge import Rubric
from reasonrun.records import Message
from reasonrun.tasks.arith_judge import ArithJudge

GOLDEN_DIR = Path(__file__).parent.parent / "golden"
RUBRIC = Rubric(criteria="Is it polite?", descriptions=("Rude.", "Curt.", "Neutral.", "Kind.", "Most kind."))
ITEM = ("Greet {name}.", "Hello!", RUBRIC)
MARKS = (
    *("[RESULT] 5", "###Score Rubric:", "###Feedback:", "<|im_end|>", "None", "%s", "{", "}}", "{}"),
    *("{instruction}", "{response}", "{reference}", "{rubric}", "{judgement}", "{criteria}"),
)


def layouts(
    instruction: str, response: str, rubric: Rubric, other: str, reference: str | None
) -> dict[str, tuple[Message, ...]]:
    """Every layout that takes these texts; ``other`` is the second response or the judgement."""
    return {
        "absolute": judge.absolute(instruction, response, rubric, reference),
        "score_only": judge.absolute(instruction, response, rubric, reference, score_only=True),
        "pairwise": judge.pairwise(instruction, response, other, rubric.criteria, reference),
        "yes_no": judge.yes_no(instruction, response, rubric.criteria, reference),
        "meta": judge.meta(instruction, response, rubric, other, reference),
    }


def every_prompt() -> dict[str, list[list[str]]]:
    prompts = {}
    for form, reference in (("", None), ("_with_reference", "Good morning, {name}.")):
        for layout, messages in layouts(*ITEM, "Hi. [RESULT] 4", reference).items():
            prompts[layout + form] = [[message.role, message.content] for message in messages]
    return prompts


def test_the_prompts_are_the_golden_ones() -> None:
    path = GOLDEN_DIR / f"prompts-judge-{judge.VERSION}.json"
    assert path.exists(), f"a new prompt version needs its own golden file: {path.name}"
    assert every_prompt() == json.loads(path.read_text("utf-8"))


def test_every_attempt_records_the_digest_of_the_words() -> None:
    name = f"judge-{judge.VERSION}.toml"
    content = (Path(reasonrun.prompts.__file__).parent / name).read_bytes()
    recorded = code_digests(SelfRationalize, ArithJudge)[f"prompts/{name}"]
    assert hashlib.sha256(content).hexdigest().startswith(recorded) and len(recorded) == 32


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_without_a_reference_no_word_and_no_block_speaks_of_one(blank: str | None) -> None:
    for layout, messages in layouts(*ITEM, "Hi.", blank).items():
        text = "\n".join(message.content for message in messages)
        assert not re.search(r"reference|None", text, re.IGNORECASE), layout
        assert not re.search(r":\n\n|\n\n\n", text), layout  # a title over nothing
    for layout, messages in layouts(*ITEM, "Hi.", "Good day.").items():
        user = messages[-1].content
        assert user.count("###Reference Answer") == 1 and "a reference answer" in user.split("\n1. ")[0], layout


def test_blocks_stand_in_the_published_order_and_a_cue_ends_them() -> None:
    order = {
        "absolute": "Task Description|Instruction|Response|Reference|Score Rubric|Feedback",
        "score_only": "Task Description|Instruction|Response|Reference|Score Rubric|Score",
        "pairwise": "Task Description|Instruction|Response A|Response B|Reference|Criterion|Feedback",
        "yes_no": "Task Description|Instruction|Response|Reference|Criterion|Feedback",
        "meta": "Task Description|Instruction|Response|Reference|Score Rubric|Evaluation|Score Rubric for|Feedback",
    }
    for layout, (system, user) in layouts(*ITEM, "Hi.", "Good day.").items():
        assert (system.role, user.role) == ("system", "user") and "\n" not in system.content
        titles = re.findall(r"^###(.*)$", user.content, re.MULTILINE)
        wanted = order[layout].split("|")
        assert len(titles) == len(wanted) and all(t.startswith(w) for t, w in zip(titles, wanted, strict=True)), layout
        assert user.content.endswith(f"###{wanted[-1]}:")
        assert len(re.findall(r"^[1-4]\. ", user.content.split("\n\n")[0], re.MULTILINE)) == 4
        assert user.content.count("[RESULT]") == 1


def test_the_score_alone_is_asked_for_without_a_word_of_writing_feedback() -> None:
    _, user = judge.absolute(*ITEM, score_only=True)
    assert "no feedback" in user.content and "feedback" not in user.content.replace("no feedback", "").lower()
    assert judge.SCORE_OPENING == "[RESULT]"


def test_a_rubric_has_a_line_for_each_score() -> None:
    lines = ["[Is it polite?]", "Score 1: Rude.", "Score 2: Curt.", "Score 3: Neutral.", "Score 4: Kind."]
    assert RUBRIC.text.split("\n") == [*lines, "Score 5: Most kind."]
    for rubric in (*judge.RUBRICS.values(), judge.META_RUBRIC):
        assert (
            all(text.strip() for text in (rubric.criteria, *rubric.descriptions)) and len(set(rubric.descriptions)) == 5
        )


def test_inline_keeps_every_word_in_one_turn() -> None:
    system, user = judge.absolute(*ITEM)
    assert judge.inline((system, user)) == (Message(role="user", content=f"{system.content}\n\n{user.content}"),)


pieces = st.one_of(st.sampled_from(MARKS), st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20))
texts = st.lists(pieces, min_size=1, max_size=4).map("\n".join).filter(str.strip)
rubrics = st.builds(Rubric, criteria=texts, descriptions=st.tuples(texts, texts, texts, texts, texts))


@settings(max_examples=150, deadline=None)
@given(texts, texts, rubrics, texts, st.none() | texts)
def test_item_texts_are_never_lost_and_never_read_as_ours(
    instruction: str, response: str, rubric: Rubric, other: str, reference: str | None
) -> None:
    """A prompt is that of placeholder texts with the item's own in their places: nothing else moves."""
    names = ("\0one\0", "\0two\0", "\0four\0", "\0five\0" if reference else None)
    marks = [f"\0{number}\0" for number in range(6)]
    marked = Rubric(criteria=marks[0], descriptions=(marks[1], marks[2], marks[3], marks[4], marks[5]))
    item = {names[0]: instruction, names[1]: response, names[2]: other, names[3]: reference}
    item |= dict(zip(marks, (rubric.criteria, *rubric.descriptions), strict=True))
    bare = layouts(names[0], names[1], marked, names[2], names[3])
    for layout, (system, user) in layouts(instruction, response, rubric, other, reference).items():
        parts = re.split("(\0\\w+\0)", bare[layout][1].content)
        assert user.content == "".join(item.get(part, part) for part in parts), layout
        assert system == bare[layout][0]
