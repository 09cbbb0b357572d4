"""What all trainers that run in worker processes have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from reasonrun.contracts import TrainEvents
from reasonrun.training import OptimizerSettings, TrainJob, TrainResult

if TYPE_CHECKING:
    from reasonrun.trainers.objective import Objective


class WorkerTrainer(ABC):
    """Prepares the process and runs a job, in several processes when it asks for them."""

    def __init__(self) -> None:
        self._num_tokens_told = 0  # by the processes of earlier jobs, and by those of the present one
        from reasonrun.trainers import launch

        launch.prepare_environment()
        # This import takes seconds; a worker makes its trainer while the first samples are drawn.
        import reasonrun.trainers.execution  # noqa: F401

    @property
    def num_tokens_made(self) -> int:
        """Tokens sampled so far: what shows that the job is alive between two optimizer steps."""
        return self._num_tokens_told

    @abstractmethod
    def prepare(self, job: TrainJob) -> tuple[OptimizerSettings, Objective, dict[str, int]]:
        """Settings, rows with their loss, and counts of the rows left out. Raises Finding when none is left."""

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        """Run the job.

        Raises:
            Finding: no example can be learnt from.
            RunFailed: a loss or gradient is not finite, one example does not fit into memory, a process died.
        """
        from reasonrun.trainers import launch

        if job.num_processes > 1 and not launch.is_rank():
            before = self._num_tokens_told

            def note_tokens(num_tokens: int) -> None:
                self._num_tokens_told = before + num_tokens

            name = f"{type(self).__module__}:{type(self).__qualname__}"
            return launch.train_in_processes(name, job, events, note_tokens)

        if launch.is_rank():
            launch.take_device()  # before prepare, which may load an engine
        from reasonrun.trainers.execution import run_job

        settings, objective, left_out = self.prepare(job)
        return run_job(job, settings, objective, events, left_out)
