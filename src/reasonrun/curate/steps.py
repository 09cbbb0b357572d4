"""Reasoning steps: where they begin in a text, and where a completion can be cut without splitting a token."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

LABEL = re.compile(r"^[ \t]*(?:#+ |\*\*)?Step (\d+)(?:\*\*)?[:.](?:\*\*)?", re.MULTILINE)
_LINE = re.compile(r"^[ \t]*\S", re.MULTILINE)

Marks = Sequence[tuple[int, int]]
"""For each step the character where it begins, and the one where its text begins, after a label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """A completion cut into steps, counted in tokens after the prompt.

    ``starts`` are the tokens before each step, ``bodies`` those before its text: they differ by its label. A step
    reaches to the next one, the last to the end of the completion, end-of-sequence token included. ``chars`` are the
    characters where the steps begin.
    """

    starts: tuple[int, ...]
    bodies: tuple[int, ...]
    chars: tuple[int, ...]
    num_tokens: int

    def __len__(self) -> int:
        return len(self.starts)

    def end(self, number: int) -> int:
        """Tokens up to the end of step ``number``, from 1."""
        return self.starts[number] if number < len(self) else self.num_tokens

    def holding(self, char: int) -> int:
        """The number (from 1) of the step in which the character at ``char`` stands; 1 for what is before all steps."""
        return max(1, sum(start <= char for start in self.chars))

    def beginning_at(self, num_tokens: int) -> int | None:
        """The number of the step whose text, or whose label, comes right after ``num_tokens`` tokens; None if none."""
        for places in (self.bodies, self.starts):
            if num_tokens in places:
                return places.index(num_tokens) + 1
        return None


def labelled(text: str) -> Marks | str:
    """Steps that begin lines with ``Step 1:``, ``Step 2:`` …, consecutive from 1; what comes before belongs to none.

    Returns:
        The marks, or why there are none: ``no_labels``, ``labels_not_consecutive``.
    """
    found = list(LABEL.finditer(text))
    if not found:
        return "no_labels"
    if [int(match[1]) for match in found] != list(range(1, len(found) + 1)):
        return "labels_not_consecutive"
    return [(match.start(), match.end()) for match in found]


def lines(text: str) -> Marks | str:
    """Every line that is not blank is a step. Returns the marks, or ``no_lines``."""
    return [(match.start(), match.start()) for match in _LINE.finditer(text)] or "no_lines"


SEGMENTERS: dict[str, Callable[[str], Marks | str]] = {"labels": labelled, "lines": lines}


def numbered(text: str, starts: Sequence[int]) -> str:
    """A solution for somebody else to read: each step that begins at ``starts`` under its own number, in place of the
    label that it has; what comes before them stays."""
    parts = [text[: starts[0]].strip()] if starts else []
    for number, (start, end) in enumerate(pairwise([*starts, len(text)]), start=1):
        step = text[start:end].strip()
        label = LABEL.match(step)
        parts.append(f"Step {number}: {step[label.end() :].strip() if label else step}")
    return "\n".join(part for part in parts if part)


def on_tokens(text: str, places: Sequence[int], marks: Marks) -> Steps | str:
    """The steps of a completion, where tokens allow to cut it.

    Args:
        text: the completion.
        places: characters before each token, and before the end (``Renderer.decode_with_places``).
        marks: the steps.

    Returns:
        The steps, or ``no_token_boundary`` when a token holds the end of one step and the beginning of the next, or a
        label and more than blanks after it.
    """
    starts = [_boundary(text, places, start, -1) for start, _ in marks]
    bodies = [_boundary(text, places, body, 1) for _, body in marks]
    kept_starts = [place for place in starts if place is not None]
    kept_bodies = [place for place in bodies if place is not None]
    if len(kept_starts) + len(kept_bodies) < 2 * len(marks):
        return "no_token_boundary"
    return Steps(
        starts=tuple(kept_starts),
        bodies=tuple(kept_bodies),
        chars=tuple(start for start, _ in marks),
        num_tokens=len(places) - 1,
    )


def _boundary(text: str, places: Sequence[int], char: int, direction: int) -> int | None:
    """Tokens before ``char``, or before the nearest place beyond nothing but blanks; None if there is none."""
    while True:
        token = bisect_left(places, char)
        if token < len(places) and places[token] == char:
            return token
        neighbour = char - 1 if direction < 0 else char
        if not (0 <= neighbour < len(text) and text[neighbour].isspace()):
            return None
        char += direction
