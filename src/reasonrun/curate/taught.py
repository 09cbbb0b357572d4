"""Preference pairs in which a teacher's step wins against the first wrong step of a solution."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from reasonrun.curate.duels import Turn, refused
from reasonrun.curate.group import Group, curation, evidence
from reasonrun.curate.pairs import Corrected, Pairing, pairs_of_errors, success_rates
from reasonrun.curate.steps import LABEL
from reasonrun.records import Example, Graded, LeftOut


@curation(version=2)
def taught_pairs(
    group: Group,
    tried: list[Graded],
    rectified: list[Graded],
    taught: list[Graded],
    *checked: list[Graded],
    steps: str,
    **rules: Any,
) -> Iterator[Example | LeftOut]:
    """As ``error_pairs`` in the form ``teacher``, with steps that a model wrote.

    Args:
        group: the problem.
        tried: its solutions.
        rectified: continuations of the prefixes of wrong ones.
        taught: what the teacher wrote, each on the wrong solution that is its parent.
        checked: see ``error_pairs``.
        steps: how completions are cut: labels, lines or task.
        rules: the other parameters of ``error_pairs``, with the form ``teacher``.
    """
    by_error = {row.rollout.parent_id: row for row in taught}
    reasons: dict[str, str] = {}

    def correction(loser: Turn, number: int) -> Corrected | str:
        row = by_error.get(loser.row.rollout.id)
        if row is None:
            return "teacher: not_asked"
        ids = corrected(group, row, loser, number, steps)
        if isinstance(ids, str):
            reasons[row.rollout.id] = f"teacher: {ids}"
            return "no_teacher_step"
        return Corrected(ids=ids, rollout_ids=(row.rollout.id,))

    rates = success_rates(checked)
    pairing = Pairing(group=group, steps=steps, correction=correction, rates=rates, **{"form": "teacher", **rules})
    used: set[str] = set()
    for outcome in pairs_of_errors(pairing, tried, rectified):
        if not isinstance(outcome, LeftOut):
            used.update(outcome.rollout_ids)
        yield outcome
    for row in taught:
        if row.rollout.id not in used:
            yield LeftOut(rollout_id=row.rollout.id, reason=reasons.get(row.rollout.id, "not_rectified"))
    yield from evidence(*checked)


def corrected(group: Group, row: Graded, loser: Turn, number: int, steps: str) -> tuple[int, ...] | str:
    """The teacher's step as the policy would have written it in the place of the wrong one.

    It is cut by the same segmenter, has the blanks of the wrong step around it, and an end of sequence only if that one
    has.

    Returns:
        The ids, or why there are none: empty, truncated, other_step, no_step, no_ending (a last step that lacks lines
        which the wrong one has, such as the answer), same_as_rejected.
    """
    if row.score.value is None:
        return row.score.reason
    completion = loser.row.rollout.completion_ids
    before = group.decode(completion[: loser.start])
    wrong = group.decode(completion[: loser.end])[len(before) :]
    said = _without_label(row.rollout.text, before.rpartition("\n")[2].strip(), number)
    if said is None:
        return "other_step"
    blanks = wrong[: len(wrong) - len(wrong.lstrip())], wrong[len(wrong.rstrip()) :]
    found = group.texts(before + blanks[0] + said, steps)
    if isinstance(found, str) or len(found) < number or not found[number - 1].strip():
        return "no_step"
    step = found[number - 1].strip()
    if loser.is_last and len(step.split("\n")) < len(wrong.strip().split("\n")):
        return "no_ending"
    ending = loser.ids[-1:] if loser.is_last and not group.decode(loser.ids[-1:]) else ()
    ids = group.encode(blanks[0] + step + blanks[1]) + ending
    return refused(ids, loser.is_last, loser) or ids


def _without_label(text: str, label: str, number: int) -> str | None:
    """What a teacher wrote after the step's label, and any words before that; None when it labels another step."""
    own = re.search(rf"^\s*{re.escape(label)}", text, re.MULTILINE) if label else None
    if own:
        return text[own.end() :].strip()
    labels = list(LABEL.finditer(text)) if label else []
    if not labels:
        return text.strip()
    same = next((match for match in labels if int(match[1]) == number), None)
    return text[same.end() :].strip() if same else None
