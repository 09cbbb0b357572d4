"""Reward margin and pair accuracy, by hand; what cannot be scored is refused."""

import math

import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.recipe import load
from reasonrun.records import PreferenceExample
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows
from reasonrun.verbs.scoring import PairLogprobs, pair_table


def logprobs(*pairs):
    rows = [
        PairLogprobs(
            problem_id=str(n), chosen_logp=chosen, rejected_logp=rejected, num_chosen_tokens=4, num_rejected_tokens=2
        )
        for n, (chosen, rejected) in enumerate(pairs)
    ]
    return Rows.of(PairLogprobs, rows)


def test_margin_and_accuracy_by_hand():
    """Log-ratios of the policy to the reference: chosen 1 and -1, rejected -2 and 0. Margins 0.5 * 3 and 0.5 * -1."""
    table = pair_table(logprobs((-3.0, -6.0), (-5.0, -4.0)), logprobs((-4.0, -4.0), (-4.0, -4.0)), beta=0.5)
    assert table["num_pairs"] == 2
    assert table["reward_margin"] == pytest.approx(0.5) and table["pair_accuracy"] == 0.5
    low, high = table["reward_margin_interval"]
    assert -0.5 <= low < 0.5 < high <= 1.5
    assert (table["chosen_logp"], table["rejected_logp"]) == (-4.0, -5.0)
    assert table["reference_logp_per_token"] == {"chosen": -1.0, "rejected": -2.0}  # 8 tokens and 4


def test_a_policy_that_is_the_reference_prefers_nothing():
    same = logprobs((-3.0, -6.0), (-5.0, -4.0))
    table = pair_table(same, same, beta=0.4)
    assert table["reward_margin"] == 0.0 and table["pair_accuracy"] == 0.0  # equal is not preferred
    assert pair_table(logprobs(), logprobs(), beta=0.4) == {"num_pairs": 0}


def test_the_model_is_asked_for_the_tokens_of_both_sides_after_the_prefix(tmp_path, monkeypatch):
    from reasonrun.engines.scripted import Scripted

    def one_each(self, sequences):
        asked.extend((tuple(prompt), tuple(ids)) for prompt, ids in sequences)
        return [[math.log(0.5)] * len(ids) for _, ids in sequences]

    asked = []
    monkeypatch.setattr(Scripted, "logprobs", one_each)
    small = ["task.num_train=12", "task.num_dev=8", "task.num_test=4", "preflight=off"]
    run(load("smoke_step_dpo", small), RunOptions(directory=tmp_path / "run"), SilentProgress())
    steps = tmp_path / "run" / "steps"

    def read(step, record):
        return list(Rows.load(record, sorted((steps / step).glob("rows-*.parquet")), tmp_path / "cache"))

    pairs = read("held-out/pairs-step", PreferenceExample)
    expected = [(pair.prefix_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert asked == 2 * expected  # by the reference, then by the policy
    for pair, row in zip(pairs, read("round-001/evaluate-pairs/logprobs", PairLogprobs), strict=True):
        assert row.chosen_logp == pytest.approx(len(pair.chosen_ids) * math.log(0.5))
        assert row.num_rejected_tokens == len(pair.rejected_ids)
