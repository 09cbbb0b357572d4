"""What is not finite or does not fit into memory: never stepped, never hidden, always explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_rows import Events, random_examples, weights_of

from reasonrun.errors import RunFailed
from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.sft import SFT
from reasonrun.trainers.sft_loss import SFTObjective


@pytest.mark.promise("G12", "poisoned rows")
def test_a_poisoned_row_stops_the_run_and_is_named(make_job: Any, events: Events) -> None:
    examples = random_examples(12)
    examples[7] = examples[7].model_copy(update={"weight": float("inf")})
    job = make_job(examples, num_steps=9, checkpoint_every=1)
    with pytest.raises(RunFailed, match=r"loss is not finite at optimizer step (\d+).*Examples: r7\.") as caught:
        SFT().train(job, events)
    # Everything before that step was finite, logged and kept; nothing of it or later was.
    step = int(caught.value.message.split("step ")[1].split(";")[0])
    assert [log["step"] for log in events.of("log")] == list(range(1, step))
    assert [event["step"] for event in events.of("checkpoint")] == list(range(1, step))
    assert not (Path(job.out_dir) / "final").exists()


class CallLossesThen:
    """Replaces the loss by itself and something more."""

    def __init__(self, after: Any) -> None:
        self.original = SFTObjective.losses
        self.after = after

    def __call__(self, objective: SFTObjective, model: Any, batch: Indexes, micro: Indexes, device: Any) -> Any:
        computed = self.original(objective, model, batch, micro, device)
        return replace(computed, losses_B=self.after(computed.losses_B, model, micro))


def replace_losses(monkeypatch: pytest.MonkeyPatch, after: Any) -> None:
    call = CallLossesThen(after)
    monkeypatch.setattr(SFTObjective, "losses", lambda *arguments: call(*arguments))


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.promise("G12", "poisoned gradients")
def test_a_gradient_that_is_not_finite_is_never_stepped(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch, max_grad_norm: float
) -> None:
    # The square root of zero is finite, its slope is not.
    replace_losses(monkeypatch, lambda losses, model, micro: losses + (next(model.parameters()).sum() * 0).abs().sqrt())
    job = make_job(random_examples(4), max_grad_norm=max_grad_norm, checkpoint_every=1)
    with pytest.raises(RunFailed, match=r"gradient is not finite at optimizer step 1;.*r0"):
        SFT().train(job, events)
    assert not events and not (Path(job.out_dir) / "final").exists()


@pytest.mark.promise("G11", "out of memory")
def test_out_of_memory_halves_the_forward_pass_and_repeats_the_step(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = random_examples(10)
    plain = make_job(examples, out="plain", lr=1e-4, batch_size=6)
    expected = SFT().train(plain, Events())

    def fits_two(losses: torch.Tensor, model: Any, micro: Indexes) -> torch.Tensor:
        # Gradients of passes that went well before the failure must not be counted twice.
        if len(micro) > 2:
            losses.sum().backward()
            raise torch.OutOfMemoryError("injected")
        return losses

    replace_losses(monkeypatch, fits_two)
    job = make_job(examples, out="tight", lr=1e-4, batch_size=6)
    result = SFT().train(job, events)
    assert [(e["reason"], e["step"], e["micro_batch_size"]) for e in events.of("note")] == [
        ("out_of_memory", 1, 3),
        ("out_of_memory", 1, 2),
    ]
    for name, weight in weights_of(Path(plain.out_dir) / "final").items():
        assert torch.allclose(weight, weights_of(Path(job.out_dir) / "final")[name], atol=1e-6), name
    assert result.num_tokens == expected.num_tokens


@pytest.mark.promise("G11", "out of memory")
def test_a_single_example_that_does_not_fit_is_explained(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(losses: torch.Tensor, model: Any, micro: Indexes) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    replace_losses(monkeypatch, never)
    with pytest.raises(RunFailed, match=r"single example does not fit.*\n.*gradient_checkpointing"):
        SFT().train(make_job(random_examples(4)), events)
    assert [event["micro_batch_size"] for event in events] == [2, 1]


@pytest.mark.promise("G11", "other errors")
def test_other_errors_are_not_taken_for_out_of_memory(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(losses: torch.Tensor, model: Any, micro: Indexes) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    replace_losses(monkeypatch, broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        SFT().train(make_job(random_examples(4)), events)
    assert not events
