"""The pair losses against values worked out by hand, and against TRL's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sft_rows import Table, pair, random_pairs, write_rows

from reasonrun.errors import Finding, RecipeError
from reasonrun.records import Checkpoint, PreferenceExample
from reasonrun.trainers.examples import Pairs, read_pairs, usable_pairs
from reasonrun.trainers.objective import Fixed
from reasonrun.trainers.preference_loss import PreferenceObjective, pair_losses, refuse_columns
from reasonrun.training import PreferenceSettings

CPU = torch.device("cpu")


def pairs_of(tmp_path: Path, *examples: PreferenceExample) -> Pairs:
    return read_pairs([write_rows(tmp_path / "rows.parquet", examples)])


def loss(kind: str, chosen: float, rejected: float, beta: float = 0.1, **columns: float) -> float:
    column = {"margin": 0.0, "smoothing": 0.0, "win_probability": 1.0, **columns}
    settings = PreferenceSettings(loss=kind, beta=beta)
    given = [torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, *column.values())]
    return pair_losses(settings, *given).item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_equal_log_ratios_give_ln_2() -> None:
    assert loss("sigmoid", 3.0, 3.0) == pytest.approx(math.log(2))
    assert loss("sigmoid", 3.0, 3.0, smoothing=0.3) == pytest.approx(math.log(2))
    assert loss("sigmoid", 3.0, 3.0, win_probability=0.2) == pytest.approx(math.log(2))


def test_each_loss_by_hand() -> None:
    # d = 4 - (-1) = 5 and beta = 0.2, so h = 1 without a margin.
    def at(kind: str, **columns: float) -> float:
        return loss(kind, 4.0, -1.0, 0.2, **columns)

    assert at("sigmoid") == pytest.approx(-math.log(sigmoid(1.0)))
    assert at("sigmoid", margin=0.4) == pytest.approx(-math.log(sigmoid(0.6)))
    assert at("sigmoid", smoothing=0.1) == pytest.approx(-0.9 * math.log(sigmoid(1)) - 0.1 * math.log(sigmoid(-1)))
    # P = 0.8 and s = 0.1: p = 0.8 * 0.9 + 0.2 * 0.1 = 0.74.
    assert at("sigmoid", win_probability=0.8, smoothing=0.1) == pytest.approx(
        -0.74 * math.log(sigmoid(1)) - 0.26 * math.log(sigmoid(-1))
    )
    assert at("robust", smoothing=0.1) == pytest.approx(
        (-0.9 * math.log(sigmoid(1)) + 0.1 * math.log(sigmoid(-1))) / 0.8
    )
    assert at("hinge") == pytest.approx(0.0) and at("hinge", margin=0.4) == pytest.approx(0.4)
    assert at("ipo") == pytest.approx((5 - 2.5) ** 2) and at("ipo", margin=0.4) == pytest.approx((5 - 2 - 2.5) ** 2)
    # (P - 1/2) / beta is 2.5, and 1 for P = 0.7.
    assert at("sppo") == pytest.approx((4 - 2.5) ** 2 + (-1 + 2.5) ** 2)
    assert at("sppo", win_probability=0.7) == pytest.approx((4 - 1) ** 2 + (-1 + 1) ** 2)


def test_a_flipped_pair_has_another_loss() -> None:
    for kind in ("sigmoid", "robust", "hinge", "ipo", "sppo"):
        assert loss(kind, 4.0, -1.0, 0.2) < loss(kind, -1.0, 4.0, 0.2)


def test_log_probabilities_are_sums_over_the_continuation_alone(tmp_path: Path) -> None:
    # After token 0 the next one is 1 with probability 3/4; everything else is 1/2. Rows: chosen, then rejected.
    logits = torch.zeros(2, 4, 2)
    logits[:, 1, 1] = math.log(3.0)
    objective = PreferenceObjective(pairs_of(tmp_path, pair("a", [0, 0], [1, 0], [0])), PreferenceSettings())
    chosen, rejected, num_tokens = objective.logps(Table(logits), np.array([0]), CPU)
    assert chosen.item() == pytest.approx(math.log(3 / 4) + math.log(1 / 2))
    assert rejected.item() == pytest.approx(math.log(1 / 4))
    assert num_tokens == 8


def fixed(model: Any, num_rows: int, load_reference: Any = None) -> Fixed:
    return Fixed(
        start=model,
        start_is_reference=load_reference is None,
        load_reference=load_reference,
        resume_from=None,
        rows=np.arange(num_rows),
        tell=lambda text: None,
    )


def started(model: Any, pairs: Pairs, **settings: Any) -> PreferenceObjective:
    objective = PreferenceObjective(pairs, PreferenceSettings(**settings))
    objective.begin(fixed(model, len(pairs)))
    return objective


def test_the_shared_prefix_gets_no_gradient(tmp_path: Path) -> None:
    model = Table(torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)))
    objective = started(model, pairs_of(tmp_path, pair("a", [1, 2, 3], [4, 5, 6], [7])))
    batch = np.array([0])
    objective.losses(model, batch, batch, CPU).losses_B.sum().backward()
    assert model.logits.grad is not None
    learnt_from = (model.logits.grad.abs().sum(dim=2) > 0).tolist()
    assert learnt_from == [[False, False, True, True, True, False], [False, False, True, False, False, False]]


def load(start: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(start.path)


def test_the_first_loss_is_ln_2_times_the_weight(tmp_path: Path, start: Checkpoint) -> None:
    model = load(start)
    examples = [*random_pairs(5), pair("w", [3, 4], [5, 6], [7], weight=-2.0)]
    objective, batch = started(model, pairs_of(tmp_path, *examples)), np.arange(6)
    computed = objective.losses(model, batch, batch, CPU)
    expected = [weight * math.log(2) / 6 for weight in (1, 1, 1, 1, 1, -2.0)]
    assert computed.losses_B.tolist() == pytest.approx(expected, abs=1e-6)
    assert dict(zip(objective.statistics, computed.statistics, strict=True))["reward_margin"].abs().max() < 1e-5


def test_the_added_nll_is_that_of_the_chosen_tokens(tmp_path: Path, start: Checkpoint) -> None:
    model = load(start)
    objective, batch = started(model, pairs_of(tmp_path, *random_pairs(4)), nll_weight=0.5), np.arange(4)
    chosen, _, _ = objective.logps(model, batch, CPU)
    means = -chosen.detach().numpy() / objective.pairs.chosen.num_learnt
    got = objective.losses(model, batch, batch, CPU).losses_B.tolist()
    assert got == pytest.approx(((math.log(2) + 0.5 * means) / 4).tolist(), abs=1e-6)


def test_accumulation_is_the_full_batch(tmp_path: Path, start: Checkpoint) -> None:
    model, batch = load(start), np.arange(6)
    objective = started(model, pairs_of(tmp_path, *random_pairs(6)))
    whole = objective.losses(model, batch, batch, CPU).losses_B
    parts = [objective.losses(model, batch, micro, CPU).losses_B for micro in (batch[:1], batch[1:4], batch[4:])]
    assert torch.cat(parts).tolist() == pytest.approx(whole.tolist(), abs=1e-7)


@pytest.mark.parametrize(("kind", "theirs"), [("sigmoid", "sigmoid"), ("robust", "robust"), ("hinge", "hinge")])
def test_gradients_are_those_of_trl(tmp_path: Path, start: Checkpoint, kind: str, theirs: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    examples, smoothing = random_pairs(4), 0.1 if kind == "robust" else 0.0
    reference, model = load(start), load(start)
    with torch.no_grad():  # away from the reference, where the losses differ
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    pairs = pairs_of(tmp_path, *(example.model_copy(update={"smoothing": smoothing}) for example in examples))
    objective = PreferenceObjective(pairs, PreferenceSettings(loss=kind, beta=0.3))
    objective.begin(fixed(model, 4, lambda: reference))
    batch = np.arange(4)
    objective.losses(model, batch, batch, CPU).losses_B.sum().backward()
    own = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()

    class Untouched(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    rows = [
        {"prompt_ids": [*e.prefix_ids], "chosen_ids": [*e.chosen_ids], "rejected_ids": [*e.rejected_ids]}
        for e in examples
    ]
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=0.3,
        loss_type=[theirs],
        label_smoothing=smoothing,
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        remove_unused_columns=False,
    )
    tokenizer = SimpleTokenizer.make()
    trainer = Untouched(
        model=model, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    collated = trainer.data_collator(rows)
    trainer.compute_loss(model, collated).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (own - expected).abs().max().item() < 1e-5 * expected.abs().max().item() + 1e-7


class SimpleTokenizer:
    @staticmethod
    def make() -> Any:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {f"w{i}": i for i in range(62)} | {"<pad>": 62, "<eos>": 63}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="<eos>"
        )


@pytest.mark.promise("G17", "rows that cannot be learnt")
def test_pairs_that_cannot_be_learnt_from_are_counted(tmp_path: Path) -> None:
    pairs = pairs_of(
        tmp_path,
        pair("long", [1] * 8, [2] * 3, [3]),
        pair("equal", [1], [2, 3], [2, 3]),
        pair("empty", [1], [], [2]),
        pair("fits", [1] * 7, [2] * 3, [4]),
    )
    kept, left_out = usable_pairs(pairs, max_length=10)
    assert left_out == {"num_too_long": 1, "num_without_loss": 1, "num_chosen_is_rejected": 1}
    assert kept.chosen.names == ("fits",)
    assert kept.rejected.token_ids.tolist() == [1] * 7 + [4]
    with pytest.raises(Finding, match="None of the 4"):
        usable_pairs(pairs, max_length=1)


def test_a_number_that_the_loss_would_ignore_is_refused(tmp_path: Path) -> None:
    soft = pairs_of(tmp_path, pair("a", [1], [2], [3]), pair("b", [1], [2], [3], win_probability=0.6))
    refuse_columns(soft, "sppo")
    with pytest.raises(RecipeError, match="1 pairs have a win probability, which the loss ipo does not read"):
        refuse_columns(soft, "ipo")
    with pytest.raises(RecipeError, match="have a margin, which the loss sppo"):
        refuse_columns(pairs_of(tmp_path, pair("a", [1], [2], [3], margin=0.1)), "sppo")
    with pytest.raises(RecipeError, match=r"smoothing outside 0 to 0\.5"):
        refuse_columns(pairs_of(tmp_path, pair("a", [1], [2], [3], smoothing=0.5)), "robust")
