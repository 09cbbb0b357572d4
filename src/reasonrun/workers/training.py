"""Training in a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from reasonrun.contracts import TrainEvents
from reasonrun.training import TrainJob, TrainResult
from reasonrun.workers import protocol
from reasonrun.workers.crew import NUM_DISPLACEMENTS, Crew, CrewOwner, Limits
from reasonrun.workers.spawning import WorkerSpec

_NUM_FUTILE_CRASHES = 2  # in a row, without a checkpoint between them


class TrainingWorker(CrewOwner):
    """A trainer in a worker process of its own, started when first needed and kept for the next job.

    Args:
        trainer_class_path: dotted path of the trainer's class, made without arguments in the worker.
        num_processes: how many processes the trainer starts for a job; replaces the job's own number when given.
        attempt_dir: the log goes to ``attempt_dir/logs/training.log``.

    The other arguments are those of ``GenerationPool``. ``limits.stall_seconds`` is the longest time between two
    events, the first one included, which comes after the model is loaded.
    """

    def __init__(
        self,
        trainer_class_path: str,
        *,
        num_processes: int | None = None,
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
        self._num_processes = num_processes
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
            WorkerCrash: the worker died or hung, and there is no ``retry``, or it did so twice without a checkpoint
                in between.
            Stopped: ``interrupted()`` became true.
            ReasonrunError: whatever the trainer raised of these.
        """
        num_futile_crashes = num_displacements = 0
        while True:
            answer, made_checkpoint = self._attempt(job, on_event)
            if isinstance(answer, TrainResult):
                return answer
            if answer.displaced and retry is not None and num_displacements < NUM_DISPLACEMENTS:
                num_displacements = 0 if made_checkpoint else num_displacements + 1
                job = retry()
                continue
            num_futile_crashes = 1 if made_checkpoint else num_futile_crashes + 1
            if retry is None or num_futile_crashes >= _NUM_FUTILE_CRASHES:
                raise answer
            job = retry()

    def _attempt(self, job: TrainJob, on_event: TrainEvents) -> tuple[TrainResult | protocol.WorkerCrash, bool]:
        """The result, or the crash that ended the worker; and whether a checkpoint was made on the way."""
        made_checkpoint = False
        self.prestart()
        self._num_calls += 1
        if self._num_processes is not None:
            job = job.model_copy(update={"num_processes": self._num_processes})
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
