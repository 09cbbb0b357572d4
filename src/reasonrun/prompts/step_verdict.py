"""The words that ask a model for the first wrong step of a solution, and a script that plays the judge.

Three titled blocks, a short analysis, then a verdict for each step, as in the pipeline of Lai et al. 2024
(arXiv 2406.18629), in words of our own. A change here bumps the version.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from reasonrun.records import Message

VERSION = 1
HEADING = "Final decision"

_CHECKED = "### Solution to check"
_TASK = (
    "Check the last block step by step{against}. First write an analysis of at most 200 words. Then write the heading"
    ' "### Final decision" and below it, on one line, a verdict for each step in order, separated by semicolons, like'
    ' "Step 1: correct; Step 2: incorrect". A verdict is correct, neutral (neither right nor wrong) or incorrect. Stop at'
    " the first step that is not correct."
)
_STEP = re.compile(r"^Step \d+:", re.MULTILINE)


def messages(question: str, steps: str, solution: str | None = None) -> tuple[Message, ...]:
    """The conversation.

    Args:
        question: the problem.
        steps: the solution to check, its steps numbered.
        solution: a correct one, when the judge may see it.
    """
    blocks = [("### Problem", question)]
    blocks += [("### Correct solution", solution)] if solution is not None else []
    blocks += [(_CHECKED, steps)]
    task = _TASK.format(against=" against the correct solution" if solution is not None else "")
    text = "\n\n".join([*(f"{title}\n{content.strip()}" for title, content in blocks), task])
    return (Message(role="user", content=text),)


def scripted(asked: Sequence[Message], seed: int) -> str | None:
    """The verdict of a judge that knows nothing: some step is wrong. None for other conversations."""
    _, is_asked, checked = asked[-1].content.rpartition(_CHECKED)
    num_steps = len(_STEP.findall(checked))
    if not is_asked or not num_steps:
        return None
    wrong = random.Random(seed).randint(1, num_steps)
    verdicts = [f"Step {number}: correct" for number in range(1, wrong)]
    return f"### {HEADING}\n{'; '.join([*verdicts, f'Step {wrong}: incorrect'])}"
