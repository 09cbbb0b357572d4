"""Training in a worker process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasonrun.contracts import TrainEvents
from reasonrun.errors import OutOfMemory
from reasonrun.training import OptimizerSettings, Sharding, TrainJob, TrainResult
from reasonrun.workers import protocol
from reasonrun.workers.crew import Crew, CrewOwner, Limits
from reasonrun.workers.spawning import WorkerSpec
from reasonrun.workers.units import NUM_EXCUSED

_NUM_FUTILE_CRASHES = 2  # in a row, without a checkpoint between them; those from outside do not count


class TrainingWorker(CrewOwner):
    """A trainer in a worker process of its own, started when first needed and kept for the next job.

    Args:
        trainer_class_path: dotted path of the trainer's class, made without arguments in the worker.
        num_processes: how many processes the trainer starts for a job; replaces the job's own number when given.
        sharding: what these processes divide; replaces the job's own when given.
        attempt_dir: the log goes to ``attempt_dir/logs/training.log``.

    The other arguments are those of ``GenerationPool``. ``limits.stall_seconds`` is the longest time between two
    events, the first one included, which comes after the model is loaded.
    """

    def __init__(
        self,
        trainer_class_path: str,
        *,
        num_processes: int | None = None,
        sharding: Sharding | None = None,
        attempt_dir: Path,
        record_worker: Callable[[int, int], None],
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        through: Sequence[str] = (),
        limits: Limits | None = None,
        interrupted: Callable[[], int] = lambda: 0,
    ) -> None:
        spec = WorkerSpec(
            name="training",
            setup=protocol.Setup(role="training", class_path=trainer_class_path),
            attempt_dir=attempt_dir,
            record_worker=record_worker,
            python=python,
            env=env or {},
            through=tuple(through),
        )
        super().__init__(Crew([spec], limits or Limits(), interrupted))
        given = {"num_processes": num_processes, "sharding": sharding}
        self._given = {name: value for name, value in given.items() if value is not None}
        self._num_calls = 0

    def prestart(self) -> None:
        """Start the worker, if it does not run, without waiting."""
        self._crew.start_missing()

    def train(
        self, job: TrainJob, on_event: TrainEvents, *, retry: Callable[[], TrainJob] | None = None
    ) -> TrainResult:
        """Run ``job``; ``on_event`` receives the trainer's events in order, in this process, while it goes on.

        Args:
            retry: makes the job that takes over after a crash: an empty ``out_dir`` and the last committed checkpoint
                to resume from. Without it the first crash is final.

        Raises:
            OutOfMemory: there is no ``retry``. With it the job is tried again with forward passes of half the size, as often
                as that can be halved.
            WorkerCrash: the worker died or hung, and there is no ``retry``, or it did so twice of itself without a
                checkpoint in between.
            Stopped: ``interrupted()`` became true.
            ReasonrunError: whatever the trainer raised of these.
        """
        num_futile_crashes = num_excused = 0
        micro_batch_size: int | None = None
        while True:
            job = self._completed(job, micro_batch_size)
            try:
                answer, made_checkpoint = self._attempt(job, on_event)
            except OutOfMemory as error:
                if retry is None:
                    raise
                micro_batch_size = _half(job)
                on_event(_halved(error, micro_batch_size))
                job = retry()
                continue
            if isinstance(answer, TrainResult):
                return answer
            if made_checkpoint:
                num_futile_crashes = num_excused = 0
            if answer.from_outside and num_excused < NUM_EXCUSED:
                num_excused += 1
            else:
                num_futile_crashes += 1
            if retry is None or num_futile_crashes >= _NUM_FUTILE_CRASHES:
                raise answer
            job = retry()

    def _completed(self, job: TrainJob, micro_batch_size: int | None) -> TrainJob:
        settings = job.settings if micro_batch_size is None else {**job.settings, "micro_batch_size": micro_batch_size}
        return job.model_copy(update={**self._given, "settings": settings})

    def _attempt(self, job: TrainJob, on_event: TrainEvents) -> tuple[TrainResult | protocol.WorkerCrash, bool]:
        """The result, or the crash that ended the worker; and whether a checkpoint was made on the way."""
        made_checkpoint = False
        self.prestart()
        self._num_calls += 1
        self._crew.workers[0].send(protocol.Train(call=self._num_calls, job=job))
        try:
            while True:
                for _, item in self._crew.turn():
                    if isinstance(item, protocol.Event):
                        made_checkpoint = made_checkpoint or item.event.get("event") == "checkpoint"
                        on_event(item.event)
                    elif isinstance(item, protocol.WorkerCrash):
                        return item, made_checkpoint
                    elif isinstance(item, protocol.Trained):
                        return item.result, made_checkpoint
        except BaseException:
            # Whatever went wrong here, nobody waits for this job any more.
            self._crew.end_all()
            raise


def _half(job: TrainJob) -> int:
    """Half the rows that a forward pass of ``job`` took. A trainer that cannot fit a single one ends the job itself."""
    kept = {name: value for name, value in job.settings.items() if name in OptimizerSettings.model_fields}
    settings = OptimizerSettings.model_validate(kept)
    size = settings.micro_batch_size or math.ceil(settings.batch_size / job.num_processes)
    return math.ceil(size / 2)


def _halved(error: OutOfMemory, micro_batch_size: int) -> dict[str, Any]:
    return {
        "event": "note",
        "reason": "out_of_memory",
        "micro_batch_size": micro_batch_size,
        "text": f"{error.message} All processes start again from the last checkpoint, with"
        f" micro_batch_size={micro_batch_size}; batches and result are the same",
    }
