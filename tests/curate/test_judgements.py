"""Which of a judge's own judgements make pairs: by hand, one item at a time and over all."""

from collections import Counter
from types import SimpleNamespace

from reasonrun.curate.group import Group
from reasonrun.curate.judgements import PairRule, gold_judgements, judgement_pairs, share_out
from reasonrun.errors import RecipeError
from reasonrun.records import Graded, LeftOut, Message, PreferenceExample, Problem, Rollout, Sampling, Score, Segment

RULE = {"strategy": "correct", "margin": 2, "cap": 0, "length_match": False, "seed": 0}
PROMPT_IDS, OPENING = (1, 2), (9,)


def item(name="p", gold="4"):
    return Problem(id=name, task="t", split="train", messages=(Message(role="user", content="judge"),), reference=gold)


def judgement(name, score, *, length=3, item_id="p", value=None, text=None, opening=()):
    """A judgement that ends with ``score`` (None: it could not be read)."""
    segments = [Segment(token_ids=tuple(range(10, 10 + length)), src="model", loss=True)]
    if opening:
        segments.insert(0, Segment(token_ids=opening, src="prompt", loss=False))
    rollout = Rollout(
        id=name,
        problem_id=item_id,
        index=0,
        kind="plain",
        messages=(),
        prompt_ids=PROMPT_IDS,
        segments=tuple(segments),
        text=f"text of {name}" if text is None else text,
        finish_reason="stop",
        policy="w",
        sampling=Sampling(),
        seed=0,
    )
    answer = None if score is None else str(score)
    reason = "unparseable" if score is None else "read"
    return Graded(
        rollout=rollout, score=Score(value=0.0 if value is None else value, answer=answer, reason=reason, grader="g")
    )


def judgements(*scores, item_id="p"):
    return [judgement(f"{item_id}{place}", score, item_id=item_id) for place, score in enumerate(scores)]


def names(found):
    return {(winner.rollout.id, loser.rollout.id) for winner, loser in found.pairs}


def gold_of(problem):
    return float(problem.reference) if problem.reference else None


def pairs(judged, gold="4", rated=(), **changed):
    return PairRule(**{**RULE, **changed}).pairs("p", gold_of(item(gold=gold)), judged, list(rated))


def test_the_winner_has_the_gold_score_and_the_loser_is_the_margin_away():
    judged = judgements(4, 2, 3, 5)
    assert names(pairs(judged)) == {("p0", "p1")}
    by_one = [names(pairs(judged, margin=1, seed=seed)) for seed in range(40)]
    assert set().union(*by_one) == {("p0", "p1"), ("p0", "p2"), ("p0", "p3")}
    assert all(len(found) == 1 for found in by_one)  # one winner, so one pair
    assert pairs(judgements(4, 3, 5)).reason == "no_pair"
    assert pairs(judged, gold="").reason == "no_gold"
    assert pairs(judgements(None, None)).reason == "nothing_read"


def test_a_mean_of_annotators_is_near_one_score_or_between_two():
    judged = judgements(3, 4, 2, 1, 5)
    # |score - 3.67|: 0.67, 0.33, 1.67, 2.67, 1.33
    assert names(pairs(judged, gold="3.6667")) == {("p1", "p3")}
    both = set().union(*(names(pairs(judged, gold="3.5", seed=seed)) for seed in range(40)))
    assert both == {("p0", "p3"), ("p1", "p3")}


def test_the_majority_wins_whatever_gold_says_and_a_tie_gives_nothing():
    judged = judgements(2, 2, 4, 3, 2)
    found = set().union(*(names(pairs(judged, strategy="majority", seed=seed)) for seed in range(40)))
    assert found == {("p0", "p2"), ("p1", "p2"), ("p4", "p2")}
    assert pairs(judgements(2, 2, 4, 4), strategy="majority").reason == "no_majority"
    assert names(pairs(judged, gold="", strategy="majority"))


def test_the_meta_judge_compares_ratings_not_scores():
    judged = judgements(4, 2, 1)
    # ratings 5, 3 and 4 on the scale of five: gaps 2, 1 and 1
    rated = [judgement(f"p{place}", None, value=value) for place, value in enumerate((1.0, 0.5, 0.75))]
    assert names(pairs(judged, rated=rated, strategy="meta_judge")) == {("p0", "p1")}
    by_one = set().union(
        *(names(pairs(judged, rated=rated, strategy="meta_judge", margin=1, seed=s)) for s in range(40))
    )
    assert by_one == {("p0", "p1"), ("p0", "p2"), ("p2", "p1")}
    assert pairs(judged, rated=rated[:1], strategy="meta_judge").reason == "no_pair"


def test_equal_judgements_with_other_ratings_are_no_pair_and_means_of_ratings_are_compared_exactly():
    twins = [judgement("p0", 3, text="same"), judgement("p1", 3, text="same")]
    rated = [judgement("p0", None, value=1.0), judgement("p1", None, value=0.0)]
    assert pairs(twins, rated=rated, strategy="meta_judge").reason == "no_pair"
    judged = judgements(4, 2)
    # ratings 5, 5, 4 and 3, 3, 2: the means 14/3 and 8/3 are two points apart, but for rounding
    means = [2.75 / 3, 1.25 / 3]
    assert 4 * means[0] - 4 * means[1] < 2
    rated = [judgement(f"p{n}", None, value=value) for n, value in enumerate(means)]
    assert names(pairs(judged, rated=rated, strategy="meta_judge")) == {("p0", "p1")}


def test_a_judgement_is_in_one_pair_at_most_and_equal_texts_are_paired_once():
    judged = judgements(4, 4, 4, 1, 2, 2)
    for seed in range(20):
        found = pairs(judged, seed=seed)
        assert len(found.pairs) == 3
        assert max(Counter(name for pair in names(found) for name in pair).values()) == 1
        assert len(pairs(judged, seed=seed, cap=2).pairs) == 2
        assert pairs(judged, seed=seed, cap=2).pairs == found.pairs[:2]
    same = [judgement(f"p{n}", 4, text="same") for n in range(3)] + judgements(None, None, None, 1, 2)[3:]
    assert len(pairs(same).pairs) == 1


def test_pairs_of_like_length_come_first():
    judged = [judgement("w", 4, length=10), judgement("a", 1, length=30), judgement("b", 1, length=11)]
    assert {names(pairs(judged, length_match=True, seed=seed)).pop() for seed in range(20)} == {("w", "b")}
    assert {names(pairs(judged, seed=seed)).pop() for seed in range(40)} == {("w", "a"), ("w", "b")}


def curated(judged, *rated, gold="4", **changed):
    group = Group(
        problem=item(gold=gold),
        prompt=lambda style: None,
        gold=lambda: None,
        gold_score=lambda: gold_of(item(gold=gold)),
    )
    return list(judgement_pairs(group, judged, *rated, **{**RULE, **changed}))


def test_every_judgement_is_used_or_left_out_with_its_reason():
    judged = judgements(4, 1, 3, None, 4)
    outcomes = curated(judged)
    (pair,) = [row for row in outcomes if isinstance(row, PreferenceExample)]
    left_out = {row.rollout_id: row.reason for row in outcomes if isinstance(row, LeftOut)}
    other = ({"p0", "p4"} - set(pair.rollout_ids)).pop()
    assert left_out == {"p2": "not_paired", "p3": "unread: unparseable", other: "not_paired"}
    assert {row.reason for row in curated(judgements(3, 3))} == {"no_pair"}


def test_a_pair_begins_after_what_was_put_in_the_judge_s_mouth():
    judged = [judgement("w", 4, opening=OPENING), judgement("l", 1, opening=OPENING, length=2)]
    (pair,) = curated(judged)
    assert pair.prefix_ids == (*PROMPT_IDS, *OPENING)
    assert (pair.chosen_ids, pair.rejected_ids) == ((10, 11, 12), (10, 11))
    assert pair.rollout_ids == ("w", "l")


def test_the_control_imitates_the_winners_of_the_same_pairs():
    judged = judgements(4, 1, 4, 2)
    pairs_of = [row for row in curated(judged) if isinstance(row, PreferenceExample)]
    outcomes = curated(judged, learnt="chosen")
    examples = [row for row in outcomes if not isinstance(row, LeftOut)]
    assert [row.rollout_ids for row in examples] == [row.rollout_ids[:1] for row in pairs_of]
    assert [[s.loss for s in row.segments] for row in examples] == [[False, True]] * 2
    assert examples[0].segments[0].token_ids == PROMPT_IDS
    losers = {row.rollout_ids[1] for row in pairs_of}
    assert {row.rollout_id for row in outcomes if isinstance(row, LeftOut) and row.reason == "lost"} == losers


def test_shares_name_the_pairs_that_an_item_gives():
    judged = judgements(4, 1, 4, 2)
    both = [row.rollout_ids for row in curated(judged) if isinstance(row, PreferenceExample)]
    for place in (0, 1):
        outcomes = curated(judged, shares={"p": [place]})
        assert [row.rollout_ids for row in outcomes if isinstance(row, PreferenceExample)] == [both[place]]
        left_out = {row.rollout_id: row.reason for row in outcomes if isinstance(row, LeftOut)}
        assert left_out == dict.fromkeys(both[1 - place], "not_drawn")
    assert {row.reason for row in curated(judged, shares={}, undrawn="why")} == {"why"}


def graded_set(items):
    by_id = {problem.id: rows for problem, rows in items}
    return SimpleNamespace(problems=[problem for problem, _ in items], of_problem=by_id.__getitem__)


ONES = [(item(f"one{n}", "1"), judgements(1, 5, 1, 4, item_id=f"one{n}")) for n in range(10)]
FIVES = [(item(f"five{n}", "5"), judgements(5, 1, 5, 2, item_id=f"five{n}")) for n in range(2)]


def taken(judged, **how):
    """How often a score won over another, and the shares."""
    rule = PairRule(**RULE)
    shares = share_out(judged, None, rule, gold=gold_of, **how)
    counts = Counter()
    for problem in judged.problems:
        found = rule.pairs(problem.id, gold_of(problem), judged.of_problem(problem.id), ()).pairs
        for place in shares.get(problem.id, ()):
            counts[tuple(int(row.score.answer) for row in found[place])] += 1
    return counts, shares


def test_rare_scores_come_as_often_as_frequent_ones_while_they_last():
    judged = graded_set(ONES + FIVES)
    counts, shares = taken(judged, num_pairs=6, balance="winning")
    winners = Counter()
    for (winner, _), count in counts.items():
        winners[winner] += count
    assert winners == {1: 3, 5: 3}
    assert {tuple(places) for name, places in shares.items() if name.startswith("one")} == {(0,)}  # before second pairs
    assert taken(judged, num_pairs=1000, balance="winning")[0].total() == 24
    in_any_order, shares = taken(judged, num_pairs=12, balance="none")
    assert in_any_order.total() == 12 and {tuple(places) for places in shares.values()} == {(0,)}


def test_no_score_wins_more_often_over_another_than_it_loses():
    judged = graded_set(ONES + FIVES)
    counts, _ = taken(judged, num_pairs=0, balance="both")
    # 1 over 5 ten times and 5 over 1 twice; 1 over 4 and 5 over 2 have no counterpart
    assert counts == {(1, 5): 2, (5, 1): 2}
    assert taken(judged, num_pairs=2, balance="both")[0] == {(1, 5): 1, (5, 1): 1}
    assert taken(graded_set(ONES), num_pairs=0, balance="both")[0] == {}


def test_gold_judgements_with_and_without_feedback():
    prompt, eos = Segment(token_ids=PROMPT_IDS, src="prompt", loss=False), 0
    group = Group(
        problem=item(),
        prompt=lambda style: prompt,
        gold=lambda: None,
        direct_answer=lambda: "[RESULT] 4",
        solution=lambda: "Fine. [RESULT] 4",
        answer=lambda style, text: (Segment(token_ids=(len(style), len(text), eos), src="gold", loss=True),),
    )
    plain, bare = gold_judgements(group, styles=["plain", "score_only"], with_feedback=["plain"])
    assert plain.segments[1].token_ids == (5, 16, eos) and bare.segments[1].token_ids == (10, 10, eos)
    assert (plain.segments[0], plain.source) == (prompt, "gold")


def test_an_item_without_a_gold_judgement_is_left_out_by_name():
    def none():
        raise RecipeError("no gold rationale")

    group = Group(problem=item(), prompt=lambda style: None, gold=lambda: None, solution=none)
    (left_out,) = gold_judgements(group, styles=["plain"], with_feedback=["plain"])
    assert left_out == LeftOut(rollout_id="p", reason="no_gold_judgement")
