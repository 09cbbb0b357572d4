"""Rejection sampling: which of a model's own solutions it learns from."""

from __future__ import annotations

import random
from collections.abc import Iterator

from reasonrun.curate.group import Group, curation, imitate
from reasonrun.randomness import derive_seed
from reasonrun.records import Example, Graded, LeftOut, SFTExample


def why_not(row: Graded) -> str | None:
    """The reason to leave a row out of imitation, None when its answer is right."""
    if row.score.value is None:
        return f"ungraded: {row.score.reason}"
    return None if row.correct else row.score.reason


@curation(version=1)
def star_rows(
    group: Group,
    tried: list[Graded],
    hinted: list[Graded],
    *,
    style: str = "plain",
    dedupe: bool = False,
    cap: int = 0,
    hint_markers: tuple[str, ...] = (),
) -> Iterator[Example | LeftOut]:
    """STaR's D_n and R_n (Zelikman et al. 2022, Algorithm 1): own right solutions, and hinted ones for the rest.

    Args:
        group: the problem.
        tried: solutions without a hint.
        hinted: solutions with the answer as a hint; stored against the bare prompt. Those that mention a hint marker
            are left out.
        style: the prompt style of the training sequence.
        dedupe: leave out repeated texts of one problem.
        cap: at most this many examples of a problem, the first sampled first; 0 is no cap.
        hint_markers: texts by which a solution shows that it saw the hint.
    """
    seen: set[str] = set()
    num_kept = 0
    for source, rows in (("self", tried), ("hinted", hinted)):
        for row in rows:
            text = row.rollout.text.strip()
            reason = why_not(row)
            if reason is None and source == "hinted" and any(marker in text for marker in hint_markers):
                reason = "mentions_hint"
            if reason is None and dedupe and text in seen:
                reason = "duplicate"
            if reason is None and cap and num_kept == cap:
                reason = "over_cap"
            if reason is not None:
                yield LeftOut(rollout_id=row.rollout.id, reason=reason)
                continue
            seen.add(text)
            num_kept += 1
            yield imitate(group.prompt(style), row, source=source)


@curation(version=1)
def gold_rows(group: Group, *, style: str = "direct") -> Iterator[Example | LeftOut]:
    """The gold answer without a rationale: direct-answer fine-tuning."""
    yield SFTExample(
        problem_id=group.problem.id, rollout_ids=(), segments=(group.prompt(style), group.gold()), source="gold"
    )


@curation(version=1)
def unfiltered_rows(
    group: Group, tried: list[Graded], *, style: str = "plain", share: float = 1.0, seed: int = 0
) -> Iterator[Example | LeftOut]:
    """The control: own solutions chosen by a coin that lands on "keep" with probability ``share``, right or wrong."""
    for row in tried:
        if random.Random(derive_seed("unfiltered", seed, row.rollout.id)).random() < share:
            yield imitate(group.prompt(style), row, source="unfiltered")
        else:
            yield LeftOut(rollout_id=row.rollout.id, reason="coin")
