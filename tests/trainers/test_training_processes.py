"""Several processes on one machine: the same weights, and nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sft_rows import Events, random_examples, weights_of

from reasonrun.errors import Finding, RunFailed
from reasonrun.trainers import launch
from reasonrun.trainers.sft import SFT


@pytest.mark.heavy
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_two_processes_end_at_the_weights_of_one_and_resume(make_job: Any, events: Events, lora: Any) -> None:
    # Batches of three: the two processes get different numbers of rows and of forward passes.
    settings = {"batch_size": 3, "micro_batch_size": 1, "checkpoint_every": 2, "num_steps": 5, "lr": 1e-4, "lora": lora}
    one = make_job(random_examples(10), out="one", **settings)
    two = make_job(random_examples(10), out="two", job={"num_processes": 2}, **settings)
    alone = Events()
    expected = SFT().train(one, alone)
    result = SFT().train(two, events)
    final = weights_of(Path(two.out_dir) / "final")
    for name, weight in weights_of(Path(one.out_dir) / "final").items():
        assert torch.allclose(weight, final[name], atol=1e-5), name
    assert [event["step"] for event in events.of("log")] == [1, 2, 3, 4, 5]
    assert [e["loss"] for e in events.of("log")] == pytest.approx([e["loss"] for e in alone.of("log")], abs=1e-5)
    assert (result.num_tokens, result.metrics.keys()) == (expected.num_tokens, expected.metrics.keys())
    assert [Path(event["path"]).name for event in events.of("checkpoint")] == ["checkpoint-2", "checkpoint-4"]

    if lora is None:
        resume = {"num_processes": 2, "resume_from": f"{two.out_dir}/checkpoint-2"}
        again = make_job(random_examples(10), out="again", job=resume, **settings)
        assert SFT().train(again, Events()) == result
        resumed = weights_of(Path(again.out_dir) / "final")
        assert all(torch.equal(weight, resumed[name]) for name, weight in final.items())


def rank_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> str:
    """A trainer for the child processes, without torch; ``rank`` is theirs."""
    module = tmp_path / "stub_trainer.py"
    module.write_text(
        "import os, signal, sys, time\n"
        "from reasonrun.errors import Finding\n"
        "from reasonrun.training import TrainResult\n"
        "rank = int(os.environ['RANK'])\n"
        f"class Stub:\n    def train(self, job, events):\n{body}"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return "stub_trainer:Stub"


def test_every_process_ends_when_the_parent_is_killed(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = "        events({'event': 'log', 'step': 1})\n        while True: pass\n"
    trainer = rank_program(monkeypatch, tmp_path, body)
    job = make_job(random_examples(1), job={"num_processes": 2})
    (tmp_path / "job.json").write_text(job.model_dump_json())
    program = (
        "import sys; from reasonrun.trainers import launch; from reasonrun.training import TrainJob\n"
        "job = TrainJob.model_validate_json(open(sys.argv[1]).read())\n"
        f"launch.train_in_processes({trainer!r}, job, lambda e: print(e['step'], flush=True))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "job.json")], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"1\n"
    ranks = psutil.Process(parent.pid).children(recursive=True)
    # A signal to the group reaches them, and so does the death of the parent alone, which is the harder case.
    assert [os.getpgid(rank.pid) for rank in ranks] == [parent.pid] * 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    for rank in alive:
        rank.kill()
    assert (len(gone), alive) == (2, [])


def test_events_of_the_first_process_and_its_result_are_relayed(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = (
        "        events({'event': 'log', 'step': rank + 1, 'text': 'x' * 200_000})\n"
        "        return TrainResult(num_steps=1, num_tokens=2, num_padded_tokens=3, metrics={'rank': rank})\n"
    )
    job = make_job(random_examples(1), job={"num_processes": 3})
    result = launch.train_in_processes(rank_program(monkeypatch, tmp_path, body), job, events)
    assert [(event["step"], len(event["text"])) for event in events] == [(1, 200_000)]
    assert result.metrics == {"rank": 0.0}


def test_tokens_of_a_long_sampling_are_told_before_any_event(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = (
        "        for self.num_tokens_made in (10, 25):\n"
        "            time.sleep(1.3)\n"
        "        events({'event': 'log', 'step': 1})\n"
        "        return TrainResult(num_steps=1, num_tokens=2, num_padded_tokens=3, metrics={})\n"
    )
    told: list[int] = []
    job = make_job(random_examples(1), job={"num_processes": 2})
    launch.train_in_processes(rank_program(monkeypatch, tmp_path, body), job, events, told.append)
    assert told == [10, 25]
    assert [event["event"] for event in events] == ["log"]


def test_an_error_keeps_its_class_although_another_process_fails_first(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = (
        "        time.sleep(1.0 if rank == 0 else 0.0)\n"
        "        raise Finding('nothing to learn', evidence={'num_too_long': 4}, hint='look')\n"
    )
    with pytest.raises(Finding, match="nothing to learn") as caught:
        job = make_job(random_examples(1), job={"num_processes": 2})
        launch.train_in_processes(rank_program(monkeypatch, tmp_path, body), job, events)
    assert (caught.value.evidence, caught.value.hint) == ({"num_too_long": 4}, "look")


def test_a_process_that_dies_ends_the_others_and_its_log_is_shown(
    make_job: Any, events: Events, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.5)
    body = (
        "        if rank == 1:\n"
        "            print('the last words', file=sys.stderr, flush=True)\n"
        "            os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        time.sleep(600)\n"
    )
    began = time.monotonic()
    with pytest.raises(RunFailed, match=rf"process 1 of 2 ended with code -{int(signal.SIGSEGV)}.*\n.*the last words"):
        job = make_job(random_examples(1), job={"num_processes": 2})
        launch.train_in_processes(rank_program(monkeypatch, tmp_path, body), job, events)
    assert time.monotonic() - began < 20
    assert not [child for child in psutil.Process().children() if "stub_trainer" in " ".join(child.cmdline())]
