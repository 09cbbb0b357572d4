"""The words that ask a judge: one response by a rubric, two responses, a yes or no, and an evaluation as a response.

The layout is that of Prometheus (Kim et al. 2024, arXiv 2405.01535), in words of our own (``judge-1.toml``): a system line,
then a user turn of titled blocks that ends with a cue. Departures: without a reference no word mentions one, and a criterion
alone is enough where two responses are compared.

Texts of an item are joined to ours, never substituted into them, so braces, titles and markers in them stay what they are.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

from reasonrun.records import Message, Record

VERSION = 1
_WORDS: dict[str, Any] = tomllib.loads(
    resources.files("reasonrun.prompts").joinpath(f"judge-{VERSION}.toml").read_text("utf-8")
)
_TITLES: dict[str, str] = _WORDS["titles"]

SCORE_OPENING: str = _WORDS["score_only"]["opening"]
"""Put in the model's mouth where the score alone is asked for."""


class Rubric(Record):
    """What a score means: a criterion, and a description of each score from 1 to 5."""

    criteria: str
    descriptions: tuple[str, str, str, str, str]

    @property
    def text(self) -> str:
        """The criterion in brackets, then a line for each score."""
        lines = [f"Score {score}: {text}" for score, text in enumerate(self.descriptions, start=1)]
        return "\n".join([f"[{self.criteria}]", *lines])


RUBRICS = {name: Rubric(**fields) for name, fields in _WORDS["rubrics"].items()}
"""Rubrics by name, for items that have none of their own."""
META_RUBRIC = Rubric(criteria=_WORDS["meta"]["criteria"], descriptions=_WORDS["meta"]["descriptions"])


def absolute(
    instruction: str, response: str, rubric: Rubric, reference: str | None = None, *, score_only: bool = False
) -> tuple[Message, ...]:
    """Asks for feedback and a score from 1 to 5, or for the score alone.

    Args:
        instruction: what the response answers.
        response: what is judged.
        rubric: by which it is judged.
        reference: an answer worth a 5; None or blank shows none.
        score_only: ask for no feedback; the answer then begins with ``SCORE_OPENING``.
    """
    blocks = [("instruction", instruction), ("response", response), ("reference", reference), ("rubric", rubric.text)]
    return _messages("score_only" if score_only else "absolute", blocks)


def pairwise(
    instruction: str, response_a: str, response_b: str, criteria: str, reference: str | None = None
) -> tuple[Message, ...]:
    """Asks for feedback on two responses and the better one, A or B."""
    responses = [("response_a", response_a), ("response_b", response_b)]
    blocks = [("instruction", instruction), *responses, ("reference", reference), ("criteria", f"[{criteria}]")]
    return _messages("pairwise", blocks)


def yes_no(instruction: str, response: str, criteria: str, reference: str | None = None) -> tuple[Message, ...]:
    """Asks for feedback and whether the response meets the criterion."""
    blocks = [("instruction", instruction), ("response", response), ("reference", reference)]
    return _messages("yes_no", [*blocks, ("criteria", f"[{criteria}]")])


def meta(
    instruction: str, response: str, rubric: Rubric, judgement: str, reference: str | None = None
) -> tuple[Message, ...]:
    """Asks for feedback on ``judgement``, an evaluation of the response, and a score from 1 to 5 for it."""
    blocks = [("instruction", instruction), ("response", response), ("reference", reference), ("rubric", rubric.text)]
    return _messages("meta", [*blocks, ("judgement", judgement), ("judgement_rubric", META_RUBRIC.text)])


def inline(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation without a system turn, its text at the head of the user's, for templates that refuse the role."""
    system, user = messages
    return (Message(role="user", content=f"{system.content}\n\n{user.content}"),)


def _messages(layout: str, blocks: list[tuple[str, str | None]]) -> tuple[Message, ...]:
    words = _WORDS[layout]
    shown = [(title, text) for title, text in blocks if text is not None and (title != "reference" or text.strip())]
    form = "_with_reference" if any(title == "reference" for title, _ in shown) else ""
    rules = words.get(f"rules{form}", words["rules"])
    task = [words[f"given{form}"], *(f"{number}. {rule}" for number, rule in enumerate(rules, start=1))]
    parts = [("task", "\n".join(task)), *shown]
    body = "\n\n".join([*(f"{_TITLES[title]}\n{text}" for title, text in parts), words["cue"]])
    return (Message(role="system", content=words["system"]), Message(role="user", content=body))
