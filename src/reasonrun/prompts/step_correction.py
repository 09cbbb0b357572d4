"""The words that ask a model for the step that should come next, and a script that plays the teacher.

A change here bumps the version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reasonrun.records import Message

VERSION = 1

_SO_FAR, _NEXT, _NOTHING = "### Solution so far", "### Next step", "(nothing yet)"
_TASK = (
    "The solution so far is right, but the attempt to go on from it went wrong. Write step {number} as it should be: one"
    " step, in the form of the steps before it, and nothing else, no comment and no further step."
)
_LABEL = ' Begin with "{label}".'


def messages(question: str, so_far: str, number: int) -> tuple[Message, ...]:
    """The conversation.

    Args:
        question: the problem.
        so_far: the right beginning of a solution, up to the label of the step if steps have labels.
        number: of the step, from 1.
    """
    steps, _, label = so_far.rpartition("\n")
    task = _TASK.format(number=number) + (_LABEL.format(label=label.strip()) if label.strip() else "")
    text = f"### Problem\n{question.strip()}\n\n{_SO_FAR}\n{steps.strip() or _NOTHING}\n\n{_NEXT}\n{task}"
    return (Message(role="user", content=text),)


def scripted(asked: Sequence[Message], answer: Callable[[str], str]) -> str | None:
    """The step of a teacher that goes on as ``answer`` goes on from a prefix. None for other conversations."""
    _, is_asked, rest = asked[-1].content.rpartition(f"\n\n{_SO_FAR}\n")
    steps, _, task = rest.partition(f"\n\n{_NEXT}\n")
    if not is_asked:
        return None
    _, has_label, label = task.rpartition('Begin with "')
    label = label.removesuffix('".') if has_label else ""
    prefix = ("" if steps == _NOTHING else steps + "\n") + label
    return label + answer(prefix).lstrip("\n").partition("\n")[0]
