"""Where a wrong solution goes wrong: its prefix up to the label of the first wrong step, by several locators.

A curation function here goes through the wrong rows of a problem and yields a prefix of each, or why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reasonrun.curate.group import Group, curation, evidence, first_tokens, fits
from reasonrun.curate.steps import Steps
from reasonrun.records import Graded, LeftOut, Prefix

Outcome = Iterator[Prefix | LeftOut]
Located = Callable[[Graded, Steps], int | str]


def errors(group: Group, tried: Sequence[Graded], *, steps: str, cap: int) -> Iterator[tuple[Graded, Steps | str]]:
    """Every row, with its steps if it is a wrong answer to look into, else the reason to leave it out.

    Args:
        group: the problem.
        tried: its solutions.
        steps: how to cut them: labels, lines or task.
        cap: at most so many wrong answers of a problem, the first sampled first; 0 is no cap.
    """
    num_taken = 0
    for row in tried:
        if row.correct:
            yield row, "correct"
        elif row.score.value is None:
            yield row, f"ungraded: {row.score.reason}"
        elif cap and num_taken == cap:
            yield row, "over_cap"
        else:
            found = group.steps(row.rollout, steps)
            num_taken += not isinstance(found, str)
            yield row, found


def _cut_at(
    group: Group, tried: Sequence[Graded], locate: Located, *, steps: str, cap: int, room: int
) -> Iterator[Prefix | LeftOut]:
    """The prefix of each error that ends with the label of the step that ``locate`` names.

    ``room`` are the tokens that a continuation may take: a prefix that leaves fewer in the context is left out.
    """
    for row, found in errors(group, tried, steps=steps, cap=cap):
        number = found if isinstance(found, str) else locate(row, found)
        if isinstance(found, str) or isinstance(number, str):
            yield LeftOut(rollout_id=row.rollout.id, reason=str(number))
            continue
        num_tokens = found.bodies[number - 1]
        if not fits(group, row, num_tokens, room):
            yield LeftOut(rollout_id=row.rollout.id, reason="prefix_too_long")
            continue
        yield first_tokens(row, num_tokens, num_steps=number - 1)


@curation(version=1)
def programmatic_errors(group: Group, tried: list[Graded], *, steps: str, cap: int, room: int) -> Outcome:
    """The first wrong step as the task's program finds it."""

    def locate(row: Graded, found: Steps) -> int | str:
        char = group.first_error(row.rollout.text)
        return char if isinstance(char, str) else found.holding(char)

    return _cut_at(group, tried, locate, steps=steps, cap=cap, room=room)


@curation(version=1)
def judged_errors(
    group: Group, tried: list[Graded], judged: list[Graded], *, steps: str, cap: int, room: int
) -> Outcome:
    """The first wrong step as a model names it: ``judged`` holds the verdicts, each on the row that is its parent."""
    verdicts = {row.rollout.parent_id: row.score for row in judged}

    def locate(row: Graded, found: Steps) -> int | str:
        score = verdicts.get(row.rollout.id)
        if score is None or score.value is None or score.answer is None:
            return f"judge: {score.reason if score else 'not_asked'}"
        return int(score.answer) if int(score.answer) <= len(found) else "judge: no_such_step"

    yield from _cut_at(group, tried, locate, steps=steps, cap=cap, room=room)
    yield from evidence(judged)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """Where a search stands: the prefixes to probe next, by the whole steps in them; or, when there are none, the number
    of the first wrong step or the reason why it cannot be told."""

    wanted: tuple[int, ...] = ()
    outcome: int | str = ""


def search(num_steps: int, rates: Mapping[int, float | None], *, binary: bool) -> Search:
    """The first wrong step of a wrong solution by the success of continuations.

    v_j is the share of continuations of steps 1 to j that end right, v_0 that of solutions from scratch, and v_n is 0:
    the whole solution is wrong. The first wrong step is the smallest k with v_k = 0 and v_(k-1) > 0, as in Self-Explore's
    search for the first pit (Hwang et al. 2024, arXiv 2404.10346, §3.2). A binary search needs fewer probes and finds a
    k with that property, the smallest one where v falls to 0 only once.

    Args:
        num_steps: n.
        rates: v_j of the probes so far; None when none of its continuations could be graded.
        binary: search by halving.
    """
    if 0 not in rates:
        return Search(wanted=(0,))
    if rates[0] == 0:
        return Search(outcome="never_solved")
    if None in rates.values():
        return Search(outcome="ungraded_probes")
    if binary:
        return _halved(num_steps, rates)
    missing = tuple(j for j in range(num_steps) if j not in rates)
    if missing:
        return Search(wanted=missing)
    return Search(outcome=next(k for k in range(1, num_steps + 1) if k == num_steps or not rates[k]))


def _halved(num_steps: int, rates: Mapping[int, float | None]) -> Search:
    low, high = 0, num_steps
    while high - low > 1:
        middle = (low + high) // 2
        if middle not in rates:
            return Search(wanted=(middle,))
        low, high = (middle, high) if rates[middle] else (low, middle)
    return Search(outcome=high)


def _rates(row: Graded, found: Steps, probed: Sequence[Sequence[Graded]]) -> dict[int, float | None]:
    """Share of right continuations by the number of whole steps they went on from; None where none was graded."""
    verdicts: dict[int, list[bool]] = {}
    for probe in (probe for wave in probed for probe in wave):
        if probe.rollout.parent_id == row.rollout.id:
            of_prefix = verdicts.setdefault(found.starts.index(probe.rollout.num_given_tokens), [])
            if probe.score.value is not None:
                of_prefix.append(probe.correct)
    return {j: sum(right) / len(right) if right else None for j, right in verdicts.items()}


@curation(version=1)
def probes(
    group: Group, tried: list[Graded], *probed: list[Graded], steps: str, cap: int, room: int, binary: bool
) -> Outcome:
    """What to continue next in the search for first wrong steps: prefixes that end before a step's label."""
    for row, found in errors(group, tried, steps=steps, cap=cap):
        if isinstance(found, str):
            yield LeftOut(rollout_id=row.rollout.id, reason=found)
            continue
        wanted = search(len(found), _rates(row, found, probed), binary=binary).wanted
        if not fits(group, row, found.starts[-1], room):
            wanted = ()
        for j in wanted:
            yield first_tokens(row, found.starts[j], num_steps=j)
        if not wanted:
            yield LeftOut(rollout_id=row.rollout.id, reason="searched")
    yield from evidence(*probed)


@curation(version=1)
def probed_errors(
    group: Group, tried: list[Graded], *probed: list[Graded], steps: str, cap: int, room: int, binary: bool
) -> Outcome:
    """The first wrong step as continuations by the policy tell it (``search``)."""

    def locate(row: Graded, found: Steps) -> int | str:
        state = search(len(found), _rates(row, found, probed), binary=binary)
        return "prefix_too_long" if state.wanted else state.outcome

    yield from _cut_at(group, tried, locate, steps=steps, cap=cap, room=room)
    yield from evidence(*probed)
