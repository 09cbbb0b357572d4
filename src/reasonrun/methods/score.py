"""SCoRe: self-correction by reinforcement learning (Kumar et al. 2024, arXiv 2409.12917, ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from reasonrun.contracts import Method, Probe
from reasonrun.curate.attempts import (
    AttemptSettings,
    TurnRewards,
    attempts,
    correction_findings,
    require_room,
    turn_rewards,
)
from reasonrun.curate.reinforcing import FilterSettings, LastStageSettings, StageSettings, reinforce, worthwhile
from reasonrun.on_policy import plan_problems
from reasonrun.records import Checkpoint, Sampling
from reasonrun.samples import OnPolicy
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import PolicyGradientSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import ProblemSet, RolloutSet


@dataclass(frozen=True)
class Stage:
    """One stage of reinforcement: its name, its length, what each attempt is rewarded with."""

    name: str
    length: StageSettings
    rewards: TurnRewards
    num_attempts: int


class SCoRe(Method):
    """Teach a model to correct itself without being told whether it was wrong, by two stages of two-turn REINFORCE.

    1. Stage I: second attempts are rewarded; first attempts get no reward and are held to the base by a strong KL
       (``beta2``), so that second attempts become good and different without dragging the first ones along.
    2. Stage II: both attempts are rewarded with their own verdict, second ones also with ``alpha`` times the change of the
       verdict. No reward of the second attempt reaches the first one's tokens (discount 0). The reference is the base.

    ``arm`` says what is run: ``score``; without its parts, ``no_stage1`` and ``no_bonus``, with as many steps;
    ``single_turn_rl``, first attempts alone; ``naive_two_turn_rl``, the last verdict credited to both attempts in one stage
    without a bonus. The paper's baselines that imitate are the method ``correction_sft``.

    Departures from the paper, and what it leaves open:

    - unpublished, chosen here: 4 rollouts a problem, a leave-one-out baseline over the same attempt of the same problem,
      batch_size counts rollouts of two attempts, half of the steps for each stage, no ratio clipping, gradient norm 1.
    - the reference of Stage II is the base model, as the first version of the paper says; the last one writes pi_ref.
    - Stage I runs once; the first version interleaves the stages.
    - ``rl.advantage_scale: per_attempt`` keeps alpha from multiplying the gradient of Stage II; the paper does not scale.
      Rewards and advantages of each attempt are logged, both before and after.
    - rounds of one stage carry Adam on; with ``rl.lora`` every round merges its adapters and starts fresh ones.
    """

    paper = "Kumar et al. 2024, arXiv 2409.12917, for MATH"
    from_paper = "arm num_attempts alpha beta1 beta2 rl.lr"
    requires: ClassVar[frozenset[str]] = frozenset({"correction"})
    trains = ("policy_gradient",)

    class Settings(SettingsBase):
        """Recipe fields of ``method: score``; defaults are the paper's for MATH."""

        name: Literal["score"] = "score"
        arm: Literal[
            "score",
            "no_stage1",
            "no_bonus",
            "single_turn_rl",
            "naive_two_turn_rl",
        ] = setting("score", Effect.SEMANTIC, "The method, or one of its ablations.")
        style: str = setting("plain", Effect.SEMANTIC, "Prompt style of first attempts.", min_length=1)
        max_new_tokens: int = setting(1024, Effect.SEMANTIC, "Longest attempt in tokens.", ge=1)
        num_attempts: int = setting(
            2, Effect.SEMANTIC, "Attempts in a row; Stage I comes once for each later one.", ge=2, le=8
        )
        offline_share: float = setting(
            0.0,
            Effect.SEMANTIC,
            "Share of problems with first attempts of the base, sampled once, in Stage II.",
            ge=0,
            le=1,
        )
        alpha: float = setting(10.0, Effect.SEMANTIC, "Weight of the bonus for a changed verdict, in Stage II.", ge=0)
        beta1: float = setting(0.01, Effect.SEMANTIC, "KL coefficient of attempts that are rewarded.", ge=0)
        beta2: float = setting(0.1, Effect.SEMANTIC, "KL coefficient of attempts that Stage I holds to the base.", ge=0)
        stage1: StageSettings = setting(StageSettings(), Effect.SEMANTIC, "Stage I.")
        stage2: LastStageSettings = setting(LastStageSettings(), Effect.SEMANTIC, "Stage II.")
        filter: FilterSettings = setting(FilterSettings(), Effect.SEMANTIC, "Which training problems take part.")
        rl: PolicyGradientSettings = setting(
            PolicyGradientSettings(lr=5e-6, max_length=4096), Effect.SEMANTIC, "Reinforcement learning of both stages."
        )

        @model_validator(mode="after")
        def _has_one_schedule(self) -> Self:
            if self.rl.schedule != "constant" and max(self.stage1.rounds, self.stage2.rounds) > 1:
                raise ValueError(
                    f"rl.schedule {self.rl.schedule} would begin again in every round; take one round, or constant"
                )
            return self

    def needs(self) -> Mapping[str, str]:
        return {self.config.style: "style"}

    @property
    def evaluation_turns(self) -> int:
        return int(self.config.num_attempts)

    def preflight(self) -> Probe:
        """Groups teach when right and wrong rollouts of one problem meet."""
        return Probe(style=self.config.style, sampling=self.sampling, needs=frozenset({"right", "variance"}))

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.config.max_new_tokens)

    def before(self, lab: Lab) -> None:
        config = self.config
        require_room(
            lab,
            config.num_attempts,
            style=config.style,
            max_new_tokens=config.max_new_tokens,
            limit=config.rl.max_length,
        )
        plan_problems(round(lab.problems("train").extent.worst), config.rl.problems_per_sampling, 1, 0)

    def run(self, lab: Lab) -> Checkpoint:
        config = self.config
        problems = worthwhile(lab, config.filter, style=config.style, sampling=self.sampling)
        policy = lab.base
        for stage in self.stages():
            source = self.source(lab, stage, problems)
            policy = reinforce(lab, source, policy, name=stage.name, length=stage.length, settings=config.rl)
            if stage.name.startswith("stage1"):
                lab.nominate("after_stage1", policy)
        return policy

    def stages(self) -> Iterator[Stage]:
        """What the arm runs, in order."""
        config, both = self.config, tuple(range(1, self.config.num_attempts + 1))
        arm, beta1 = config.arm, (config.beta1,)
        own = TurnRewards(rewarded=both, learnt=both, kl_coefs=beta1)
        if arm in ("score", "no_bonus"):
            for last in both[1:]:  # every attempt in its turn, all earlier ones held to the base
                held = (*[config.beta2] * (last - 1), config.beta1)
                name = "stage1" if last == 2 else f"stage1-attempt{last}"
                rewards = TurnRewards(rewarded=(last,), learnt=both[:last], kl_coefs=held)
                yield Stage(name, config.stage1, rewards, last)
            bonus = config.alpha if arm == "score" else 0.0
            yield Stage("stage2", config.stage2, own.model_copy(update={"bonus": bonus}), both[-1])
            return
        yield {
            "no_stage1": Stage("stage2", self.all_steps, own.model_copy(update={"bonus": config.alpha}), both[-1]),
            "naive_two_turn_rl": Stage("naive", self.all_steps, own.model_copy(update={"credit": "last"}), both[-1]),
            "single_turn_rl": Stage("single", self.all_steps, own, 1),
        }[arm]

    @property
    def all_steps(self) -> StageSettings:
        """One stage with the steps of both. Its rounds keep their length when Stage II gets more of them."""
        first, second = self.config.stage1, self.config.stage2
        total = first.rounds * first.steps * (self.config.num_attempts - 1) + second.rounds * second.steps
        steps = math.gcd(first.steps, second.steps)
        return StageSettings(rounds=total // steps, steps=steps)

    def source(self, lab: Lab, stage: Stage, problems: ProblemSet) -> OnPolicy:
        """Attempts and their rewards."""
        config = self.config
        offline = config.offline_share if stage.name == "stage2" else 0.0
        return OnPolicy(
            problems=problems,
            rollout=attempts,
            rollout_settings=AttemptSettings(
                num_attempts=stage.num_attempts,
                style=config.style,
                max_new_tokens=config.max_new_tokens,
                offline_share=offline,
            ),
            rewards=turn_rewards,
            rewards_settings=stage.rewards,
            given=self.offline(lab, problems) if offline else None,
        )

    def offline(self, lab: Lab, problems: ProblemSet) -> RolloutSet:
        """First attempts of the base, to go on from."""
        n, style = self.config.rl.group_size, self.config.style
        return lab.sample(lab.base, problems, n=n, style=style, sampling=self.sampling, name="offline")

    def findings(self, lab: Lab) -> list[str]:
        """Collapse, a first attempt that Stage I did not hold, answers that get worse or are cut; all on dev."""
        return correction_findings(lab, held_until="stage2-001/" if self.config.arm in ("score", "no_bonus") else "")
