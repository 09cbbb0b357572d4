"""What a judge learns from its own judgements of items: the better ones, against the worse ones."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeVar

from reasonrun.curate.group import Group, curation, imitate
from reasonrun.errors import RecipeError
from reasonrun.grading.judgement import HIGHEST, LOWEST
from reasonrun.metrics import ROUNDING
from reasonrun.randomness import derive_seed
from reasonrun.records import Example, Graded, LeftOut, PreferenceExample, Problem, Segment, SFTExample

if TYPE_CHECKING:
    from reasonrun.samples import GradedSet

Strategy = Literal["correct", "majority", "meta_judge"]
Learnt = Literal["pairs", "chosen"]
Balance = Literal["none", "winning", "both"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRule:
    """Which two judgements of one item make a pair.

    Attributes:
        strategy: ``correct``: the winner has the gold score. ``majority``: it has the most frequent score of the item's
            judgements. ``meta_judge``: it has the higher rating.
        margin: how far the loser is at least from that score, or from the winner's rating, in points of the scale.
        cap: most pairs of one item; each judgement wins or loses in at most one of them. 0 is no cap.
        length_match: take pairs of nearly equal length first, so that length itself is not what is learnt.
        seed: of the choice among equal pairs.
    """

    strategy: Strategy
    margin: int
    cap: int
    length_match: bool
    seed: int

    def pairs(self, item_id: str, gold: float | None, judged: Sequence[Graded], rated: Sequence[Graded]) -> Found:
        """The pairs of one item, best matched first.

        Args:
            item_id: the item.
            gold: its gold score, None where there is none; only ``correct`` looks at it.
            judged: its judgements.
            rated: some of them, with a judge's rating as the score; only ``meta_judge`` looks at them.
        """
        read = [row for row in judged if row.score.answer is not None]
        if not read:
            return Found(reason="nothing_read")
        if self.strategy == "meta_judge":
            return self._choose(item_id, self._by_rating(read, rated))
        target = gold if self.strategy == "correct" else _mode(read)
        if target is None:
            return Found(reason="no_gold" if self.strategy == "correct" else "no_majority")
        winners = [row for row in read if abs(_score(row) - target) <= 0.5]
        losers = [row for row in read if abs(_score(row) - target) >= self.margin]
        return self._choose(item_id, [(winner, loser) for winner in winners for loser in losers])

    def _by_rating(self, read: Sequence[Graded], rated: Sequence[Graded]) -> list[tuple[Graded, Graded]]:
        width = HIGHEST - LOWEST
        rating = {row.rollout.id: width * row.score.value for row in rated if row.score.value is not None}
        known = [row for row in read if row.rollout.id in rating]
        # means of ratings differ by rounding from what they are
        least = self.margin - ROUNDING
        return [(a, b) for a in known for b in known if rating[a.rollout.id] - rating[b.rollout.id] >= least]

    def _choose(self, item_id: str, candidates: list[tuple[Graded, Graded]]) -> Found:
        random.Random(derive_seed("judgement_pairs", self.seed, item_id)).shuffle(candidates)
        if self.length_match:
            candidates.sort(key=lambda pair: abs(_length(pair[0]) - _length(pair[1])))
        chosen: list[tuple[Graded, Graded]] = []
        paired: set[str] = set()
        for winner, loser in candidates:
            texts = {winner.rollout.text, loser.rollout.text}
            if texts & paired or len(texts) == 1 or (self.cap and len(chosen) == self.cap):
                continue
            paired |= texts
            chosen.append((winner, loser))
        return Found(pairs=tuple(chosen), reason="" if chosen else "no_pair")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The pairs (winner, loser) of one item, or why there are none."""

    pairs: tuple[tuple[Graded, Graded], ...] = ()
    reason: str = ""


def share_out(
    judged: GradedSet,
    rated: GradedSet | None,
    rule: PairRule,
    *,
    gold: Callable[[Problem], float | None],
    num_pairs: int,
    balance: Balance,
) -> dict[str, list[int]]:
    """Which of its pairs each item gives, by their places, so that there are at most ``num_pairs`` in all.

    An item's first pair comes before any item's second one; items come in a random order.

    A judge can learn from pairs that some scores win more often than others, which has nothing to do with what it reads.
    ``winning`` takes pairs in turns by the score that wins. ``both`` takes them in turns by the two scores, and as often
    a over b as b over a, so that no score is favoured; what has no counterpart is not taken. The last turn may
    be cut short.

    Args:
        judged: judgements of items.
        rated: ratings of them, for the strategy that reads some.
        rule: which pairs there are.
        gold: the gold score of an item.
        num_pairs: how many to take; 0 takes all that ``balance`` allows.
        balance: see above.
    """
    found = {
        item.id: rule.pairs(
            item.id, gold(item), judged.of_problem(item.id), rated.of_problem(item.id) if rated else ()
        ).pairs
        for item in judged.problems
    }
    ranked = sorted(found, key=lambda item_id: derive_seed("share_out", rule.seed, item_id))
    queues: dict[tuple[int, ...], list[tuple[int, int, str]]] = defaultdict(list)
    for place, item_id in enumerate(ranked):
        for number, (winner, loser) in enumerate(found[item_id]):
            keys = {"none": (), "winning": (_score(winner),), "both": (_score(winner), _score(loser))}
            queues[keys[balance]].append((number, place, item_id))
    waiting = {key: sorted(queue) for key, queue in sorted(queues.items())}
    if balance == "both":
        waiting = {key: queue[: len(waiting.get(key[::-1], ()))] for key, queue in waiting.items()}
    shares: dict[str, list[int]] = defaultdict(list)
    for number, _, item_id in islice(_in_turns(list(waiting.values())), num_pairs or None):
        shares[item_id].append(number)
    return {item_id: sorted(numbers) for item_id, numbers in shares.items()}


def _in_turns(queues: Sequence[Sequence[T]]) -> Iterator[T]:
    """The first of every queue, then the second of every queue that has one …"""
    for turn in range(max(map(len, queues), default=0)):
        yield from (queue[turn] for queue in queues if turn < len(queue))


@curation(version=1)
def judgement_pairs(
    group: Group,
    judged: list[Graded],
    *ratings: list[Graded],
    strategy: Strategy,
    margin: int,
    cap: int,
    length_match: bool,
    seed: int,
    learnt: Learnt = "pairs",
    shares: Mapping[str, Sequence[int]] | None = None,
    undrawn: str = "not_drawn",
) -> Iterator[Example | LeftOut]:
    """Preference pairs of judgements of one item (Trivedi et al. 2024, arXiv 2410.05495), or their winners alone.

    Args:
        group: the item.
        judged: its judgements.
        ratings: judgements with a judge's rating, for the strategy ``meta_judge``. They are rows of ``judged`` again.
        strategy, margin, cap, length_match, seed: see ``PairRule``.
        learnt: ``pairs``, or ``chosen``: the winners of the same pairs, to imitate.
        shares: which of its pairs an item gives (``share_out``); None is all.
        undrawn: why a pair is not among them.
    """
    rule = PairRule(strategy=strategy, margin=margin, cap=cap, length_match=length_match, seed=seed)
    rated = [row for rows in ratings for row in rows]
    found = rule.pairs(group.problem.id, group.gold_score(), judged, rated)
    pairs = found.pairs if shares is None else [found.pairs[place] for place in shares.get(group.problem.id, ())]
    used: set[str] = set()
    for winner, loser in pairs:
        used.add(winner.rollout.id)
        if learnt == "chosen":
            prompt = Segment(token_ids=winner.rollout.prompt_ids, src="prompt", loss=False)
            yield imitate(prompt, winner, source=strategy)
            continue
        used.add(loser.rollout.id)
        yield _preference(winner, loser, strategy)
    beyond_share = {row.rollout.id for pair in found.pairs if pair not in pairs for row in pair}
    losers = {loser.rollout.id for _, loser in pairs}
    for row in judged:
        if row.rollout.id not in used:
            yield LeftOut(rollout_id=row.rollout.id, reason=_why_not(row, found, beyond_share, losers) or undrawn)


def _why_not(row: Graded, found: Found, beyond_share: set[str], losers: set[str]) -> str | None:
    if row.score.answer is None:
        return f"unread: {row.score.reason}"
    if row.rollout.id in losers:
        return "lost"
    if row.rollout.id in beyond_share:
        return None
    return found.reason or "not_paired"


def _preference(winner: Graded, loser: Graded, strategy: Strategy) -> PreferenceExample:
    opening = winner.rollout.num_given_tokens
    return PreferenceExample(
        problem_id=winner.rollout.problem_id,
        rollout_ids=(winner.rollout.id, loser.rollout.id),
        prefix_ids=winner.rollout.prompt_ids + winner.rollout.completion_ids[:opening],
        chosen_ids=winner.rollout.completion_ids[opening:],
        rejected_ids=loser.rollout.completion_ids[opening:],
        source=strategy,
    )


@curation(version=1)
def gold_judgements(
    group: Group, *, styles: Sequence[str], with_feedback: Sequence[str]
) -> Iterator[Example | LeftOut]:
    """The item's gold judgement, to imitate: its feedback and score in the styles ``with_feedback``, else its score.

    An item without a gold judgement, or without a whole gold score, is left out.
    """
    try:
        texts = [group.solution() if style in with_feedback else group.direct_answer() for style in styles]
    except RecipeError:
        yield LeftOut(rollout_id=group.problem.id, reason="no_gold_judgement")
        return
    for style, text in zip(styles, texts, strict=True):
        yield SFTExample(
            problem_id=group.problem.id,
            rollout_ids=(),
            segments=(group.prompt(style), *group.answer(style, text)),
            source="gold",
        )


def _mode(read: Sequence[Graded]) -> int | None:
    """The most frequent score; None when two are equally frequent."""
    counts = Counter(_score(row) for row in read).most_common(2)
    return None if len(counts) == 2 and counts[0][1] == counts[1][1] else counts[0][0]


def _score(row: Graded) -> int:
    return int(row.score.answer or 0)


def _length(row: Graded) -> int:
    return len(row.rollout.completion_ids)
