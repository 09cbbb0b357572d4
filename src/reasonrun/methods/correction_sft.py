"""Self-correction by imitation: STaR on correction traces, and Pair-SFT, the baselines of SCoRe (arXiv 2409.12917)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from reasonrun.contracts import Method, Probe
from reasonrun.curate.attempts import correction_findings, paired_rows, require_room, trace_rows
from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import SFTSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import ExampleSet


class CorrectionSFT(Method):
    """Fine-tune the base on right second attempts, given the first ones.

    ``star_traces``: sample two attempts with the current model, keep the second ones that are right after a wrong first,
    fine-tune the base, repeat (STaR, Zelikman et al. 2022, on corrections). ``pair_sft``: one round, in which a right
    sample of a problem is imitated as if it corrected a wrong one (Welleck et al. 2023, arXiv 2211.00053). ``keep_right``
    adds right attempts after right ones: the "plus" rows of SCoRe's Table 2.

    Departures from what the SCoRe paper says of them, and what it leaves open: the loss covers the second attempt's tokens
    alone; Pair-SFT takes at most 4 pairs of a kind and problem; numbers of samples and steps are this project's.
    """

    evaluation_turns = 2
    requires: ClassVar[frozenset[str]] = frozenset({"correction"})

    class Settings(SettingsBase):
        """Recipe fields of ``method: correction_sft``."""

        name: Literal["correction_sft"] = "correction_sft"
        arm: Literal["star_traces", "pair_sft"] = setting("star_traces", Effect.SEMANTIC, "Where the pairs come from.")
        keep_right: bool = setting(True, Effect.SEMANTIC, "Imitate right after right, too.")
        rounds: int = setting(3, Effect.HORIZON, "Rounds of star_traces; pair_sft has one.", ge=1)
        num_steps: int = setting(500, Effect.SEMANTIC, "Optimizer steps of a round.", ge=1)
        num_samples: int = setting(
            4, Effect.SEMANTIC, "First attempts per problem, each with one second attempt.", ge=1
        )
        style: str = setting("plain", Effect.SEMANTIC, "Prompt style of first attempts.", min_length=1)
        max_new_tokens: int = setting(1024, Effect.SEMANTIC, "Longest attempt in tokens.", ge=1)
        sft: SFTSettings = setting(
            SFTSettings(lr=5e-6, batch_size=64, max_length=4096), Effect.SEMANTIC, "Fine-tuning of every round."
        )

    def needs(self) -> Mapping[str, str]:
        return {self.config.style: "style"}

    def preflight(self) -> Probe:
        return Probe(style=self.config.style, sampling=self.sampling, needs=frozenset({"right"}))

    def before(self, lab: Lab) -> None:
        config = self.config
        limit = config.sft.max_length
        require_room(lab, 2, style=config.style, max_new_tokens=config.max_new_tokens, limit=limit)

    def run(self, lab: Lab) -> Checkpoint:
        policy = lab.base
        for _ in lab.rounds(self.config.rounds if self.config.arm == "star_traces" else 1):
            lab.evaluate(policy)
            rows = self.select(lab, policy)
            policy = lab.train("sft", rows, start=lab.base, settings=self.config.sft, num_steps=self.config.num_steps)
        return policy

    def select(self, lab: Lab, policy: Checkpoint) -> ExampleSet:
        """What is learnt of a policy's own first attempts, and of second ones after them."""
        config, said = self.config, lab.task.correction()
        first = lab.sample(
            policy, lab.problems("train"), n=config.num_samples, style=config.style, sampling=self.sampling
        )
        graded = lab.grade(first)
        if config.arm == "pair_sft":
            return lab.curate(paired_rows, graded, said=said, keep_right=config.keep_right, seed=lab.seed)
        second = lab.sample(policy, first, n=1, turn=said, sampling=self.sampling, name="sample-turn-2")
        return lab.curate(trace_rows, graded, lab.grade(second, name="grade-turn-2"), keep_right=config.keep_right)

    def findings(self, lab: Lab) -> list[str]:
        return correction_findings(lab)

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_new_tokens=self.config.max_new_tokens)
