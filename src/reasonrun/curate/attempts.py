"""Several attempts at one problem, each after the task's correction turn: how they are drawn, rewarded and imitated."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from reasonrun.contracts import versioned
from reasonrun.correction import alarms, first_attempt_moved
from reasonrun.curate.filtering import why_not
from reasonrun.curate.group import Group, curation
from reasonrun.on_policy import Live, State, attempts_of
from reasonrun.randomness import derive_seed
from reasonrun.records import (
    Example,
    Graded,
    LeftOut,
    PolicyGradientExample,
    Problem,
    Rollout,
    Sampling,
    Segment,
    SFTExample,
)
from reasonrun.settings import Effect, Settings, setting

if TYPE_CHECKING:
    from reasonrun.lab import Lab


class AttemptSettings(Settings):
    """How attempts are drawn."""

    num_attempts: int = setting(2, Effect.SEMANTIC, "Attempts in a row, the correction turn between them.", ge=1, le=8)
    style: str = setting("plain", Effect.SEMANTIC, "Prompt style of the first attempt.", min_length=1)
    max_new_tokens: int = setting(256, Effect.SEMANTIC, "Longest attempt in tokens.", ge=1)
    offline_share: float = setting(
        0.0,
        Effect.SEMANTIC,
        "Share of the problems whose first attempts were sampled before; they are not learnt.",
        ge=0,
        le=1,
    )


class TurnRewards(Settings):
    """What each attempt is rewarded with, and how strongly it is held to the reference.

    ``credit``: ``own`` rewards an attempt with its own verdict; ``last`` rewards all of them with the last one's.
    """

    rewarded: tuple[int, ...] = setting((1, 2), Effect.SEMANTIC, "Attempts that get their reward; the others get 0.")
    credit: str = setting("own", Effect.SEMANTIC, "own or last.", pattern="^(own|last)$")
    bonus: float = setting(
        0.0, Effect.SEMANTIC, "alpha: an attempt also gets alpha x (its verdict - the one before).", ge=0
    )
    kl_coefs: tuple[float, ...] = setting(
        (0.01, 0.01),
        Effect.SEMANTIC,
        "Pull of each attempt towards the reference; the last one is that of all further.",
    )
    learnt: tuple[int, ...] = setting((1, 2), Effect.SEMANTIC, "Attempts that are learnt at all.")

    @model_validator(mode="after")
    def _has_coefficients(self) -> Self:
        if not self.kl_coefs or min(self.kl_coefs) < 0:
            raise ValueError("kl_coefs needs a coefficient for each attempt, none below 0")
        return self


def require_room(lab: Lab, num_attempts: int, *, style: str, max_new_tokens: int, limit: int) -> None:
    """Refuse, before anything is sampled, training problems whose attempts may not fit into ``limit`` or the context."""
    again = [lab.task.correction()] * (num_attempts - 1)
    lab.require_room(lab.problems("train"), styles=[style], turns=again, max_new_tokens=max_new_tokens, limit=limit)


def correction_findings(lab: Lab, *, held_until: str = "") -> list[str]:
    """What a person should know of how a run's policies correct themselves on dev, against the base.

    Args:
        lab: of the finished run.
        held_until: beginning of the name of the first evaluation after a stage that held first attempts; empty for none.
    """
    seen = [(e.step, e.overall) for e in lab.evaluations if e.split == "dev" and e.overall]
    if not seen:
        return []
    base, last = seen[0][1], seen[-1][1]
    held = [table for step, table in seen if held_until and step.startswith(held_until)]
    return [*(line for table in held for line in first_attempt_moved(base, table)), *alarms(base, last)]


@versioned(1)
def attempts(live: Live, problems: Sequence[Problem], settings: AttemptSettings) -> list[Graded]:
    """First attempts, and each next one after the correction turn, whatever the verdict on the one before."""
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    again = [live.task.correction()] * (settings.num_attempts - 1) if settings.num_attempts > 1 else []
    tossed = [live.rng(f"offline/{problem.id}").random() < settings.offline_share for problem in problems]
    online = [problem for problem, is_offline in zip(problems, tossed, strict=True) if not is_offline]
    offline = [problem for problem, is_offline in zip(problems, tossed, strict=True) if is_offline]
    latest = live.sample(online, sampling=sampling, style=settings.style, turns=again)
    latest += [rollout for problem in offline for rollout in live.given(problem)[: live.group_size]]
    graded = live.grade(latest)
    for said in again:
        latest = live.turn(latest, said, sampling=sampling)
        graded += live.grade(latest)
    return graded


@versioned(1)
def turn_rewards(
    state: State, graded: Sequence[Graded], settings: TurnRewards
) -> tuple[State, list[PolicyGradientExample]]:
    """One row for each attempt, with a reward and a KL coefficient of its own.

    An attempt without log-probabilities was not sampled by the policy of the moment, and is not learnt.

    No reward of one attempt reaches another one's tokens (discount 0 between attempts) unless ``credit`` is ``last``: with
    the bonus on both, being wrong first would be worth alpha.
    """
    by_id = {row.rollout.id: row for row in graded}
    verdicts = {id: float(row.correct) for id, row in by_id.items()}
    final = dict(verdicts)
    for row in reversed(graded):  # the last attempt's verdict travels back to the first
        if row.rollout.parent_id in final:
            final[row.rollout.parent_id] = final[row.rollout.id]
    rows = []
    for row, attempt in zip(graded, attempts_of([row.rollout for row in graded]), strict=True):
        if attempt not in settings.learnt or row.rollout.logps is None:
            continue
        verdict = (final if settings.credit == "last" else verdicts)[row.rollout.id]
        earlier = verdicts.get(row.rollout.parent_id or "")
        reward = verdict if attempt in settings.rewarded else 0.0
        if earlier is not None and attempt in settings.rewarded:
            reward += settings.bonus * (verdicts[row.rollout.id] - earlier)
        kl_coef = settings.kl_coefs[min(attempt, len(settings.kl_coefs)) - 1]
        rows.append(turn_example(row.rollout, reward=reward, kl_coef=kl_coef, attempt=attempt))
    return state, rows


def turn_example(rollout: Rollout, *, reward: float, kl_coef: float, attempt: int) -> PolicyGradientExample:
    """A policy-gradient row of what a rollout sampled; everything before it, earlier attempts too, carries no loss."""
    return PolicyGradientExample(
        problem_id=rollout.problem_id,
        rollout_id=rollout.id,
        segments=(Segment(token_ids=rollout.prompt_ids, src="prompt", loss=False), *rollout.segments),
        reward=reward,
        kl_coef=kl_coef,
        group=rollout.problem_id,
        attempt=attempt,
        sampled_logps=rollout.logps or (),
    )


@curation(version=1)
def trace_rows(
    group: Group, first: list[Graded], second: list[Graded], *, keep_right: bool
) -> Iterator[Example | LeftOut]:
    """STaR on corrections: second attempts that turned a wrong first one right are imitated, given it.

    Args:
        group: the problem.
        first: first attempts.
        second: their next turns.
        keep_right: imitate right second attempts after right first ones, too ("STaR-traces+" in SCoRe's tables).
    """
    firsts = {row.rollout.id: row for row in first}
    for row in first:
        yield LeftOut(rollout_id=row.rollout.id, reason="evidence")
    for row in second:
        earlier = firsts[row.rollout.parent_id or ""]
        reason = why_not(row)
        if reason is None and earlier.score.value is None:
            reason = f"first attempt ungraded: {earlier.score.reason}"
        if reason is None and earlier.correct and not keep_right:
            reason = "right_before"
        if reason is not None:
            yield LeftOut(rollout_id=row.rollout.id, reason=reason)
            continue
        source = "kept_right" if earlier.correct else "corrected"
        yield _second_attempt(row.rollout.prompt_ids, row.rollout, (row.rollout.id,), source)


@curation(version=1)
def paired_rows(
    group: Group, first: list[Graded], *, said: str, keep_right: bool, cap: int = 4, seed: int = 0
) -> Iterator[Example | LeftOut]:
    """Pair-SFT (Welleck et al. 2023, arXiv 2211.00053, as SCoRe runs it): a right sample of a problem is imitated as if it
    corrected a wrong one.

    Args:
        group: the problem.
        first: independent samples.
        said: the correction turn.
        keep_right: also pair right samples with other right ones ("Pair-SFT+").
        cap: at most this many pairs of a problem and kind, chosen by ``seed``.
        seed: of the choice.
    """
    right = [row for row in first if row.correct]
    wrong = [row for row in first if row.score.value is not None and not row.correct]
    rng = random.Random(derive_seed("paired_rows", seed, group.problem.id))
    kinds = {"corrected": [(a, b) for a in wrong for b in right]}
    if keep_right:
        kinds["kept_right"] = [(a, b) for a in right for b in right if a is not b]
    used: set[str] = set()
    for source, pairs in kinds.items():
        for earlier, later in rng.sample(pairs, min(cap, len(pairs))):
            prompt_ids = group.next_turn(earlier.rollout, said)
            used |= {earlier.rollout.id, later.rollout.id}
            yield _second_attempt(prompt_ids, later.rollout, (earlier.rollout.id, later.rollout.id), source)
    for row in first:
        if row.rollout.id not in used:
            yield LeftOut(rollout_id=row.rollout.id, reason=_unpaired(row, right, wrong))


def _unpaired(row: Graded, right: list[Graded], wrong: list[Graded]) -> str:
    if row.score.value is None:
        return f"ungraded: {row.score.reason}"
    return "over_cap" if (wrong if row.correct else right) else "nothing_to_pair_with"


def _second_attempt(
    prompt_ids: Sequence[int], answer: Rollout, rollout_ids: tuple[str, ...], source: str
) -> SFTExample:
    """``answer`` after everything that came before it; only the answer carries loss."""
    return SFTExample(
        problem_id=answer.problem_id,
        rollout_ids=rollout_ids,
        segments=(Segment(token_ids=tuple(prompt_ids), src="prompt", loss=False), *answer.segments),
        source=source,
    )
