"""STaR: bootstrapping reasoning with reasoning (Zelikman et al. 2022, arXiv 2203.14465)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from reasonrun.contracts import Method, Probe
from reasonrun.curate.filtering import star_rows, unfiltered_rows
from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import SFTSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import ExampleSet, GradedSet


class STaR(Method):
    """Sample a solution, keep it if its answer is right, retry the rest with the answer as a hint, fine-tune, repeat.

    For round n with model M_{n-1} (M_0 = base M):

    1. D_n: solutions of M_{n-1} whose answer is right.
    2. R_n: solutions of the problems that failed, sampled with the right answer as a hint, kept if they reach it and
       stored against the prompt without the hint ("rationalization").
    3. M_n: M, not M_{n-1}, fine-tuned on D_n and R_n for ``steps_start * steps_growth ** (n - 1)`` steps.

    The settings' defaults are the paper's. Siblings are settings of this loop: online RFT (``init_from: previous``,
    ``carry_optimizer``), iterative RFT (``init_from: previous``), ReST-EM (many samples, a cap per problem, resets);
    see the recipes ``rft_*`` and ``rest_em_*``.

    Departures from the paper and its code:

    - decoding is exactly greedy; the released code samples at temperature 0.01, top_p 0.9.
    - the hint is the final answer; the released code shows the whole reference solution on GSM8K.
    - the loss covers the whole completion by token offsets; the released code starts at the last colon.
    - sequences are not packed: a batch is ``sft.batch_size`` examples, the paper packs 8 sequences of 1024 tokens.
    - no partial batch is dropped, and Adam starts fresh unless ``carry_optimizer`` is set.
    - dev is carved from train, and the test split is used once, at the end.
    - ``few_shot`` demonstrations are chat turns.

    It never starts when the base solves nothing: the first empty training set ends the run with a finding.
    """

    paper = "Zelikman et al. 2022, arXiv 2203.14465"
    from_paper = (
        "rounds style later_style num_samples rationalize keep train_style init_from data_window steps_start"
        " steps_growth sft.lr sft.schedule sft.warmup_steps"
    )
    requires: ClassVar[frozenset[str]] = frozenset({"plain", "few_shot", "hinted"})

    class Settings(SettingsBase):
        """Recipe fields of ``method: star``."""

        name: Literal["star"] = "star"
        rounds: int = setting(16, Effect.HORIZON, "Self-training rounds; the paper's arithmetic runs use 16.", ge=1)
        style: Literal["plain", "few_shot"] = setting("few_shot", Effect.SEMANTIC, "Prompt of the first round.")
        later_style: Literal["plain", "few_shot"] = setting(
            "few_shot", Effect.SEMANTIC, "Prompt of the later rounds; the paper keeps the demonstrations."
        )
        num_samples: int = setting(1, Effect.SEMANTIC, "Solutions per problem and round.", ge=1)
        temperature: float = setting(0.0, Effect.SEMANTIC, "Sampling temperature; 0 is greedy.", ge=0)
        top_p: float = setting(1.0, Effect.SEMANTIC, "Nucleus filter; 1 is off.", gt=0, le=1)
        max_new_tokens: int = setting(256, Effect.SEMANTIC, "Longest solution in tokens.", ge=1)
        rationalize: bool = setting(True, Effect.SEMANTIC, "Retry failed problems with the answer as a hint.")
        keep: Literal["correct", "any"] = setting(
            "correct", Effect.SEMANTIC, "Which samples are learnt; any is the control with as many unfiltered ones."
        )
        dedupe: bool = setting(False, Effect.SEMANTIC, "Learn equal solutions of one problem once.")
        cap_per_problem: int = setting(
            0, Effect.SEMANTIC, "Most examples of one problem in a round; 0 is no cap.", ge=0
        )
        train_style: Literal["plain", "few_shot"] = setting(
            "plain", Effect.SEMANTIC, "Prompt of the training sequences; few_shot is the paper's few_shot_train."
        )
        init_from: Literal["base", "previous"] = setting("base", Effect.SEMANTIC, "Weights that each round trains.")
        carry_optimizer: bool = setting(False, Effect.SEMANTIC, "Go on with the previous round's Adam state.")
        data_window: Literal["last", "all"] = setting("last", Effect.SEMANTIC, "Train on this round's rows or on all.")
        steps_start: int = setting(40, Effect.SEMANTIC, "Optimizer steps of the first round.", ge=1)
        steps_growth: float = setting(1.2, Effect.SEMANTIC, "Factor on the steps from round to round.", ge=1)
        steps_freeze_at: int = setting(
            0, Effect.SEMANTIC, "Round after which the steps stop growing; 0 is never.", ge=0
        )
        sft: SFTSettings = setting(
            SFTSettings(lr=1e-6, warmup_steps=100, batch_size=8), Effect.SEMANTIC, "Fine-tuning of every round."
        )

        def steps(self, number: int) -> int:
            """Optimizer steps of round ``number`` (from 1): floor(start * growth ** (number - 1))."""
            grown = min(number, self.steps_freeze_at) if self.steps_freeze_at else number
            return int(self.steps_start * self.steps_growth ** (grown - 1) + 1e-9)

    def before(self, lab: Lab) -> None:
        config = self.config
        styles = {config.style, config.later_style} | (
            {"hinted"} if config.rationalize and config.keep == "correct" else set()
        )
        lab.require_room(lab.problems("train"), styles=sorted(styles), max_new_tokens=config.max_new_tokens)

    def run(self, lab: Lab) -> Checkpoint:
        config = self.config
        problems = lab.problems("train")
        policy = lab.base
        window: list[ExampleSet] = []
        for number in lab.rounds(config.rounds):
            lab.evaluate(policy)
            style = config.style if number == 1 else config.later_style
            tried = lab.grade(lab.sample(policy, problems, style=style, n=config.num_samples, sampling=self.sampling))
            rows = self.select(lab, policy, tried)
            window = [*window, rows] if config.data_window == "all" else [rows]
            policy = lab.train(
                "sft",
                window,
                start=lab.base if config.init_from == "base" else policy,
                settings=config.sft,
                num_steps=config.steps(number),
                carry_optimizer=config.carry_optimizer and number > 1,
                keep_optimizer=config.carry_optimizer,
            )
        return policy

    def select(self, lab: Lab, policy: Checkpoint, tried: GradedSet) -> ExampleSet:
        """D_n and R_n, or the unfiltered control of the same size."""
        config = self.config
        if config.keep == "any":
            return lab.curate(unfiltered_rows, tried, style=config.train_style, share=tried.accuracy, seed=lab.seed)
        failed = tried.unsolved() if config.rationalize else tried.no_problems()
        hinted = lab.grade(
            lab.sample(policy, failed, style="hinted", n=1, sampling=self.sampling, name="sample-hinted"),
            name="grade-hinted",
        )
        return lab.curate(
            star_rows,
            tried,
            hinted,
            style=config.train_style,
            dedupe=config.dedupe,
            cap=config.cap_per_problem,
            hint_markers=lab.task.hint_markers,
        )

    def preflight(self) -> Probe:
        return Probe(style=self.config.style, sampling=self.sampling)

    @property
    def sampling(self) -> Sampling:
        config = self.config
        return Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens)
