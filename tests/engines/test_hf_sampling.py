"""Next tokens from logits, against values by hand and against transformers' filters."""

from __future__ import annotations

import pytest
import torch

from reasonrun.engines._sampling import choose, keep, token_logps
from reasonrun.records import Sampling


def drawn(logits_BV: torch.Tensor, uniforms: list[float], sampling: Sampling) -> list[int]:
    ids: list[int] = choose(logits_BV, torch.tensor(uniforms, dtype=torch.float64), sampling).tolist()
    return ids


@pytest.mark.parametrize(
    ("sampling", "uniforms", "expected"),
    [
        # 1/2, 1/4, 1/4
        (Sampling(), [0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2.0**-53], [0, 0, 1, 1, 2, 2]),
        # Temperature 1/2 squares them: 4/6, 1/6, 1/6.
        (Sampling(temperature=0.5), [0.66, 0.67, 0.83, 0.84], [0, 1, 1, 2]),
        (Sampling(top_k=1), [0.0, 0.99], [0, 0]),
        # The first token alone has 0.5, which reaches 0.5; for 0.51 all ties of the second are needed.
        (Sampling(top_p=0.5), [0.0, 0.99], [0, 0]),
        (Sampling(top_p=0.51), [0.49, 0.51, 0.76], [0, 1, 2]),
        (Sampling(temperature=0), [0.99, 0.99], [0, 0]),
    ],
)
def test_inverse_cdf_by_hand(sampling: Sampling, uniforms: list[float], expected: list[int]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(len(uniforms), 3)
    assert drawn(logits, uniforms, sampling) == expected


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0, -torch.inf]]).expand(4, 5)
    assert drawn(logits, [0.0, 0.5, 0.999, 1 - 2.0**-53], Sampling()) == [1, 1, 3, 3]


@pytest.mark.parametrize("vocab_size", [300, 5000])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=17), Sampling(top_p=0.9), Sampling(temperature=0.6, top_k=40, top_p=0.8), Sampling(top_p=0.999)],
)
def test_the_tokens_left_are_those_that_transformers_leaves(vocab_size: int, sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits_BV = torch.randn(6, vocab_size) * torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 8.0])[:, None]
    expected_BV = TemperatureLogitsWarper(sampling.temperature)(None, logits_BV)
    if sampling.top_k:
        expected_BV = TopKLogitsWarper(sampling.top_k)(None, expected_BV)
    expected_BV = TopPLogitsWarper(sampling.top_p)(None, expected_BV)
    kept_BV = keep(logits_BV / sampling.temperature, sampling)
    assert torch.equal(kept_BV, expected_BV)
    # Probed in the middle of its share of the unit interval, each of the likeliest tokens is drawn.
    probabilities_BV = expected_BV.double().softmax(-1)
    middles_BV = probabilities_BV.cumsum(-1) - probabilities_BV / 2
    probed = [(row, int(i)) for row in range(6) for i in probabilities_BV[row].topk(5).indices]
    probed = [(row, i) for row, i in probed if probabilities_BV[row, i] > 1e-4]
    assert len(probed) >= 12
    rows, ids = (list(side) for side in zip(*probed, strict=True))
    assert choose(logits_BV[rows], middles_BV[rows, ids], sampling).tolist() == ids


def test_a_row_does_not_depend_on_other_rows() -> None:
    torch.manual_seed(1)
    logits_BV = torch.randn(64, 3000)
    uniforms = torch.rand(64, dtype=torch.float64)
    sampling = Sampling(top_p=0.95, top_k=2000)
    alone = [int(choose(logits_BV[i : i + 1], uniforms[i : i + 1], sampling)) for i in range(64)]
    assert choose(logits_BV, uniforms, sampling).tolist() == alone


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.promise("G12", "poisoned logits")
def test_logits_that_are_not_finite_give_no_token(bad: float, temperature: float) -> None:
    logits_BV = torch.zeros(2, 4)
    logits_BV[1, 2] = bad
    ids = drawn(logits_BV, [0.1, 0.1], Sampling(temperature=temperature))
    assert ids == [0, -1]


def test_token_logps_by_hand() -> None:
    logits_BV = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -torch.inf, -torch.inf]])
    logps = token_logps(logits_BV, torch.tensor([3, 1])).tolist()
    assert logps == pytest.approx([-1.3862944, -0.6931472])
