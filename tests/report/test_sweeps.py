"""The table of a sweep against numbers worked out by hand."""

import json
import math

import pytest

from reasonrun.report.sweeps import Estimate, format_markdown, format_text, sweep_table


def summary(arm, seed, last=None, *, base=0.4, exit_code=0, position=0, sampled=None, **metrics):
    """The part of a run's summary that the table reads."""
    test = {}
    if last is not None:
        test = {"base": {"greedy": {"accuracy": base}}, "last": {"greedy": {"accuracy": last}}}
    if sampled is not None:
        test["base"]["sampled"], test["last"]["sampled"] = ({"accuracy": value} for value in sampled)
    return {
        "run": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "position": position,
        "exit_code": exit_code,
        "test": test,
        "train_metrics": metrics,
    }


TWO_ARMS = [
    summary("a", 0, 0.5, position=0, base=0.4, loss=1.0, reward_margin=0.2),
    summary("b", 0, 0.6, position=1, base=0.4, loss=3.0),
    summary("a", 1, 0.6, position=2, base=0.4, loss=2.0, reward_margin=0.4),
    summary("b", 1, 0.8, position=3, base=0.4, loss=5.0),
]


def test_three_seeds_have_the_t_interval_of_the_tables():
    """Values 1, 2, 3: mean 2, standard deviation 1; t(0.975, 2) = 4.302653 in every table."""
    one = Estimate.of([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (one.mean, one.low, one.high, one.num_seeds) == pytest.approx((2.0, 2 - half, 2 + half, 3), abs=1e-5)


def test_one_seed_has_no_interval_and_the_table_says_so():
    table = sweep_table([summary("a", 0, 0.5), summary("b", 0, 0.9, position=1)])
    assert (table.arms[0].scores["greedy"].last.low, table.arms[0].scores["greedy"].last.high) == (None, None)
    assert table.comparisons[0].verdict == "one seed: no interval"
    assert "one seed, so there are no intervals" in format_text(table)[-1]
    json.dumps(table.to_json(), allow_nan=False)  # an infinite bound would be no JSON


def test_gains_and_comparisons_are_paired_by_seed():
    """Gains of b: 0.2 and 0.4, mean 0.3, deviation 0.1 * sqrt 2; t(0.975, 1) = 12.706205, so the half width is 1.27062.
    b - a: 0.1 and 0.2, mean 0.15, half width 0.63531."""
    table = sweep_table(reversed(TWO_ARMS))
    assert [arm.name for arm in table.arms] == ["a", "b"]  # the order of the sweep, not that of the files
    gain = table.arms[1].scores["greedy"].gain
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.3, 0.3 - 1.2706205, 0.3 + 1.2706205), abs=1e-6)
    (line,) = table.comparisons
    assert (line.arm, line.reference, line.part) == ("b", "a", "greedy")
    assert (line.difference.mean, line.difference.low) == pytest.approx((0.15, 0.15 - 0.63531024), abs=1e-6)
    assert line.verdict == "not distinguishable"


def test_only_seeds_that_both_arms_finished_are_compared():
    runs = [
        *(summary("a", seed, value) for seed, value in enumerate([0.5, 0.6, 0.1])),
        *(summary("b", seed, value, position=1) for seed, value in [(1, 0.8), (0, 0.6)]),
        summary("b", 2, exit_code=5, position=1),
    ]
    (line,) = sweep_table(runs).comparisons
    assert line.difference.num_seeds == 2 and line.difference.mean == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ([0.70, 0.71, 0.72], "higher"),  # differences 0.20, 0.21, 0.22: half width 4.302653 * 0.01 / sqrt 3 = 0.025
        ([0.30, 0.29, 0.28], "lower"),
        ([0.50, 0.50, 0.53], "not distinguishable"),  # 0, 0, 0.03: mean 0.01, half width 0.043
        ([0.50, 0.50, 0.50], "not distinguishable"),
        ([0.60, 0.60, 0.60], "higher, by the same in every seed"),
    ],
)
def test_the_verdict_is_whether_the_interval_holds_zero(others, verdict):
    runs = [summary("a", seed, 0.5) for seed in range(3)]
    runs += [summary("b", seed, value, position=1) for seed, value in enumerate(others)]
    assert sweep_table(runs).comparisons[0].verdict == verdict


def test_every_arm_is_compared_with_the_first_in_every_part():
    runs = [
        summary(arm, 0, 0.5, position=position, sampled=(0.2, 0.3 + position / 10))
        for position, arm in enumerate("abc")
    ]
    found = [(line.arm, line.part, round(line.difference.mean, 6)) for line in sweep_table(runs).comparisons]
    assert found == [("b", "greedy", 0.0), ("b", "sampled", 0.1), ("c", "greedy", 0.0), ("c", "sampled", 0.2)]


def test_findings_and_failures_are_counted_and_leave_an_arm_without_numbers():
    runs = [
        summary("a", 0, 0.5),
        summary("a", 1, exit_code=5),
        *(summary("b", seed, exit_code=code, position=1) for seed, code in enumerate([5, 1, 3])),
    ]
    table = sweep_table(runs)
    lines = format_text(table)
    assert lines[1].startswith("a    1, 1 ended in a finding  ")
    assert "0, 1 ended in a finding, 2 failed" in lines[2] and lines[2].split()[-1] == "-"
    assert table.comparisons == ()


def test_metrics_of_the_trainer_are_shown_when_all_arms_have_them():
    table = sweep_table(TWO_ARMS)
    assert table.common_metrics == ("loss",)
    header, first, second = (line.split() for line in format_text(table)[:3])
    assert header[-1] == "loss" and (first[-1], second[-1]) == ("1.5", "4")
    assert table.arms[0].train_metrics["reward_margin"].mean == pytest.approx(0.3)  # still in the document


def test_the_text_in_full():
    assert format_text(sweep_table(TWO_ARMS)) == [
        "arm  seeds  greedy base  greedy last          greedy gain            loss",
        "a    2      40.0         55.0 [-8.5, 118.5]   +15.0 [-48.5, +78.5]   1.5",
        "b    2      40.0         70.0 [-57.1, 197.1]  +30.0 [-97.1, +157.1]  4",
        "",
        "b against a, greedy: +15.0 [-48.5, +78.5] (2 seeds): not distinguishable",
        "accuracies in percent: mean over seeds [95 % t interval]; differences are paired by seed",
    ]


def test_markdown_has_the_same_cells():
    lines = format_markdown(sweep_table(TWO_ARMS))
    assert lines[0] == "| arm | seeds | greedy base | greedy last | greedy gain | loss |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    assert lines[2] == "| a | 2 | 40.0 | 55.0 [-8.5, 118.5] | +15.0 [-48.5, +78.5] | 1.5 |"
    assert lines[5] == "- b against a, greedy: +15.0 [-48.5, +78.5] (2 seeds): not distinguishable"


def test_nothing_done_is_said():
    table = sweep_table([summary("a", 0, exit_code=5)])
    assert format_text(table)[-1] == "no run is done" and table.common_metrics == ()


def attempted(accuracies, changed=0.4):
    """The section of a part, as a run's summary holds it: what was wrong first and then right is the whole delta."""
    delta = accuracies[-1] - accuracies[0]
    change = {"to": len(accuracies), "delta": delta, "changed_share": changed}
    change |= {"incorrect_to_correct": delta + 0.05, "correct_to_incorrect": 0.05}
    return {"attempts": [{"accuracy": value} for value in accuracies], "changes": [{"delta": 9.0}, change]}


def test_second_attempts_are_averaged_over_seeds_and_compared_with_the_first_arm():
    """Arm b asks again and gains 0.1 and 0.2, mean 0.15, half width 12.706205 * 0.05 = 0.63531; a gains 0 twice. At the
    second attempt b minus a is 0.2 and 0.4."""
    runs = [
        summary(arm, seed, 0.5, position=n) for n, (arm, seed) in enumerate((("a", 0), ("b", 0), ("a", 1), ("b", 1)))
    ]
    for run, accuracies in zip(runs, ([0.5, 0.5], [0.6, 0.7], [0.5, 0.5], [0.7, 0.9]), strict=True):
        run["test"]["last"]["correction"] = {"greedy": attempted(accuracies)}
    table = sweep_table(runs)
    gain = table.arms[1].correction["greedy t1→t2 delta"]
    assert (gain.mean, gain.low) == pytest.approx((0.15, 0.15 - 0.63531), abs=1e-5)
    assert table.arms[1].correction["greedy acc@t2"].mean == pytest.approx(0.8)
    found = {line.part: line.difference.mean for line in table.comparisons}
    assert found == pytest.approx({"greedy": 0.0, "greedy acc@t2": 0.3, "greedy t1→t2 delta": 0.15})
    lines = format_text(table)
    names = ["acc@t1", "acc@t2", "t1→t2 delta", "t1→t2 i→c", "t1→t2 c→i", "t1→t2 changed"]
    assert [lines[0].index(f"greedy {name}") for name in names] == sorted(lines[0].index(f"greedy {n}") for n in names)
    assert "+15.0 [-48.5, +78.5]" in lines[2] and lines[1].split()[-4:] == ["+0.0", "5.0", "5.0", "40.0"]
    assert "b against a, greedy t1→t2 delta: +15.0 [-48.5, +78.5] (2 seeds): not distinguishable" in lines


def test_arms_that_ask_more_often_are_not_compared_by_another_gain():
    runs = [summary("a", 0, 0.5), summary("b", 0, 0.5, position=1), summary("c", 0, 0.5, position=2)]
    runs[0]["test"]["last"]["correction"] = {"greedy": attempted([0.5, 0.6])}
    runs[1]["test"]["last"]["correction"] = {"greedy": attempted([0.5, 0.7, 0.9])}
    table = sweep_table(runs)
    found = [(line.arm, line.part, round(line.difference.mean, 6)) for line in table.comparisons]
    assert found == [("b", "greedy", 0.0), ("b", "greedy acc@t2", 0.1), ("c", "greedy", 0.0)]
    assert format_text(table)[3].split()[-1] == "-"  # c was asked once


def test_margins_on_held_out_pairs_are_compared_in_their_own_unit():
    """Margins of b minus a: 0.1 and 0.3, mean 0.2, deviation 0.1414214; half width 12.706205 * 0.1 = 1.2706205."""
    runs = [
        summary(arm, seed, 0.5, position=n) for n, (arm, seed) in enumerate((("a", 0), ("b", 0), ("a", 1), ("b", 1)))
    ]
    for run, margin in zip(runs, (0.1, 0.2, 0.2, 0.5), strict=True):
        run["held_out_pairs"] = {"reward_margin": margin, "pair_accuracy": 0.5 + margin}
    table = sweep_table(runs)
    line = next(line for line in table.comparisons if line.part == "reward_margin")
    assert (line.difference.mean, line.difference.low) == pytest.approx((0.2, 0.2 - 1.2706205), abs=1e-6)
    text = "\n".join(format_text(table))
    assert "held-out reward_margin" in text and "b against a, reward_margin: +0.200 [-1.071, +1.471] (2 seeds)" in text
    assert "b against a, pair_accuracy: +20.0 [-107.1, +147.1] (2 seeds): not distinguishable" in text
