"""Reinforcement in rounds, and the problems that are worth it: loops over the verbs that several methods share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, Settings, setting
from reasonrun.training import PolicyGradientSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import OnPolicy, ProblemSet


class StageSettings(Settings):
    """Length of one stage. Each round ends with a checkpoint that is evaluated and may be chosen."""

    rounds: int = setting(1, Effect.SEMANTIC, "Rounds; the optimizer goes on from one to the next.", ge=1)
    steps: int = setting(1500, Effect.SEMANTIC, "Optimizer steps of a round.", ge=1)


class LastStageSettings(StageSettings):
    """The same for the stage that a run ends with."""

    rounds: int = setting(1, Effect.HORIZON, "Rounds; the optimizer goes on from one to the next.", ge=1)


class FilterSettings(Settings):
    """Which problems are worth rollouts: where all attempts are right, or none, a group teaches nothing."""

    num_samples: int = setting(0, Effect.SEMANTIC, "Solutions of the base per problem; 0 takes all problems.", ge=0)
    min_rate: float = setting(0.1, Effect.SEMANTIC, "Smallest share of right ones.", ge=0, le=1)
    max_rate: float = setting(0.9, Effect.SEMANTIC, "Largest share.", ge=0, le=1)


def reinforce(
    lab: Lab,
    source: OnPolicy,
    policy: Checkpoint,
    *,
    name: str,
    length: StageSettings,
    settings: PolicyGradientSettings,
) -> Checkpoint:
    """One stage in rounds ``name-001`` …: each begins with an evaluation and goes on with the weights and the optimizer of the
    one before. The round with the highest training reward is tested at the end of the run, beside the last and the best on
    dev. The reference is the base.

    Adapters are merged after every round, so there is no optimizer to go on with.
    """
    rounds: list[Checkpoint] = []
    is_full = settings.lora is None
    for number in range(1, length.rounds + 1):
        carry = number > 1 and is_full
        with lab.scope(f"{name}-{number:03d}"):
            lab.evaluate(policy)
            policy = lab.train(
                "policy_gradient",
                source,
                start=policy,
                reference=lab.base,
                settings=settings.model_copy(update={"warmup_steps": 0, "warmup_ratio": 0.0} if carry else {}),
                num_steps=length.steps,
                carry_optimizer=carry,
                keep_optimizer=is_full,
            )
        rounds.append(policy)
    lab.nominate("by_training_reward", max(rounds, key=lambda made: lab.metrics(made)["mean_reward"]))
    return policy


def worthwhile(lab: Lab, chosen: FilterSettings, *, style: str, sampling: Sampling) -> ProblemSet:
    """The training problems, or those of them that the base solves now and then."""
    problems = lab.problems("train")
    if not chosen.num_samples:
        return problems
    with lab.scope("filter"):
        tried = lab.sample(lab.base, problems, n=chosen.num_samples, style=style, sampling=sampling)
        return lab.grade(tried).with_rate(chosen.min_rate, chosen.max_rate)
