"""A training job in a worker: events, result, crashes with and without a checkpoint to go on from."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_stubs import make_checkpoint

from reasonrun.errors import Finding, OutOfMemory, Stopped
from reasonrun.training import TrainJob
from reasonrun.workers import crew
from reasonrun.workers.pool import Limits, TrainingWorker
from reasonrun.workers.protocol import WorkerCrash


def make_job(*, num_steps: int = 6, resume_from: str | None = None, **settings: object) -> TrainJob:
    return TrainJob(
        kind="sft",
        rows=(),
        start=make_checkpoint(),
        settings=settings,
        num_steps=num_steps,
        seed=0,
        out_dir="/out",
        resume_from=resume_from,
    )


@pytest.fixture
def worker_options(tmp_path: Path, started: list[int]) -> dict[str, Any]:
    return {"attempt_dir": tmp_path, "record_worker": lambda pid, pgid: started.append(pgid)}


@pytest.fixture
def worker(worker_options: dict[str, Any]) -> Iterator[TrainingWorker]:
    limits = Limits(stall_seconds=1.2)
    with TrainingWorker("worker_stubs.StubTrainer", limits=limits, **worker_options) as worker:
        yield worker


def steps_of(events: list[dict[str, Any]], kind: str) -> list[int]:
    return [event["step"] for event in events if event["event"] == kind]


def test_events_in_order_result_and_one_process_for_two_jobs(worker: TrainingWorker) -> None:
    events: list[dict[str, Any]] = []
    first = worker.train(make_job(checkpoint_every=4), events.append)
    second = worker.train(make_job(num_steps=2), events.append)
    assert steps_of(events, "log") == [1, 2, 3, 4, 5, 6, 1, 2]
    assert steps_of(events, "checkpoint") == [4]
    assert math.isnan(events[0]["loss"])
    assert events[1]["loss"] == 0.5
    assert (first.num_steps, second.num_steps) == (6, 2)
    assert first.metrics["pid"] == second.metrics["pid"] != os.getpid()
    assert worker.num_starts == 1


def test_launcher_decides_the_number_of_processes_and_what_they_divide(worker_options: dict[str, Any]) -> None:
    job = make_job(num_steps=1)
    with TrainingWorker("worker_stubs.StubTrainer", num_processes=3, sharding="fsdp", **worker_options) as worker:
        metrics = worker.train(job, lambda event: None).metrics
    assert (metrics["num_processes"], metrics["is_sharded"]) == (3, 1)


@pytest.mark.promise("G11", "out of memory")
def test_processes_that_cannot_halve_by_themselves_start_again_with_less_at_a_time(
    worker_options: dict[str, Any],
) -> None:
    events: list[dict[str, Any]] = []
    wanted: dict[str, Any] = {"batch_size": 9, "checkpoint_every": 4, "crash_at": 6, "trouble": "memory"}

    def retry() -> TrainJob:
        return make_job(resume_from="/out/checkpoint-4", crash_on_resume=True, **wanted)

    with TrainingWorker("worker_stubs.StubTrainer", num_processes=2, **worker_options) as worker:
        assert worker.train(make_job(**wanted), events.append, retry=retry).num_steps == 6
        # Of nine rows one process takes five, then three, two, one at a time.
        assert [event["micro_batch_size"] for event in events if event["event"] == "note"] == [3, 2, 1]
        assert steps_of(events, "log") == [1, 2, 3, 4, 5, 5, 5, 5, 6]
        with pytest.raises(OutOfMemory):
            worker.train(make_job(**wanted), events.append)


def test_crash_is_final_without_a_retry(worker: TrainingWorker) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(WorkerCrash, match=r"ended with status 9[\s\S]*last words"):
        worker.train(make_job(crash_at=3, trouble="exit"), events.append)
    assert steps_of(events, "log") == [1, 2]


def test_crash_goes_on_from_the_checkpoint_that_retry_names(worker: TrainingWorker) -> None:
    events: list[dict[str, Any]] = []

    def retry() -> TrainJob:
        assert steps_of(events, "checkpoint") == [4]
        return make_job(checkpoint_every=4, resume_from="/out/checkpoint-4")

    job = make_job(checkpoint_every=4, crash_at=6, trouble="sigkill")
    assert worker.train(job, events.append, retry=retry).num_steps == 6
    assert steps_of(events, "log") == [1, 2, 3, 4, 5, 5, 6]
    assert worker.num_starts == 2


@pytest.mark.promise("G10", "crashing workers")
def test_two_crashes_without_a_checkpoint_between_are_final(worker: TrainingWorker) -> None:
    retried: list[int] = []

    def retry() -> TrainJob:
        retried.append(1)
        return make_job(crash_at=5, crash_on_resume=True, trouble="exit", resume_from="/out/checkpoint-4")

    with pytest.raises(WorkerCrash):
        worker.train(make_job(crash_at=5, checkpoint_every=4, trouble="exit"), lambda event: None, retry=retry)
    assert len(retried) == 1


@pytest.mark.promise("G10", "hanging workers")
def test_training_that_hangs_is_ended_with_its_stacks(worker: TrainingWorker, tmp_path: Path) -> None:
    with pytest.raises(WorkerCrash, match=r"made no progress for 1\.2 s[\s\S]*in hang_in_python"):
        worker.train(make_job(crash_at=2, trouble="hang"), lambda event: None)
    assert "hang_in_python" in (tmp_path / "logs/training.log").read_text(errors="replace")


def test_finding_of_a_trainer_arrives(worker: TrainingWorker) -> None:
    with pytest.raises(Finding) as caught:
        worker.train(make_job(crash_at=1, trouble="finding"), lambda event: None)
    assert caught.value.evidence == {"wrong": 3, "share": 0.5}


@pytest.mark.promise("G9", "stops of busy workers")
@pytest.mark.promise("G10", "stops of busy workers")
def test_stop_ends_training_with_the_code_of_the_signal(worker_options: dict[str, Any]) -> None:
    events: list[dict[str, Any]] = []
    options = {**worker_options, "interrupted": lambda: 130 if events else 0}
    with TrainingWorker("worker_stubs.StubTrainer", **options) as worker, pytest.raises(Stopped) as caught:
        worker.train(make_job(num_steps=1000, seconds=0.05), events.append)
    assert caught.value.exit_code == 130
    assert len(events) < 20


def test_what_a_trainer_reports_right_before_its_failure_arrives(
    worker: TrainingWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both messages in one read, which takes a supervisor that was busy."""
    events: list[dict[str, Any]] = []
    exchange = crew.exchange

    def late(workers: Any, seconds: float) -> None:
        time.sleep(0.3)
        exchange(workers, seconds)

    monkeypatch.setattr(crew, "exchange", late)
    with pytest.raises(Finding):
        worker.train(make_job(crash_at=3, trouble="finding"), events.append)
    assert steps_of(events, "log") == [1, 2]
