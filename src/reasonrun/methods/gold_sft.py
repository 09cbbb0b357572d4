"""Fine-tuning on the references: the baseline that self-training has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from reasonrun.contracts import Method
from reasonrun.curate.filtering import gold_rows
from reasonrun.records import Checkpoint
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import SFTSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab


class GoldSFT(Method):
    """Direct-answer fine-tuning (the baseline of Zelikman et al. 2022, Table 1): question in, gold answer out.

    The same problems as the self-training arms see, no rationale, the loss on the answer alone. ``rounds`` times
    ``num_steps`` optimizer steps, each round from the previous weights, so that budgets and dev points line up.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"plain", "direct"})

    class Settings(SettingsBase):
        """Recipe fields of ``method: gold_sft``."""

        name: Literal["gold_sft"] = "gold_sft"
        rounds: int = setting(1, Effect.HORIZON, "Training steps in a row, each followed by an evaluation.", ge=1)
        num_steps: int = setting(40, Effect.SEMANTIC, "Optimizer steps of a round.", ge=1)
        max_new_tokens: int = setting(256, Effect.SEMANTIC, "Longest completion in evaluations.", ge=1)
        sft: SFTSettings = setting(
            SFTSettings(lr=1e-6, warmup_steps=100, batch_size=8), Effect.SEMANTIC, "Fine-tuning of every round."
        )

    def preflight(self) -> None:
        """Nothing: it learns from the references."""

    def run(self, lab: Lab) -> Checkpoint:
        policy = lab.base
        rows = lab.curate(gold_rows, lab.problems("train"))
        for _ in lab.rounds(self.config.rounds):
            lab.evaluate(policy)
            policy = lab.train("sft", rows, start=policy, settings=self.config.sft, num_steps=self.config.num_steps)
        return policy
