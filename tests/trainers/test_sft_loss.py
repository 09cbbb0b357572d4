"""The loss against closed forms and against transformers' own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sft_rows import Table, example, random_examples, write_rows

from reasonrun.errors import Finding
from reasonrun.records import Checkpoint, Segment, SFTExample
from reasonrun.trainers.examples import Sequences, read_rows, usable_rows
from reasonrun.trainers.sft_loss import SFTObjective

CPU = torch.device("cpu")


def rows_of(tmp_path: Path, *examples: SFTExample) -> Sequences:
    return read_rows([write_rows(tmp_path / "rows.parquet", examples)])


def losses(model: Any, rows: Sequences, reduction: Literal["token", "example"] = "token") -> torch.Tensor:
    batch = np.arange(len(rows))
    return SFTObjective(rows, reduction).losses(model, batch, batch, CPU).losses_B


# Position 0 gives token 1 the probability 3/4, position 1 gives every token 1/2.
HAND = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [5.0, -5.0]]])


def test_two_tokens_by_hand(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, example("a", [0], [1, 0]))
    assert losses(Table(HAND), rows).tolist() == pytest.approx([(math.log(4 / 3) + math.log(2)) / 2])


def test_segment_weight_times_example_weight_by_hand(tmp_path: Path) -> None:
    segments = (
        Segment(token_ids=(0,), src="gold", loss=False),
        Segment(token_ids=(1,), src="model", loss=True, weight=3.0),
        Segment(token_ids=(0,), src="model", loss=True, weight=-1.0),
    )
    rows = rows_of(tmp_path, SFTExample(problem_id="p", rollout_ids=("a",), segments=segments, weight=0.5))
    # The divisor is the number of learnt tokens, whatever they weigh.
    expected = 0.5 * (3 * math.log(4 / 3) - math.log(2)) / 2
    assert losses(Table(HAND), rows).tolist() == pytest.approx([expected])


def test_the_two_reductions_by_hand(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, example("a", [0], [1]), example("b", [0], [1, 0]))
    model = Table(HAND.repeat(2, 1, 1))
    one, two = math.log(4 / 3), math.log(4 / 3) + math.log(2)
    assert losses(model, rows, "token").tolist() == pytest.approx([one / 3, two / 3])
    assert losses(model, rows, "example").tolist() == pytest.approx([one / 2, two / 4])


def test_only_positions_that_predict_learnt_tokens_have_a_gradient(tmp_path: Path) -> None:
    masked = Segment(token_ids=(6, 7), src="tool", loss=False)
    answer = (
        Segment(token_ids=(4, 5), src="model", loss=True),
        masked,
        Segment(token_ids=(8,), src="model", loss=True),
    )
    prompt = Segment(token_ids=(1, 2, 3), src="gold", loss=False)
    rows = rows_of(
        tmp_path,
        SFTExample(problem_id="p", rollout_ids=("a",), segments=(prompt, *answer)),
        example("short", [1], [2]),
    )
    model = Table(torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0)))
    losses(model, rows).sum().backward()
    assert model.logits.grad is not None
    learnt_from = (model.logits.grad.abs().sum(dim=2) > 0).tolist()
    # Tokens 3, 4 and 7 of the first row, token 1 of the second: each is predicted one position before.
    assert learnt_from[0] == [False, False, True, True, False, False, True, False]
    assert learnt_from[1] == [True] + [False] * 7


def test_the_first_token_is_never_learnt_because_nothing_predicts_it(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, SFTExample(problem_id="p", rollout_ids=(), segments=(answer_segment(0, 1, 0),)))
    assert rows.num_learnt.tolist() == [2]
    assert rows.names == ("problem p",)
    assert losses(Table(HAND), rows).tolist() == pytest.approx([(math.log(4 / 3) + math.log(2)) / 2])


def answer_segment(*ids: int) -> Segment:
    return Segment(token_ids=ids, src="model", loss=True)


def load(start: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(start.path)


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_weights_one_and_minus_one_on_the_same_row_cancel(
    tmp_path: Path, start: Checkpoint, reduction: Literal["token", "example"]
) -> None:
    rows = rows_of(tmp_path, example("a", [5, 6], [7, 8, 9]), example("a", [5, 6], [7, 8, 9], weight=-1.0))
    model = load(start)
    of_each = losses(model, rows, reduction)
    assert abs(of_each.sum().item()) < 1e-6 < abs(of_each[0].item())
    alone = gradients(model, losses(model, rows, reduction)[0]).norm().item()
    assert gradients(model, of_each.sum()).norm().item() < 1e-5 * alone


def test_the_loss_is_linear_in_the_weights(tmp_path: Path, start: Checkpoint) -> None:
    model = load(start)
    plain = losses(model, rows_of(tmp_path, example("a", [5, 6], [7, 8, 9])))
    scaled = losses(model, rows_of(tmp_path, example("a", [5, 6], [7, 8, 9], weight=2.0, answer_weight=-1.5)))
    assert scaled.item() == pytest.approx(-3.0 * plain.item(), rel=1e-6)


def test_with_equal_weights_it_is_the_loss_of_transformers(tmp_path: Path, start: Checkpoint) -> None:
    rows = rows_of(tmp_path, *random_examples(6))
    model = load(start)
    total, count = 0.0, 0
    for row in range(len(rows)):
        here = rows.slice(row)
        ids = torch.from_numpy(rows.token_ids[here])[None]
        labels = torch.where(torch.from_numpy(rows.learnt[here])[None], ids, -100)
        num = int(rows.num_learnt[row])
        total += model(input_ids=ids, labels=labels).loss.item() * num
        count += num
    assert losses(model, rows).sum().item() == pytest.approx(total / count, abs=1e-6)


@pytest.mark.parametrize("reduction", ["token", "example"])
def test_accumulation_is_the_full_batch(
    tmp_path: Path, start: Checkpoint, reduction: Literal["token", "example"]
) -> None:
    rows = rows_of(tmp_path, *random_examples(8))
    model, objective, batch = load(start), SFTObjective(rows, reduction), np.arange(8)
    whole = gradients(model, losses(model, rows, reduction).sum())
    parts = [objective.losses(model, batch, micro, CPU).losses_B.sum() for micro in (batch[:3], batch[3:4], batch[4:])]
    assert (sum(gradients(model, part) for part in parts) - whole).abs().max().item() < 1e-6


@pytest.mark.promise("G17", "rows that cannot be learnt")
def test_rows_that_cannot_be_learnt_from_are_counted(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        example("long", [1] * 8, [2] * 3),
        example("fits", [1] * 7, [2] * 3),
        example("no-answer", [1, 2], []),
        example("last", [4], [5]),
    )
    kept, left_out = usable_rows(rows, max_length=10)
    assert left_out == {"num_too_long": 1, "num_without_loss": 1}
    assert kept.names == ("fits", "last")
    assert [kept.token_ids[kept.slice(i)].tolist() for i in range(2)] == [[1] * 7 + [2] * 3, [4, 5]]
    assert kept.learnt[kept.slice(1)].tolist() == [False, True]
    with pytest.raises(Finding) as caught:
        usable_rows(rows, max_length=1)
    assert caught.value.evidence == {"num_examples": 4, "num_too_long": 4, "num_without_loss": 0}


def test_an_empty_file_is_a_finding_too(tmp_path: Path) -> None:
    with pytest.raises(Finding, match="None of the 0"):
        usable_rows(rows_of(tmp_path), max_length=10)


def test_files_are_read_in_order(tmp_path: Path) -> None:
    paths = [write_rows(tmp_path / f"{name}.parquet", [example(name, [1], [2])]) for name in "ba"]
    assert read_rows(paths).names == ("b", "a")
