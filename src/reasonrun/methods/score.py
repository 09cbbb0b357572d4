"""SCoRe: self-correction by reinforcement learning (Kumar et al. 2024, arXiv 2409.12917, ICLR 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from reasonrun.contracts import Method, Probe
from reasonrun.correction import alarms, first_attempt_moved
from reasonrun.curate.attempts import AttemptSettings, TurnRewards, attempts, turn_rewards
from reasonrun.records import Checkpoint, Sampling
from reasonrun.samples import OnPolicy
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import PolicyGradientSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import ProblemSet, RolloutSet


class StageSettings(SettingsBase):
    """Length of one stage. Each round ends with a checkpoint that is evaluated and may be chosen."""

    rounds: int = setting(1, Effect.SEMANTIC, "Rounds; the optimizer goes on from one to the next.", ge=1)
    steps: int = setting(1500, Effect.SEMANTIC, "Optimizer steps of a round.", ge=1)


class LastStageSettings(StageSettings):
    """The same for the stage that a run ends with."""

    rounds: int = setting(1, Effect.HORIZON, "Rounds; the optimizer goes on from one to the next.", ge=1)


class FilterSettings(SettingsBase):
    """Which problems are worth rollouts: where all attempts are right, or none, a group teaches nothing."""

    num_samples: int = setting(0, Effect.SEMANTIC, "Solutions of the base per problem; 0 takes all problems.", ge=0)
    min_rate: float = setting(0.1, Effect.SEMANTIC, "Smallest share of right ones.", ge=0, le=1)
    max_rate: float = setting(0.9, Effect.SEMANTIC, "Largest share.", ge=0, le=1)


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

    def needs(self) -> Mapping[str, str]:
        return {self.config.style: "style"}

    @property
    def evaluation_turns(self) -> int:
        return int(self.config.num_attempts)

    def preflight(self) -> Probe:
        """Groups teach when right and wrong rollouts of one problem meet."""
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens)
        return Probe(style=self.config.style, sampling=sampling, needs=frozenset({"right", "variance"}))

    def run(self, lab: Lab) -> Checkpoint:
        config = self.config
        again = [lab.task.correction()] * (config.num_attempts - 1)
        lab.require_room(
            lab.problems("train"),
            style=config.style,
            turns=again,
            max_new_tokens=config.max_new_tokens,
            limit=config.rl.max_length,
        )
        problems, policy = self.problems(lab), lab.base
        for stage in self.stages():
            policy = self.reinforce(lab, stage, problems, policy)
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
        """One stage with the steps of both, in rounds as long as those of Stage II as far as they go."""
        first, second = self.config.stage1, self.config.stage2
        total = first.rounds * first.steps * (self.config.num_attempts - 1) + second.rounds * second.steps
        rounds = max(n for n in range(1, total // second.steps + 1) if total % n == 0)
        return StageSettings(rounds=rounds, steps=total // rounds)

    def problems(self, lab: Lab) -> ProblemSet:
        """The training problems, or those that the base sometimes solves."""
        problems, chosen = lab.problems("train"), self.config.filter
        if not chosen.num_samples:
            return problems
        with lab.scope("filter"):
            tried = lab.grade(self.sampled(lab, problems, chosen.num_samples, "sample"))
        return tried.with_rate(chosen.min_rate, chosen.max_rate)

    def sampled(self, lab: Lab, problems: ProblemSet, n: int, name: str) -> RolloutSet:
        """First attempts of the base."""
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens)
        return lab.sample(lab.base, problems, n=n, style=self.config.style, sampling=sampling, name=name)

    def reinforce(self, lab: Lab, stage: Stage, problems: ProblemSet, policy: Checkpoint) -> Checkpoint:
        """One stage; its rounds are candidates, the one with the highest training reward is tested beside the last."""
        config, rounds = self.config, []
        source = self.source(lab, stage, problems)
        for number in range(1, stage.length.rounds + 1):
            carry = number > 1 and config.rl.lora is None
            no_warmup = {"warmup_steps": 0, "warmup_ratio": 0.0}
            with lab.scope(f"{stage.name}-{number:03d}"):
                lab.evaluate(policy)
                policy = lab.train(
                    "policy_gradient",
                    source,
                    start=policy,
                    reference=lab.base,
                    settings=config.rl.model_copy(update=no_warmup if carry else {}),
                    num_steps=stage.length.steps,
                    carry_optimizer=carry,
                    keep_optimizer=config.rl.lora is None,
                )
            rounds.append(policy)
        lab.nominate("by_training_reward", max(rounds, key=lambda made: lab.metrics(made)["mean_reward"]))
        return policy

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
            given=self.sampled(lab, problems, config.rl.group_size, "offline") if offline else None,
        )

    def findings(self, lab: Lab) -> list[str]:
        """Collapse, a first attempt that Stage I did not hold, answers that get worse or are cut; all on dev."""
        seen = [(e.step, e.overall) for e in lab.evaluations if e.split == "dev" and e.overall]
        if not seen:
            return []
        base, last = seen[0][1], seen[-1][1]
        held = [table for step, table in seen if step.startswith("stage2-001/") and self.config.arm != "no_stage1"]
        return [*(line for table in held for line in first_attempt_moved(base, table)), *alarms(base, last)]
