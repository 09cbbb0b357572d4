"""Self-rationalizing judge: learning to judge from one's own better rationales (Trivedi et al. 2024, arXiv 2410.05495)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from reasonrun.contracts import Method, Probe
from reasonrun.curate import self_judging
from reasonrun.curate.self_judging import JudgeSettings, PairSettings, SeedSettings
from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import PreferenceSettings, SFTSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab

_SFT = SFTSettings(lr=1e-5, schedule="cosine", warmup_ratio=0.1, batch_size=32, max_length=4096)
_DPO = PreferenceSettings(beta=0.1, lr=5e-7, batch_size=64, max_length=4096)


class SelfRationalize(Method):
    """Train a judge on gold judgements, then have it prefer its own judgements that score right to those that do not.

    1. J_0: the base fine-tuned on gold rationales with their scores, merged with another judge if asked for.
    2. Round t: items S_t of the training set, no item in two rounds; several judgements of each by J_{t-1}.
    3. Pairs of judgements of one item (``pairs.strategy``, ``pairs.margin``).
    4. J_t: DPO from J_{t-1} with J_{t-1} as the reference.

    Controls: ``learn: chosen``, not in the paper, fine-tunes on the winners of the pairs; style score_only has no rationale.

    Departures from the paper, whose code is not published, and what it leaves open:

    - DPO's beta, rate and batch, judgements and pairs per item, items for J_0 alone (``seed_judge.num_items``) are our choice.
    - the margin is the loser's distance from the gold score; for a meta-judge, that of the two ratings.
    - a judgement takes part in one pair, those of like length first, and ``pairs.balance`` draws them evenly; a meta-judge
      rates greedily; what cannot be read is left out and counted, never sampled again.
    """

    paper = "Trivedi et al. 2024, arXiv 2410.05495"
    from_paper = "learn rounds num_items"
    requires: ClassVar[frozenset[str]] = frozenset({"gold_score"})
    trains = ("sft", "preference")

    class Settings(SettingsBase):
        """Recipe fields of ``method: self_rationalize``."""

        name: Literal["self_rationalize"] = "self_rationalize"
        learn: Literal["pairs", "chosen"] = setting("pairs", Effect.SEMANTIC, "DPO on pairs, or SFT on their winners.")
        rounds: int = setting(2, Effect.HORIZON, "Rounds after the judge of gold judgements; 0 is that judge.", ge=0)
        num_items: tuple[PositiveInt, ...] = setting((5000, 500), Effect.SEMANTIC, "Items of each round.", min_length=1)
        max_new_tokens: int = setting(1024, Effect.SEMANTIC, "Longest judgement in tokens.", ge=1)
        seed_judge: SeedSettings = setting(SeedSettings(), Effect.SEMANTIC, "Training on gold judgements.")
        judge: JudgeSettings = setting(JudgeSettings(), Effect.SEMANTIC, "Sampling of judgements.")
        pairs: PairSettings = setting(PairSettings(), Effect.SEMANTIC, "Choice of pairs.")
        epochs: int = setting(1, Effect.SEMANTIC, "Passes over the examples of a round.", ge=1)
        num_steps: int = setting(0, Effect.SEMANTIC, "Optimizer steps of a round, instead of epochs; 0 is off.", ge=0)
        sft: SFTSettings = setting(_SFT, Effect.SEMANTIC, "Training on gold judgements.")
        dpo: PreferenceSettings = setting(_DPO, Effect.SEMANTIC, "Training on pairs.")
        rft: SFTSettings = setting(_SFT, Effect.SEMANTIC, "Training on winners.")

    def needs(self) -> Mapping[str, str]:
        parts = {part: getattr(self.config, part).needs() for part in ("seed_judge", "judge", "pairs")}
        return {need: f"{part}.{key}" for part, needs in parts.items() for need, key in needs.items()}

    def roles(self) -> Mapping[str, str]:
        return dict(self.config.seed_judge.roles("seed_judge"))

    def preflight(self) -> Probe | None:
        """A judge that is first taught need not know how; else it must be right now and then, and wrong."""
        config = self.config
        sampling = Sampling(temperature=config.judge.temperature, max_new_tokens=config.max_new_tokens)
        probe = Probe(style=config.judge.style, sampling=sampling, needs=frozenset({"right", "wrong"}))
        return None if config.seed_judge.trains or not config.rounds else probe

    def run(self, lab: Lab) -> Checkpoint:
        config, is_dpo = self.config, self.config.learn == "pairs"
        gold, items = self_judging.items_of(lab, config.seed_judge.num_items, config.num_items, config.rounds)
        judge = self_judging.seed_judge(lab, gold, config.seed_judge, config.sft)
        lab.nominate("seed_judge", judge)
        for number in lab.rounds(config.rounds):
            lab.evaluate(judge)
            judged = self_judging.judgements(lab, judge, items[number - 1], config.judge, config.max_new_tokens)
            rows = self_judging.paired(lab, judge, judged, config.pairs, number, config.learn, config.max_new_tokens)
            judge = lab.train(
                "preference" if is_dpo else "sft",
                rows,
                start=judge,
                reference=judge if is_dpo else None,
                settings=config.dpo if is_dpo else config.rft,
                num_steps=config.num_steps,
                num_epochs=0 if config.num_steps else config.epochs,
            )
        return judge

    def findings(self, lab: Lab) -> list[str]:
        return self_judging.collapse_findings(lab)
