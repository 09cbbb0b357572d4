"""How well a judge agrees with gold, worked out by hand."""

import json
import math
import time

import numpy as np
import pytest

from reasonrun.agreement import correlations, entropy_bits, majority, proportion
from reasonrun.judging import headline, judging_findings, judging_section
from reasonrun.metrics import bootstrap_interval, resampled_counts, wilson_interval
from reasonrun.records import Graded, Problem, Rollout, Sampling, Score, Segment

UNDEFINED = {"value": None, "interval": None}


def problem(name, gold="", **meta):
    return Problem(id=name, task="judge", split="dev", messages=(), reference=gold, meta=meta)


def draw(of, answer, *, index=0, reason=None, tokens=3, text="four", logps=None, remote=False):
    """A row as the grader of judgements makes it: the nearest score is correct, as is any that has no gold."""
    if answer is None or not of.reference:
        value = float(answer is not None)
    elif answer.isdigit():
        value = float(abs(int(answer) - float(of.reference)) <= 0.5)
    else:
        value = float(answer == of.reference)
    given = Segment(token_ids=(9, 9), src="prompt", loss=False)
    rollout = Rollout(
        id=f"{of.id}-{index}",
        problem_id=of.id,
        index=index,
        kind="plain",
        messages=(),
        prompt_ids=() if remote else (1,),
        segments=() if remote else (given, Segment(token_ids=tuple(range(tokens)), src="model", loss=True)),
        text=text,
        finish_reason="stop",
        logps=logps,
        policy="weights",
        sampling=Sampling(),
        seed=1,
    )
    said = reason or ("no_answer" if answer is None else "correct" if value else "wrong")
    return Graded(rollout=rollout, score=Score(value=value, answer=answer, reason=said, grader="judgement-1"))


def item(of, *answers, **changes):
    return of, [draw(of, answer, index=index, **changes) for index, answer in enumerate(answers)]


def scored(pairs):
    """One item of each (gold, answer, ...)."""
    return [item(problem(f"p{n:03d}", gold), *answers) for n, (gold, *answers) in enumerate(pairs)]


def values(table, *names):
    return [table[name]["value"] for name in names]


# ---- shares, correlations


def test_shares_and_errors_by_hand():
    """Gold 3, 3.6667, 2, 5; judged 3 (exact), 4 (exact: nearest), 4 (2 off), unread."""
    groups = scored([("3", "3"), ("3.6667", "4"), ("2", "4"), ("5", None)])
    section = judging_section(groups)
    assert (section["num_items"], section["num_judgements"], section["num_read"]) == (4, 4, 3)
    assert section["unread_share"] == 0.25 and section["unread_reasons"] == {"no_answer": 1}
    assert section["exact"] == {"value": 0.5, "interval": list(wilson_interval(2, 4))}
    assert section["within_1"] == {"value": 0.5, "interval": list(wilson_interval(2, 4))}
    assert section["mean_error"] == pytest.approx((0 + 0.3333 + 2) / 3)
    assert section["histogram"] == {"1": 0, "2": 0, "3": 1, "4": 2, "5": 0}
    assert section["gold_histogram"] == {"1": 0, "2": 1, "3": 1, "4": 1, "5": 1}
    assert section["gold_entropy_bits"] == 2.0
    assert section["entropy_bits"] == pytest.approx(math.log2(3) - 2 / 3)  # H(1/3, 2/3)
    # Of the 4s, gold is 2.83335 on average: 2/3 * 1.16665 + 1/3 * 0.
    assert section["calibration"]["4"] == {"count": 2, "mean_gold": pytest.approx(2.83335)}
    assert section["calibration"]["5"] == {"count": 0, "mean_gold": None}
    assert section["calibration_error"] == pytest.approx(2 / 3 * 1.16665)
    assert "draws" not in section and "pairs" not in section and headline(section) is None


def test_gold_means_are_rounded_halves_up_in_the_histogram_and_both_neighbours_of_a_half_are_near():
    section = judging_section(scored([("2.5", "2"), ("2.5", "3"), ("3.67", "4"), ("3.67", "2")]))
    assert section["gold_histogram"] == {"1": 0, "2": 0, "3": 2, "4": 2, "5": 0}
    assert section["exact"]["value"] == 0.75
    assert section["within_1"]["value"] == 0.75  # 2 is 1.67 from 3.67
    assert section["mean_error"] == pytest.approx((-0.5 + 0.5 + 0.33 - 1.67) / 4)


def test_within_1_holds_1():
    section = judging_section(scored([("3", "4"), ("3", "2"), ("3", "5"), ("3.5", "2")]))
    assert values(section, "exact", "within_1") == [0.0, 0.5]


def test_correlations_with_ties_by_hand():
    """Scores 1 2 2 3, gold 1 3 2 2. Pearson: deviations -1 0 0 1 and -1 1 0 0: 1 / sqrt(2 * 2). Ranks 1 2.5 2.5 4 and
    1 4 2.5 2.5: deviations -1.5 0 0 1.5 and -1.5 1.5 0 0, 2.25 / 4.5. Kendall: of six pairs the first item makes three
    concordant; items 2 and 3 tie in score, 3 and 4 in gold, 2 and 4 are discordant: (3 - 1) / sqrt(5 * 5)."""
    found = correlations([1, 2, 2, 3], [1, 3, 2, 2], list("abcd"), with_intervals=False)
    assert values(found, "pearson", "spearman", "kendall") == pytest.approx([0.5, 0.5, 0.4])


def test_rank_correlations_do_not_see_distances():
    """Golds 1, 2, 2.1, 5 in the order of the scores 1, 2, 3, 5 give rank correlations of 1, and Pearson's less."""
    found = correlations([1, 2, 3, 5], [1, 2, 2.1, 5], list("abcd"), with_intervals=False)
    assert values(found, "spearman", "kendall") == pytest.approx([1.0, 1.0])
    # sums of products of deviations: scores -1.75 -0.75 0.25 2.25, gold -1.525 -0.525 -0.425 2.475
    shared = 1.75 * 1.525 + 0.75 * 0.525 - 0.25 * 0.425 + 2.25 * 2.475
    squares = (1.75**2 + 0.75**2 + 0.25**2 + 2.25**2) * (1.525**2 + 0.525**2 + 0.425**2 + 2.475**2)
    assert found["pearson"]["value"] == pytest.approx(shared / math.sqrt(squares))


def by_pairs(x, y):
    """Kendall's tau-b and Pearson's correlation of average ranks, one pair of rows at a time."""
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i in range(len(x)) for j in range(i)]
    tau = sum(a * b for a, b in signs) / math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    ranks = [[sum(other < one for other in z) + (z.count(one) + 1) / 2 for one in z] for z in (x, y)]
    return float(np.corrcoef(x, y)[0, 1]), float(np.corrcoef(*ranks)[0, 1]), tau


def test_values_and_intervals_are_those_of_one_resample_after_the_other():
    rng = np.random.default_rng(3)
    gold = rng.integers(3, 16, size=40) / 3
    scores = np.clip(np.round(gold + rng.normal(size=40)), 1, 5)
    found = correlations(list(scores), list(gold), [f"{n:02d}" for n in range(40)])
    assert values(found, "pearson", "spearman", "kendall") == pytest.approx(by_pairs(list(scores), list(gold)))
    drawn = np.random.default_rng(0).integers(40, size=(2000, 40))
    for place, name in enumerate(("pearson", "spearman")):
        resampled = [by_pairs(list(scores[some]), list(gold[some]))[place] for some in drawn[:100]]
        pooled = correlations_of_resamples(scores, gold, drawn[:100], name)
        assert pooled == pytest.approx(resampled)
    low, high = np.quantile([np.corrcoef(scores[some], gold[some])[0, 1] for some in drawn], [0.025, 0.975])
    assert found["pearson"]["interval"] == pytest.approx([low, high])


def correlations_of_resamples(scores, gold, drawn, name):
    return [
        correlations(list(scores[some]), list(gold[some]), [str(n) for n in range(len(some))], with_intervals=False)[
            name
        ]["value"]
        for some in drawn
    ]


def test_correlations_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    for _ in range(30):
        gold, scores = rng.integers(3, 16, size=30) / 3, rng.integers(1, 6, size=30).astype(float)
        found = correlations(list(scores), list(gold), [str(n) for n in range(30)], with_intervals=False)
        expected = [of(scores, gold)[0] for of in (stats.pearsonr, stats.spearmanr, stats.kendalltau)]
        assert values(found, "pearson", "spearman", "kendall") == pytest.approx(expected)


@pytest.mark.parametrize(
    "pairs",
    [
        [("1", "3"), ("2", "3"), ("4", "3"), ("5", "3")],  # constant scores
        [("3.67", "1"), ("3.67", "2"), ("3.67", "4"), ("3.67", "5")],  # constant gold
        [("1", "1"), ("5", "5")],  # two items
        [("1", "1"), ("2", "2"), ("3", None), ("", "4")],  # two that have gold and were read
        [("1", None), ("2", None), ("3", None)],
    ],
)
def test_undefined_correlations_are_none(pairs):
    section = judging_section(scored(pairs))
    assert [section[name] for name in ("pearson", "spearman", "kendall")] == [UNDEFINED] * 3
    json.dumps(section, allow_nan=False)


def test_a_correlation_that_most_resamples_leave_undefined_has_no_interval():
    """One score of ten differs: a resample misses it with chance 0.9^10 = 0.35."""
    section = judging_section(scored([(str(1 + n % 5), "5" if n == 4 else "3") for n in range(10)]))
    assert section["pearson"]["value"] is not None and section["pearson"]["interval"] is None


def test_items_without_gold_count_in_the_spread_alone():
    section = judging_section(scored([("", "4"), ("", "2"), ("", None)]))
    assert section["exact"] == UNDEFINED and section["within_1"] == UNDEFINED
    assert section["mean_error"] is None and section["calibration_error"] is None
    assert section["histogram"]["4"] == 1 and sum(section["gold_histogram"].values()) == 0
    assert section["gold_entropy_bits"] is None and section["unread_share"] == pytest.approx(1 / 3)


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="at least one problem"):
        judging_section([])
    with pytest.raises(ValueError, match="one row"):
        judging_section([(problem("p", "3"), [])])


def test_lengths_are_of_sampled_tokens():
    groups = [item(problem("p", "3"), "3", tokens=10, text="12345"), item(problem("q", "3"), "3", tokens=4, text="123")]
    section = judging_section(groups)
    assert (section["mean_num_tokens"], section["mean_num_chars"]) == (7.0, 4.0)
    remote = judging_section([item(problem("p", "3"), "3", remote=True, text="12345")])
    assert (remote["mean_num_tokens"], remote["mean_num_chars"]) == (None, 5.0)


def test_choices_and_yes_or_no_have_no_scale():
    groups = [
        item(problem(f"p{n}", gold), said) for n, (gold, said) in enumerate([("A", "A"), ("B", "A"), ("B", None)])
    ]
    section = judging_section(groups, "choice")
    assert section["histogram"] == {"A": 2, "B": 0} and section["gold_histogram"] == {"A": 1, "B": 2}
    assert section["exact"]["value"] == pytest.approx(1 / 3) and section["entropy_bits"] == 0.0
    assert not {"pearson", "within_1", "mean_error", "calibration", "calibration_error"} & set(section)
    section = judging_section([item(problem("p", "yes"), "yes", "no", "yes")], "yes_no")
    assert section["histogram"] == {"no": 1, "yes": 2} and section["gold_histogram"] == {"no": 0, "yes": 1}
    assert section["draws"]["self_consistency"]["value"] == 1.0 and "mean_within_1" not in section["draws"]


# ---- intervals


def test_the_same_judgement_twice_is_no_more_evidence():
    rng = np.random.default_rng(5)
    pairs = [(str(gold), str(int(np.clip(gold + rng.integers(-2, 3), 1, 5)))) for gold in rng.integers(1, 6, size=30)]
    once = judging_section(scored(pairs))
    four_times = judging_section(scored([(gold, said, said, said, said) for gold, said in pairs]))
    for name in (
        "pearson",
        "spearman",
        "kendall",
    ):  # of four equal rows each item has four times the weight, as has every other
        assert four_times[name]["value"] == pytest.approx(once[name]["value"])
        assert four_times[name]["interval"] == pytest.approx(once[name]["interval"])
    width = four_times["exact"]["interval"][1] - four_times["exact"]["interval"][0]
    exact = [float(gold == said) for gold, said in pairs]
    assert four_times["exact"]["interval"] == pytest.approx(bootstrap_interval(exact))
    low, high = wilson_interval(4 * int(sum(exact)), 120)
    assert width > 1.7 * (high - low)


def test_equal_values_do_not_claim_certainty():
    assert proportion([1, 1, 1, 1], ["p", "p", "q", "q"]) == {"value": 1.0, "interval": list(wilson_interval(2, 2))}
    assert proportion([0.5] * 4, list("abcd")) == {"value": 0.5, "interval": list(wilson_interval(2, 4))}
    assert proportion([], []) == UNDEFINED


def test_resampled_counts_are_the_resamples_of_the_means():
    (counts,) = resampled_counts(50)
    values_P = np.random.default_rng(6).normal(size=50)
    assert counts.shape == (2000, 50) and set(counts.sum(axis=1)) == {50.0}
    low, high = np.quantile(counts @ values_P / 50, [0.025, 0.975])
    assert (low, high) == pytest.approx(bootstrap_interval(values_P))


def test_entropy():
    assert entropy_bits([1, 1, 2]) == 1.5 and entropy_bits([7, 0]) == 0.0 and entropy_bits([0, 0]) is None


# ---- several draws


def test_several_draws_by_hand():
    """p (gold 3): 3 3 5; q (gold 4.3333): 4 unread 2; r (gold 1): 2 2 2."""
    logps = {"p": [(-0.5, -0.7), (-2.0,), (-1.0,)], "q": [(-0.1,), (-0.5,), (-0.4,)], "r": [(-1.0,)] * 3}
    groups = []
    for name, gold, answers in (("p", "3", "335"), ("q", "4.3333", "4?2"), ("r", "1", "222")):
        of = problem(name, gold)
        read = [None if answer == "?" else answer for answer in answers]
        groups.append((of, [draw(of, answer, index=n, logps=logps[name][n]) for n, answer in enumerate(read)]))
    draws = judging_section(groups)["draws"]
    assert draws["num_draws"] == 3
    assert draws["agreement"]["value"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    # p: 3; q: 4 and 2 are as frequent and as near their mean, the lower is wrong; r: 2, wrong.
    assert draws["self_consistency"] == {"value": pytest.approx(1 / 3), "interval": list(wilson_interval(1, 3))}
    assert draws["self_consistency_pearson"] == pytest.approx(np.corrcoef([3, 2, 2], [3, 4.3333, 1])[0, 1])
    # means 11/3, 3 and 2 against 3, 4.3333 and 1
    assert draws["mean_within_1"]["value"] == pytest.approx(2 / 3)
    assert draws["mean_pearson"] == pytest.approx(np.corrcoef([11 / 3, 3, 2], [3, 4.3333, 1])[0, 1])
    # The highest mean is that of p's first 3 (-0.6; its sum is below that of the 5), q's 4 and r's first.
    assert draws["best_of_n"]["value"] == pytest.approx(2 / 3)
    assert draws["oracle"]["value"] == pytest.approx(2 / 3)


def test_best_of_n_needs_all_log_probabilities():
    of = problem("p", "3")
    section = judging_section([(of, [draw(of, "3", logps=(-1.0,)), draw(of, "3", index=1)])])
    assert section["draws"]["best_of_n"] == UNDEFINED


def test_unread_draws_agree_with_nothing_and_decide_nothing():
    """The two 3s of q are one of its three pairs of draws."""
    draws = judging_section([item(problem("p", "3"), None, None), item(problem("q", "3"), "3", None, "3")])["draws"]
    assert draws["agreement"]["value"] == pytest.approx((0 + 1 / 3) / 2)
    assert values(draws, "self_consistency", "mean_within_1", "oracle") == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ("11554", "5"),  # 1 and 5 twice each, mean 3.2
        ("11552", "1"),  # mean 2.8
        ("2244", "2"),  # both 1 from the mean of 3
        ("4422", "2"),
        ("5", "5"),
        ("BBA", "B"),
        ("BA", "A"),
    ],
)
def test_the_majority_of_draws(answers, winner):
    of = problem("p", "3" if answers.isdigit() else "A")
    assert majority([draw(of, None), *(draw(of, answer) for answer in answers)]).score.answer == winner


# ---- pairs


def sides(*pairs, categories=None):
    groups = []
    for n, (chosen, rejected) in enumerate(pairs):
        further = {"category": categories[n]} if categories else {}
        for side, answers in (("chosen", chosen), ("rejected", rejected)):
            groups.append(item(problem(f"{n}-{side}", "", pair=f"pair-{n}", side=side, **further), *answers))
    return groups


def test_pairs_that_are_scored_alone():
    """Higher, tied, lower, chosen unread, rejected unread: 1 + 0.5 of 5."""
    section = judging_section(sides("42", "33", "24", [[None], "1"], ["5", [None]]))
    pairs = section["pairs"]
    assert (pairs["num_pairs"], pairs["num_incomplete"]) == (5, 0)
    assert pairs["accuracy"] == {"value": 0.3, "interval": list(bootstrap_interval([1, 0.5, 0, 0, 0]))}
    assert (pairs["tie_share"], pairs["unread_share"]) == (0.2, 0.4)
    assert headline(section) == 0.3 and "by_category" not in pairs


def test_several_draws_of_a_side_are_averaged():
    """4 and 3 against 3 (one unread) and 3: 3.5 > 3; 3 and 4 against 4 and 3: a tie."""
    pairs = judging_section(sides(["43", ["3", None]], ["34", "43"]))["pairs"]
    assert (pairs["accuracy"]["value"], pairs["tie_share"], pairs["unread_share"]) == (0.75, 0.5, 0.0)


def test_categories_count_equally_in_their_mean():
    pairs = judging_section(sides("42", "42", "24", "33", categories=["chat", "chat", "chat", "code"]))["pairs"]
    assert list(pairs["by_category"]) == ["chat", "code"]
    assert pairs["by_category"]["chat"]["accuracy"] == {
        "value": pytest.approx(2 / 3),
        "interval": list(wilson_interval(2, 3)),
    }
    assert pairs["by_category"]["code"]["num_pairs"] == 1 and pairs["by_category"]["code"]["tie_share"] == 1.0
    assert pairs["category_mean"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert pairs["accuracy"]["value"] == pytest.approx(2.5 / 4)


def test_half_a_pair_counts_nowhere_else():
    section = judging_section(sides("42", "24")[:3])
    assert (section["pairs"]["num_pairs"], section["pairs"]["num_incomplete"], headline(section)) == (1, 1, 1.0)
    alone = judging_section(sides("42")[:1])
    assert alone["pairs"]["num_pairs"] == 0 and headline(alone) is None
    json.dumps(alone, allow_nan=False)


def orders(*pairs):
    """Pairs from what is said with the chosen one first (right: A) and second (right: B)."""
    groups = []
    for n, said in enumerate(pairs):
        for order, gold, answers in zip(("chosen_first", "rejected_first"), "AB", said, strict=True):
            groups.append(
                item(problem(f"{n}-{order}", gold, pair=n, order=order), *(a if a in "AB" else None for a in answers))
            )
    return groups


def test_a_judge_that_always_says_a():
    pairs = judging_section(orders(*["AA"] * 4), "choice")["pairs"]
    assert values(pairs, "accuracy", "consistent_share", "accuracy_both", "position_bias") == [0.5, 0.0, 0.0, 0.5]
    low, high = pairs["position_bias"]["interval"]
    assert high == 0.5 and low == pytest.approx(wilson_interval(4, 4)[0] - 0.5)


def test_both_orders_by_hand():
    """Right in both, wrong in both (consistent), B twice, unread first: of 8 rows 2 + 0 + 1 + 1 are right."""
    section = judging_section(orders("AB", "BA", "BB", "?B"), "choice")
    pairs = section["pairs"]
    assert values(pairs, "accuracy", "consistent_share", "accuracy_both") == [0.5, 0.5, 0.25]
    assert pairs["position_bias"]["value"] == pytest.approx(2 / 7 - 0.5)  # A twice of 7 that were read
    assert pairs["unread_share"] == 0.125 and "tie_share" not in pairs and headline(section) == 0.5


def test_the_winner_of_several_draws_is_the_majority():
    pairs = judging_section(orders(["AAB", "BBA"]), "choice")["pairs"]
    assert values(pairs, "accuracy", "consistent_share", "accuracy_both") == [pytest.approx(4 / 6), 1.0, 1.0]


# ---- findings


def judge(**changes):
    section = {
        "histogram": {"1": 10, "2": 20, "3": 40, "4": 20, "5": 10},
        "gold_histogram": {"1": 20, "2": 20, "3": 20, "4": 20, "5": 20},
        "entropy_bits": 2.1,
        "gold_entropy_bits": 2.3,
        "unread_share": 0.02,
        "mean_num_tokens": 60.0,
        "mean_num_chars": 300.0,
        "exact": {"value": 0.3, "interval": [0.2, 0.4]},
        "pearson": {"value": 0.5, "interval": [0.4, 0.6]},
    }
    return section | changes


COLLAPSED = {"1": 0, "2": 1, "3": 96, "4": 3, "5": 0}
FEW = {"1": 0, "2": 0, "3": 85, "4": 15, "5": 0}
FINDINGS = [
    ({"histogram": COLLAPSED}, ["judgements collapse: 96.0% are 3 (40.0% before", "gold is 1, 20.0%)"]),
    ({"entropy_bits": 1.1}, ["entropy fell from 2.10 to 1.10 bits, below half of gold's 2.30"]),
    ({"unread_share": 0.07}, ["cannot be read: 7.0% (above 5%), 2.0% before"]),
    ({"mean_num_tokens": 91.0}, ["much longer: 91.0 tokens on average, 60.0 before"]),
    ({"mean_num_tokens": 39.0}, ["much shorter: 39.0 tokens on average, 60.0 before"]),
    ({"mean_num_tokens": None, "mean_num_chars": 151.0}, ["much shorter: 151.0 characters on average, 300.0 before"]),
    (
        {"exact": {"value": 0.4, "interval": None}, "pearson": {"value": 0.4, "interval": None}},
        ["(40.0%, 30.0% before) while Pearson fell from 0.50 to 0.40"],
    ),
    ({"exact": {"value": 0.4, "interval": None}, "pearson": UNDEFINED}, ["from 0.50 to nothing (one score only)"]),
]


@pytest.mark.parametrize(("changes", "texts"), FINDINGS)
@pytest.mark.promise("G13", "collapses of a judge")
def test_each_finding_has_its_numbers(changes, texts):
    (finding,) = judging_findings(judge(), judge(**changes))
    assert all(text in finding for text in texts) and "\n" not in finding


@pytest.mark.parametrize("changes", [{}, *(changes for changes, _ in FINDINGS)])
def test_what_was_so_before_is_no_finding(changes):
    assert judging_findings(judge(**changes), judge(**changes)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"histogram": COLLAPSED, "gold_histogram": FEW},  # gold itself is mostly 3
        {"histogram": {"1": 0, "2": 0, "3": 94, "4": 6, "5": 0}},
        {"entropy_bits": 1.2},
        {"unread_share": 0.05},
        {"mean_num_tokens": 90.0},
        {"mean_num_tokens": 40.0},
        {"mean_num_tokens": 60.0, "mean_num_chars": 900.0},
        {"exact": {"value": 0.4, "interval": None}},
        {"pearson": {"value": 0.4, "interval": None}},
        {"exact": {"value": 0.305, "interval": None}, "pearson": {"value": 0.4, "interval": None}},
    ],
)
def test_what_is_within_bounds_is_no_finding(changes):
    assert judging_findings(judge(), judge(**changes)) == []


def test_a_share_of_unread_that_was_high_and_grew_is_a_finding():
    (finding,) = judging_findings(judge(unread_share=0.1), judge(unread_share=0.2))
    assert "20.0% (above 5%), 10.0% before" in finding
    assert judging_findings(judge(unread_share=0.2), judge(unread_share=0.1)) == []


def test_findings_of_real_sections_of_any_kind():
    golds = ["1", "2", "3", "4", "5"] * 4
    good, flat = (
        judging_section(scored([(g, s) for g, s in zip(golds, said, strict=True)])) for said in (golds, "3" * 20)
    )
    found = judging_findings(good, flat)
    assert ["collapse" in found[0], "spread" in found[1]] == [True, True] and len(found) == 2
    assert judging_findings(flat, flat) == judging_findings(good, good) == []
    without = judging_section(sides("42", "33"))
    assert judging_findings(without, without) == []
    choices = judging_section(orders("AB"), "choice")
    assert judging_findings(choices, choices) == []
    unread = judging_section(scored([(gold, None) for gold in golds]))
    assert [finding.split(":")[0] for finding in judging_findings(good, unread)] == ["judgements cannot be read"]


def test_a_large_section_is_quick():
    rng = np.random.default_rng(7)
    groups = []
    for n in range(1000):
        gold = rng.integers(3, 16) / 3
        said = np.clip(np.round(gold + rng.normal(size=8)), 1, 5).astype(int)
        groups.append(item(problem(f"p{n}", f"{gold:.4f}"), *map(str, said)))
    begin = time.process_time()
    section = judging_section(groups)
    assert time.process_time() - begin < 10  # about 1 s; a shared machine may be slow
    assert section["num_judgements"] == 8000 and section["pearson"]["interval"][0] > 0.5
