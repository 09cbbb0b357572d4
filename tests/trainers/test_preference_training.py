"""Training on pairs: what moves, what stays, and that a stopped step ends at the very same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sft_rows import Events, pair, random_examples, random_pairs, sha256

from reasonrun.errors import Finding, RecipeError
from reasonrun.records import Checkpoint, PreferenceExample
from reasonrun.trainers.preference import Preference
from reasonrun.trainers.sft import SFT
from reasonrun.training import TrainJob

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


class Interrupted(Exception):
    """Stands for whatever ends an attempt."""


def outputs(job: TrainJob) -> tuple[str, ...]:
    return tuple(sha256(path) for path in sorted(Path(job.out_dir).glob("[!c]*/*.safetensors")))


def flipped(examples: list[PreferenceExample]) -> list[PreferenceExample]:
    return [e.model_copy(update={"chosen_ids": e.rejected_ids, "rejected_ids": e.chosen_ids}) for e in examples]


def test_the_margin_grows_and_the_reference_stays(make_job: Any, start: Checkpoint, events: Events) -> None:
    before = {path: sha256(path) for path in Path(start.path).iterdir()}
    job = make_job(random_pairs(8), num_steps=12, checkpoint_every=6, job={"reference": start})
    result = Preference().train(job, events)
    logs = events.of("log")
    assert logs[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and logs[0]["reward_margin"] == pytest.approx(
        0, abs=1e-4
    )
    assert logs[-1]["reward_margin"] > 0.2 and logs[-1]["pair_accuracy"] == 1.0
    assert result.metrics["pair_accuracy"] == 1.0 and result.metrics["num_too_long"] == 0
    assert before == {path: sha256(path) for path in Path(start.path).iterdir()}
    stored = load_file(Path(job.out_dir) / "checkpoint-6" / "reference.safetensors")["logps"]
    # The first batch starts at the reference, so its policy log-probabilities are the stored ones.
    assert stored.shape == (2, 8) and min(stored[0]) <= logs[0]["chosen_logp"] <= max(stored[0])


def test_flipped_pairs_teach_the_opposite(make_job: Any, start: Checkpoint, events: Events) -> None:
    from transformers import AutoModelForCausalLM

    from reasonrun.trainers.examples import read_pairs
    from reasonrun.trainers.preference_loss import PreferenceObjective
    from reasonrun.training import PreferenceSettings

    examples = random_pairs(8)
    differences = []
    for out, rows in (("right", examples), ("flipped", flipped(examples))):
        job = make_job(rows, out=out, num_steps=12, job={"reference": start})
        Preference().train(job, events)
        objective = PreferenceObjective(
            read_pairs([*make_job(examples, out=f"{out}-as-given").rows]), PreferenceSettings()
        )
        model = AutoModelForCausalLM.from_pretrained(f"{job.out_dir}/final")
        with torch.no_grad():
            chosen, rejected, _ = objective.logps(model, np.arange(8), torch.device("cpu"))
        differences.append((chosen - rejected).sum().item())
    assert differences[0] > differences[1] + 10


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_resuming_is_exact(make_job: Any, start: Checkpoint, events: Events, lora: Any) -> None:
    def job(out: str, **fields: Any) -> TrainJob:
        made: TrainJob = make_job(
            random_pairs(10),
            out=out,
            num_steps=7,
            schedule="cosine",
            micro_batch_size=2,
            checkpoint_every=3,
            lora=lora,
            job={"reference": start, **fields},
        )
        return made

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "log" and event["step"] == 5:
            raise Interrupted

    whole, first = job("whole"), job("first")
    expected = Preference().train(whole, events)
    with pytest.raises(Interrupted):
        Preference().train(first, interrupt)
    torch.manual_seed(99)  # what is left in this process must not matter
    later = Events()
    second = job("second", resume_from=f"{first.out_dir}/checkpoint-3")
    result = Preference().train(second, later)
    assert later.of("log") == events.of("log")[3:]
    assert len(outputs(whole)) == 2 and outputs(second) == outputs(whole)
    assert result == expected


@pytest.mark.heavy
def test_two_processes_compute_the_same_step(make_job: Any, start: Checkpoint, events: Events) -> None:
    both = Events()
    Preference().train(make_job(random_pairs(8), out="one", num_steps=3, job={"reference": start}), events)
    two = make_job(random_pairs(8), out="two", num_steps=3, job={"reference": start, "num_processes": 2})
    Preference().train(two, both)
    for one, other in zip(events.of("log"), both.of("log"), strict=True):
        for name in ("loss", "chosen_logp", "rejected_logp", "reward_margin", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)


def test_a_reference_of_its_own_is_what_the_policy_is_compared_with(
    make_job: Any, start: Checkpoint, events: Events, tmp_path: Path
) -> None:
    moved = make_job(random_examples(8), out="sft", num_steps=5, lr=1e-2)
    SFT().train(moved, Events())
    other = Checkpoint(path=f"{moved.out_dir}/final", weights="moved", tokenizer="t", parent="w")

    def job(out: str, **fields: Any) -> TrainJob:
        made: TrainJob = make_job(
            random_pairs(4),
            out=out,
            num_steps=4,
            checkpoint_every=2,
            job={"start": other, "reference": start, **fields},
        )
        return made

    whole = job("whole")
    Preference().train(whole, events)
    assert abs(events.of("log")[0]["loss"] - np.log(2)) > 0.01
    resumed = job("resumed", resume_from=f"{whole.out_dir}/checkpoint-2")
    Preference().train(resumed, Events())
    assert outputs(resumed) == outputs(whole)


def test_without_a_reference_or_usable_pairs_it_says_so(make_job: Any, start: Checkpoint, events: Events) -> None:
    with pytest.raises(RecipeError, match="needs a reference model"):
        Preference().train(make_job(random_pairs(2), out="a"), events)
    with pytest.raises(Finding) as caught:
        Preference().train(make_job([pair("same", [1], [2], [2])], out="b", job={"reference": start}), events)
    assert caught.value.evidence["num_chosen_is_rejected"] == 1
    foreign = start.model_copy(update={"tokenizer": "other"})
    with pytest.raises(RecipeError, match="has another tokenizer"):
        Preference().train(make_job(random_pairs(2), out="c", job={"reference": foreign}), events)
