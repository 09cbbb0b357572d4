"""A stopped training step, resumed, ends at the very same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sft_rows import Events, random_examples, sha256

from reasonrun.trainers.sft import SFT
from reasonrun.training import TrainJob

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


def outputs(job: TrainJob) -> tuple[str, ...]:
    return tuple(sha256(path) for path in sorted(Path(job.out_dir).glob("[!c]*/*.safetensors")))


class Interrupted(Exception):
    """Stands for whatever ends an attempt."""


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_resuming_is_exact(make_job: Any, events: Events, lora: Any) -> None:
    def job(out: str, **fields: Any) -> TrainJob:
        made: TrainJob = make_job(
            random_examples(10),
            out=out,
            num_steps=7,
            schedule="cosine",
            micro_batch_size=2,
            checkpoint_every=3,
            lora=lora,
            job=fields,
        )
        return made

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "log" and event["step"] == 5:
            raise Interrupted

    whole, first = job("whole"), job("first")
    expected = SFT().train(whole, events)
    with pytest.raises(Interrupted):
        SFT().train(first, interrupt)
    torch.manual_seed(99)  # what is left in this process must not matter
    later = Events()
    second = job("second", resume_from=f"{first.out_dir}/checkpoint-3")
    result = SFT().train(second, later)
    assert [log["step"] for log in later.of("log")] == [4, 5, 6, 7]
    assert later.of("log") == events.of("log")[3:]
    assert len(outputs(whole)) == 2 and outputs(second) == outputs(whole)
    assert result == expected


def test_resuming_after_a_hard_exit_is_exact(make_job: Any, events: Events, tmp_path: Path) -> None:
    def job(out: str, **fields: Any) -> TrainJob:
        made: TrainJob = make_job(
            random_examples(10), out=out, num_steps=5, micro_batch_size=2, checkpoint_every=2, job=fields
        )
        return made

    whole, killed = job("whole"), job("killed")
    SFT().train(whole, events)
    (tmp_path / "job.json").write_text(killed.model_dump_json())
    program = (
        "import os, sys; from reasonrun.trainers.sft import SFT; from reasonrun.training import TrainJob\n"
        "job = TrainJob.model_validate_json(open(sys.argv[1]).read())\n"
        "SFT().train(job, lambda e: os._exit(9) if (e['event'], e['step']) == ('log', 4) else None)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "job.json")], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    # Step 4 was computed but its checkpoint never got its name.
    assert [path.name for path in Path(killed.out_dir).glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = job("resumed", resume_from=f"{killed.out_dir}/checkpoint-2")
    SFT().train(resumed, events)
    assert len(outputs(whole)) == 2 and outputs(resumed) == outputs(whole)


def test_a_checkpoint_is_announced_when_it_is_complete_and_holds_no_pickled_arguments(
    make_job: Any, events: Events
) -> None:
    seen = []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            seen.append({path.name for path in Path(event["path"]).iterdir()})

    SFT().train(make_job(random_examples(4), num_steps=3, checkpoint_every=2), look)
    needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert len(seen) == 1 and needed <= seen[0] and "training_args.bin" not in seen[0]
