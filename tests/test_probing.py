"""The probe that tells one policy's weights from another's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from reasonrun.errors import RunFailed
from reasonrun.probing import Proof, mean_difference, mismatch, probe_ids, probe_pair, read_probe, write_probe


def test_the_tokens_are_fixed_and_of_the_vocabulary() -> None:
    ids = probe_ids(600)
    assert ids == probe_ids(600) and len(ids) == 48
    assert all(0 <= token < 600 for token in ids) and len(set(ids)) > 30
    assert probe_pair(ids) == (ids[:1], ids[1:])


def test_what_the_trainer_computed_lies_beside_its_weights(tmp_path: Path) -> None:
    assert read_probe(tmp_path) is None
    write_probe(tmp_path, [-1.5, -0.1])
    assert read_probe(tmp_path) == (-1.5, -0.1)
    assert json.loads((tmp_path / "probe.json").read_text()) == {"logps": [-1.5, -0.1]}


def test_an_engine_near_the_trainer_passes() -> None:
    proof = Proof(policy="round-002/train", logps=(-1.0, -2.0), before="round-001/train", logps_before=(-1.4, -2.4))
    assert proof.check("generation-0", (-1.1, -2.1)) == pytest.approx(0.1)


@pytest.mark.parametrize("logps", [(-1.0, -2.5), (math.nan, -2.0), (-1.0,), ()])
def test_other_weights_are_refused(logps: tuple[float, ...]) -> None:
    proof = Proof(policy="round-002/train", logps=(-1.0, -2.0))
    with pytest.raises(
        RunFailed, match=r"generation-1 does not answer with the weights of round-002/train.*allowed: 0\.2"
    ):
        proof.check("generation-1", logps)


def test_weights_of_the_policy_before_are_named_within_the_tolerance() -> None:
    proof = Proof(policy="round-002/train", logps=(-1.0, -2.0), before="round-001/train", logps_before=(-1.05, -2.05))
    proof.check_moved("generation-0", (-1.03, -2.02), (-1.04, -2.06))
    with pytest.raises(RunFailed, match="still answers with the weights of round-001/train"):
        proof.check_moved("generation-0", (-1.03, -2.02), (-1.03, -2.02))
    with pytest.raises(RunFailed, match="still answers with the weights of round-001/train"):
        proof.check("generation-0", (-1.049, -2.051))
    assert proof.check("generation-0", (-1.03, -2.02)) == pytest.approx(0.025)  # nearer to the new one


def test_two_equal_policies_in_a_row_pass() -> None:
    proof = Proof(policy="b", logps=(-1.0,), before="a", logps_before=(-1.0,))
    assert proof.check("w", (-1.0,)) == 0
    proof.check_moved("w", (-1.0,), (-1.0,))


def test_two_policies_that_hardly_differ_are_not_told_apart() -> None:
    """The engine is 3e-6 from the new one and 1e-6 from the one before: rounding of references, not stale weights."""
    proof = Proof(policy="b", logps=(-1.000003,), before="a", logps_before=(-1.000001,))
    assert proof.check("w", (-1.0,)) == pytest.approx(3e-6)
    proof.check_moved("w", (-1.0,), (-1.0,))


def test_mismatch_by_hand() -> None:
    """Two tokens at gaps of 0.5 and -0.25: k3 is e^g - 1 - g."""
    found = mismatch([[-1.0], [-2.0]], [[-0.5], [-2.25]])
    k3 = ((math.exp(0.5) - 1.5) + (math.exp(-0.25) - 0.75)) / 2
    assert found == {"num_tokens": 2, "mean": 0.375, "max": 0.5, "kl": pytest.approx(k3)}
    assert mismatch([[]], [[]]) == {"num_tokens": 0}
    assert math.isnan(mean_difference([], []))
