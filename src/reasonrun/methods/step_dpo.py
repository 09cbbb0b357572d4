"""Step-DPO: step-wise preference optimisation (Lai et al. 2024, arXiv 2406.18629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from reasonrun.contracts import Method, Probe
from reasonrun.curate.group import Curation
from reasonrun.curate.judging import ask_teacher
from reasonrun.curate.locating import LocateSettings, locate
from reasonrun.curate.pairs import Form, error_pairs
from reasonrun.curate.rectifying import RectifySettings, rectify
from reasonrun.curate.taught import taught_pairs
from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import PreferenceSettings, SFTSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import ExampleSet, ProblemSet

_FORMS: dict[str, Form] = {
    "step_dpo": "step",
    "step_dpo_teacher": "teacher",
    "full_dpo": "response",
    "sft_chosen_step": "sft",
}


class CollectSettings(SettingsBase):
    """How solutions are collected, of which the wrong ones are used."""

    num_samples: int = setting(2, Effect.SEMANTIC, "Solutions per problem.", ge=1)
    temperature: float = setting(0.8, Effect.SEMANTIC, "Sampling temperature.", ge=0)
    top_p: float = setting(0.95, Effect.SEMANTIC, "Nucleus filter; 1 is off.", gt=0, le=1)


class StepDPO(Method):
    """Find the first wrong step of wrong solutions, let the model try again from there, learn to prefer the new step.

    1. Collect: sample solutions, keep those with a wrong answer.
    2. Localize: the first wrong step k of each; the prefix ends with the label of step k.
    3. Rectify: sample continuations of the prefix; the first step of one that reaches the right answer wins against
       step k.
    4. Train: DPO on the two steps after the shared prefix, against the model itself as the reference.

    One round as published; more rounds collect with the trained model. ``arm`` chooses what is made of the same (error,
    right continuation) rows: ``step_dpo``; ``full_dpo``, whole solutions instead of steps; ``step_dpo_teacher``, the
    step of the task's own solution or of a teacher model wins; ``sft_chosen_step``, the winning step is imitated. All
    arms take the same number of optimizer steps with ``num_steps``.

    Departures from the paper and its code:

    - step k is found by the model's own continuations (``mc_rollout``) unless ``localize.kind`` says otherwise; the paper
      asks GPT-4o, which sees a correct solution (``llm_with_ref``), and takes a neutral step for a wrong one.
    - pairs of one wrong step after one prefix are capped at 4, equal ones are taken once; the paper has no cap.
    - a pair needs two steps that are both the last of their solutions, or neither: else it would teach length.
    - prompts are never cut from the left; pairs longer than ``dpo.max_length`` are left out and counted.
    - the winning step is unchecked by default, as in the released code; ``rectify.check`` compares its success with that of
      the wrong step, or asks the task's program. The paper's text has people and GPT-4 check it.
    - beta is the paper's 0.4; the released 7B script has 0.5.

    Wrong solutions without a right continuation give no pair.
    """

    paper = "Lai et al. 2024, arXiv 2406.18629"
    from_paper = (
        "arm rounds style reference epochs dpo.loss dpo.beta dpo.lr dpo.schedule dpo.warmup_ratio dpo.batch_size"
    )
    requires: ClassVar[frozenset[str]] = frozenset()
    trains = ("preference",)

    class Settings(SettingsBase):
        """Recipe fields of ``method: step_dpo``."""

        name: Literal["step_dpo"] = "step_dpo"
        arm: Literal["step_dpo", "full_dpo", "step_dpo_teacher", "sft_chosen_step"] = setting(
            "step_dpo", Effect.SEMANTIC, "What is learnt of the errors; the others are comparisons and a control."
        )
        teacher: str = setting(
            "task", Effect.SEMANTIC, "step_dpo_teacher: who writes the winning step, the task or the model of a role."
        )
        rounds: int = setting(1, Effect.HORIZON, "Rounds of collecting and training; the paper has one.", ge=1)
        style: str = setting("steps", Effect.SEMANTIC, "Prompt style of the solutions.", min_length=1)
        max_new_tokens: int = setting(
            2048, Effect.SEMANTIC, "Longest solution, and longest continuation, in tokens.", ge=1
        )
        collect: CollectSettings = setting(CollectSettings(), Effect.SEMANTIC, "Sampling of solutions.")
        localize: LocateSettings = setting(LocateSettings(), Effect.SEMANTIC, "Search for the first wrong step.")
        rectify: RectifySettings = setting(RectifySettings(), Effect.SEMANTIC, "Sampling of right steps.")
        reference: Literal["start", "base"] = setting(
            "start", Effect.SEMANTIC, "Frozen model of the loss: the round's own start, or the base model."
        )
        epochs: int = setting(8, Effect.SEMANTIC, "Passes over the examples; the paper: 8 for 7B, 4 above 30B.", ge=1)
        num_steps: int = setting(0, Effect.SEMANTIC, "Optimizer steps of a round, instead of epochs; 0 is off.", ge=0)
        held_out: bool = setting(
            False,
            Effect.SEMANTIC,
            "Measure reward margin and pair accuracy on pairs of steps (in every arm) of the dev problems.",
        )
        dpo: PreferenceSettings = setting(
            PreferenceSettings(beta=0.4, lr=5e-7, schedule="cosine", warmup_ratio=0.1, batch_size=128),
            Effect.SEMANTIC,
            "Training on pairs.",
        )
        sft: SFTSettings = setting(
            SFTSettings(lr=5e-6, schedule="linear", warmup_ratio=0.03, batch_size=128),
            Effect.SEMANTIC,
            "Training of the arm sft_chosen_step.",
        )

    def needs(self) -> Mapping[str, str]:
        config = self.config
        needs = {config.style: "style"}
        for part in ("localize", "rectify"):
            needs |= {capability: f"{part}.{key}" for capability, key in getattr(config, part).needs().items()}
        of_task = self.teaches and config.teacher == "task"
        return {**needs, **({"solution": "teacher", "first_error": "teacher"} if of_task else {})}

    def roles(self) -> Mapping[str, str]:
        localize, teacher = self.config.localize, self.config.teacher
        judges = {localize.judge: "localize.judge"} if localize.asks_judge else {}
        return {**judges, teacher: "teacher"} if self.teaches and teacher != "task" else judges

    @property
    def teaches(self) -> bool:
        return bool(self.config.arm == "step_dpo_teacher")

    def run(self, lab: Lab) -> Checkpoint:
        config = self.config
        policy = lab.base
        held_out = None
        if config.held_out:
            with lab.scope("held-out"):
                held_out = lab.logprobs(lab.base, self.examples(lab, lab.base, lab.problems("dev"), "step"))
        settings = config.sft if config.arm == "sft_chosen_step" else config.dpo
        for _ in lab.rounds(config.rounds):
            lab.evaluate(policy)
            rows = self.examples(lab, policy, lab.problems("train"), _FORMS[config.arm])
            policy = lab.train(
                "sft" if config.arm == "sft_chosen_step" else "preference",
                rows,
                start=policy,
                reference=None if config.arm == "sft_chosen_step" else self.reference(lab, policy),
                settings=settings,
                num_steps=config.num_steps,
                num_epochs=0 if config.num_steps else config.epochs,
            )
            if held_out is not None:
                lab.evaluate_pairs(policy, held_out, beta=config.dpo.beta)
        return policy

    def preflight(self) -> Probe:
        """It learns from wrong answers to problems that the model can solve."""
        sampling = self.sampling(self.config.collect)
        return Probe(style=self.config.style, sampling=sampling, needs=frozenset({"right", "wrong"}))

    def reference(self, lab: Lab, policy: Checkpoint) -> Checkpoint:
        """The frozen model of the round's loss."""
        return lab.base if self.config.reference == "base" else policy

    def examples(self, lab: Lab, policy: Checkpoint, problems: ProblemSet, form: Form) -> ExampleSet:
        """Collect, localize, rectify: what one round learns from."""
        config = self.config
        collect, how = config.collect, {"steps": config.localize.steps}
        solutions = lab.sample(
            policy, problems, style=config.style, n=collect.num_samples, sampling=self.sampling(collect), name="collect"
        )
        tried = lab.grade(solutions, name="grade-collected")
        with lab.scope("localize"):
            prefixes = locate(lab, policy, tried, config.localize, config.max_new_tokens)
        rectified = rectify(lab, policy, tried, prefixes, config.rectify, self.sampling(config.rectify), **how)
        curation: Curation = error_pairs
        if form == "teacher" and config.teacher != "task":
            curation = taught_pairs
            taught = ask_teacher(lab, config.teacher, prefixes, rectified[0], self.sampling(config.rectify))
            rectified.insert(1, taught)
        return lab.curate(
            curation,
            tried,
            *rectified,
            name=f"pairs-{form}",
            cap=config.rectify.pairs_per_error,
            check=config.rectify.check,
            min_gain=config.rectify.min_gain,
            form=form,
            **how,
        )

    def sampling(self, settings: CollectSettings | RectifySettings) -> Sampling:
        return Sampling(
            temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=self.config.max_new_tokens
        )
