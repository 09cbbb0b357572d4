"""A judge that learns from gold judgements, then from its own: loops over the verbs, and their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt

from reasonrun.curate.judgements import Balance, Learnt, PairRule, Strategy, gold_judgements, judgement_pairs, share_out
from reasonrun.grading.judgement import HIGHEST, LOWEST
from reasonrun.judging import judging_findings
from reasonrun.records import Checkpoint, Message, Problem, Rollout, Sampling
from reasonrun.settings import Effect, Settings, setting
from reasonrun.training import SFTSettings

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import ExampleSet, GradedSet, ProblemSet

FEEDBACK_STYLES = ("plain",)  # those in which a judge explains itself before it scores


class SeedSettings(Settings):
    """How the first judge is trained on gold judgements."""

    num_steps: int = setting(0, Effect.SEMANTIC, "Optimizer steps, instead of epochs; 0 is off.", ge=0)
    epochs: int = setting(1, Effect.SEMANTIC, "Passes over the gold judgements; 0 starts from the base model.", ge=0)
    num_items: int = setting(
        0,
        Effect.SEMANTIC,
        "Training items whose gold judgements are learnt, which the rounds then do not see; 0 is all, seen or not.",
        ge=0,
    )
    styles: tuple[str, ...] = setting(
        ("plain",), Effect.SEMANTIC, "Prompt styles to learn; score_only learns the score alone.", min_length=1
    )
    merge_role: str = setting(
        "", Effect.SEMANTIC, "Role of a model to merge with the trained judge, such as a pairwise one; empty for none."
    )
    merge_weight: float = setting(0.5, Effect.SEMANTIC, "Share of the merged model's weights.", gt=0, lt=1)

    @property
    def trains(self) -> bool:
        return bool(self.num_steps or self.epochs)

    def roles(self, name: str) -> Mapping[str, str]:
        """Roles of the models that these settings, called ``name``, ask for."""
        return {self.merge_role: f"{name}.merge_role"} if self.merge_role else {}

    def needs(self) -> Mapping[str, str]:
        """Styles and capabilities of the task that these settings ask for, each with the setting that does."""
        gold = {"solution": "epochs"} if set(self.styles) & set(FEEDBACK_STYLES) else {}
        return dict.fromkeys(self.styles, "styles") | gold if self.trains else {}


class JudgeSettings(Settings):
    """How a judge judges the items that it learns from."""

    style: str = setting("plain", Effect.SEMANTIC, "Prompt style: plain explains, score_only does not.", min_length=1)
    num_samples: int = setting(8, Effect.SEMANTIC, "Judgements of each item.", ge=2)
    temperature: float = setting(1.0, Effect.SEMANTIC, "Sampling temperature.", gt=0)
    top_p: float = setting(1.0, Effect.SEMANTIC, "Nucleus filter; 1 is off.", gt=0, le=1)

    def needs(self) -> Mapping[str, str]:
        """As above."""
        return {self.style: "style"}


class PairSettings(Settings):
    """Which judgements of an item become a pair."""

    strategy: Strategy = setting(
        "correct",
        Effect.SEMANTIC,
        "What wins: correct, the gold score; majority, the most frequent score; meta_judge, the higher rating by the judge"
        " itself.",
    )
    margin: int = setting(
        2, Effect.SEMANTIC, "Least distance of the loser, in points of the scale.", ge=1, le=HIGHEST - LOWEST
    )
    per_item: int = setting(2, Effect.SEMANTIC, "Most pairs of an item; 0 is no cap.", ge=0)
    num_pairs: tuple[NonNegativeInt, ...] = setting(
        (0,),
        Effect.SEMANTIC,
        "Most pairs of each round; 0 is all; the last number is that of all further.",
        min_length=1,
    )
    balance: Balance = setting(
        "winning",
        Effect.SEMANTIC,
        "Take pairs in turns by the score that wins (winning), or by both scores, as often a over b as b over a (both).",
    )
    length_match: bool = setting(True, Effect.SEMANTIC, "Take pairs of nearly equal length first.")
    num_ratings: int = setting(1, Effect.SEMANTIC, "meta_judge: ratings of each judgement.", ge=1)
    rating_temperature: float = setting(0.0, Effect.SEMANTIC, "meta_judge: temperature of ratings; 0 is greedy.", ge=0)

    def needs(self) -> Mapping[str, str]:
        """As above."""
        return {"question_about": "strategy"} if self.strategy == "meta_judge" else {}


def judgements(lab: Lab, judge: Checkpoint, items: ProblemSet, config: JudgeSettings, max_new_tokens: int) -> GradedSet:
    """Several judgements of each item; the steps are named ``judge`` and ``read``."""
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=max_new_tokens)
    said = lab.sample(judge, items, style=config.style, n=config.num_samples, sampling=sampling, name="judge")
    return lab.grade(said, name="read")


def paired(
    lab: Lab,
    judge: Checkpoint,
    judged: GradedSet,
    config: PairSettings,
    number: int,
    learnt: Learnt,
    max_new_tokens: int,
) -> ExampleSet:
    """What is learnt of judgements in round ``number``; the steps are named ``rate`` (for ``meta_judge``) and ``pairs``."""
    rated = None
    if config.strategy == "meta_judge":
        sampling = Sampling(temperature=config.rating_temperature, max_new_tokens=max_new_tokens)
        rated = rating(lab, judge, judged, config.num_ratings, sampling)
    rule = PairRule(
        strategy=config.strategy,
        margin=config.margin,
        cap=config.per_item,
        length_match=config.length_match,
        seed=lab.seed,
    )
    num_pairs, shares = in_round(config.num_pairs, number), None
    # the handful of items of a rehearsal has no counterparts
    if (num_pairs or config.balance != "none") and not lab.is_rehearsal:
        shares = share_out(judged, rated, rule, gold=lab.task.gold_score, num_pairs=num_pairs, balance=config.balance)
    return lab.curate(
        judgement_pairs,
        *(judged, *([rated] if rated is not None else [])),
        name="pairs",
        learnt=learnt,
        shares=shares,
        undrawn="not_drawn" if num_pairs else "no_counterpart_of_its_scores",
        strategy=rule.strategy,
        margin=rule.margin,
        cap=rule.cap,
        length_match=rule.length_match,
        seed=rule.seed,
    )


def rating(lab: Lab, judge: Checkpoint, judged: GradedSet, n: int, sampling: Sampling) -> GradedSet:
    """What the judge makes of its own judgements, those that could be read and about which it can be asked."""
    read = {
        row.rollout.id for item in judged.problems for row in judged.of_problem(item.id) if row.score.answer is not None
    }

    def ask(item: Problem, judgement: Rollout) -> tuple[Message, ...]:
        return lab.task.question_about(item, judgement.text)

    asked = judged.rollouts.where(lambda row: row.id in read)
    asked = lab.fitting(judge, asked, prompt=ask, max_new_tokens=sampling.max_new_tokens)
    return lab.judge(judge, asked, prompt=ask, sampling=sampling, n=n, name="rate")


def in_round(numbers: Sequence[int], number: int) -> int:
    """What ``numbers`` says of round ``number`` (from 1); the last one is that of all further rounds."""
    return numbers[min(number, len(numbers)) - 1]


def items_of(lab: Lab, num_gold: int, num_items: Sequence[int], rounds: int) -> tuple[ProblemSet, list[ProblemSet]]:
    """The items whose gold judgements are learnt (``num_gold``, 0 is all), and those of each round, at random.

    No item is in two rounds, nor in a round and among a chosen number of gold ones.
    """
    items = lab.problems("train")
    sizes = [in_round(num_items, number) for number in range(1, rounds + 1)]
    if not num_gold:
        return items, items.parts(sizes, lab.rng("items"))
    gold, *drawn = items.parts([num_gold, *sizes], lab.rng("items"))
    return gold, drawn


def seed_judge(lab: Lab, items: ProblemSet, config: SeedSettings, sft: SFTSettings) -> Checkpoint:
    """The base, trained on the gold judgements of ``items`` and merged with another judge, as asked for; the steps are in
    ``seed``."""
    judge = lab.base
    with lab.scope("seed"):
        if config.trains:
            how = {"styles": list(config.styles), "with_feedback": list(FEEDBACK_STYLES)}
            rows = lab.curate(gold_judgements, items, name="gold", **how)
            judge = lab.train(
                "sft",
                rows,
                start=judge,
                settings=sft,
                num_steps=config.num_steps,
                num_epochs=0 if config.num_steps else config.epochs,
            )
        if config.merge_role:
            weight = config.merge_weight
            judge = lab.merge([judge, lab.model(config.merge_role)], [1 - weight, weight])
    return judge


def collapse_findings(lab: Lab) -> list[str]:
    """What a person should know of how the judges of a run changed on dev, from the first one to the last."""
    seen = [e.metrics.get("judging", {}) for e in lab.evaluations if e.split == "dev"]
    parts = [part for part in ("greedy", "sampled") if seen and part in seen[0] and part in seen[-1]]
    return [f"{part}: {line}" for part in parts for line in judging_findings(seen[0][part], seen[-1][part])]
