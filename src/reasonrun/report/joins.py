"""Which of two steps is at fault when both are sealed and they do not belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from reasonrun.ledger.damage import Damage, Finding, Promise

METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Join:
    """A step beside one that was made from it, or beside its line of the record.

    Attributes:
        source: the step that was read.
        reader: the step that names what it read, or ``metrics.jsonl``.
        things: what of the source the reader names.
        agrees: whether the source still holds just this.
        promise: the guarantee that a difference touches.
    """

    source: str
    reader: str
    things: str
    agrees: bool
    promise: Promise = "G7"

    def damage(self, at_fault: str, more: str = "") -> Damage:
        """The difference, as damage of one of the two."""
        if at_fault == METRICS:
            what = f"its line of step {self.source} says other things than the step's seal"
            return Damage(path=METRICS, what=what, promise=self.promise, remedy="aside", step=self.source)
        if at_fault == self.source:
            what = f"holds other {self.things} than those that {self.reader} was made from"
        else:
            what = f"was made from other {self.things} than those that {self.source} holds"
        return Damage(path=f"steps/{at_fault}", what=what + more, promise=self.promise, remedy="redo", step=at_fault)


def settled(found: Iterable[Finding | Join]) -> list[Finding]:
    """Findings, with every difference laid to one side.

    A difference with a step that is damaged by itself says nothing about the other one. Else the step is at fault that
    differs from most of what it can be compared with, or, where that does not tell, the one that was made later: it takes
    less with it.
    """
    findings: list[Finding] = []
    joins: dict[tuple[str, str], Join] = {}
    for one in found:
        if not isinstance(one, Join):
            findings.append(one)
        elif not one.agrees or (one.source, one.reader) not in joins:
            joins[one.source, one.reader] = one
    damaged = {one.step for one in findings if isinstance(one, Damage) and one.remedy == "redo"}
    return [*findings, *_blamed([join for join in joins.values() if not {join.source, join.reader} & damaged])]


def _blamed(joins: list[Join]) -> Iterator[Damage]:
    while step := _odd_one(joins):
        of_step = [join for join in joins if step in (join.source, join.reader)]
        differing = sorted((join for join in of_step if not join.agrees), key=lambda join: join.reader == METRICS)
        yield differing[0].damage(step, f", and {len(differing)} of {len(of_step)} comparisons with others fail")
        joins = [join for join in joins if join not in of_step]
    yield from (join.damage(join.reader) for join in joins if not join.agrees)


def _odd_one(joins: list[Join]) -> str:
    """The step that differs most clearly from the majority of its partners; empty where none does."""
    partners = Counter(step for join in joins for step in (join.source, join.reader))
    differing = Counter(step for join in joins if not join.agrees for step in (join.source, join.reader))
    partners.pop(METRICS, None)  # its lines are witnesses of their own
    share = {step: differing[step] / partners[step] for step in partners if differing[step] > 1}
    odd = sorted((step for step in share if share[step] > 0.5), key=lambda step: -share[step])
    for step in odd:
        ends = [{join.source, join.reader} for join in joins if not join.agrees]
        rivals = {other for pair in ends if step in pair for other in pair - {step}} & set(odd)
        if all(share[rival] < share[step] for rival in rivals):
            return step
    return ""
