"""Supervised fine-tuning on weighted, masked token sequences. Ids are used as stored: nothing is added or cut."""

from __future__ import annotations

from reasonrun.contracts import TrainEvents
from reasonrun.training import SFTSettings, TrainJob, TrainResult


class SFT:
    """The trainer of kind ``sft``; rows are SFTExample."""

    Settings = SFTSettings

    def __init__(self) -> None:
        from reasonrun.trainers import launch

        launch.prepare_environment()
        # These imports take seconds; a worker makes its trainer while the first samples are drawn.
        import reasonrun.trainers.execution
        import reasonrun.trainers.sft_loss  # noqa: F401

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        """Run the job, in several processes when it asks for them.

        Raises:
            Finding: no example can be learnt from.
            RunFailed: a loss or gradient is not finite, one example does not fit into memory, a process died.
        """
        from reasonrun.trainers import launch

        if job.num_processes > 1 and not launch.is_rank():
            return launch.train_in_processes("reasonrun.trainers.sft:SFT", job, events)

        from reasonrun.trainers.examples import read_rows, usable_rows
        from reasonrun.trainers.execution import run_job
        from reasonrun.trainers.sft_loss import SFTObjective

        settings = SFTSettings.model_validate(job.settings)
        rows, left_out = usable_rows(read_rows(job.rows), settings.max_length)
        return run_job(job, settings, SFTObjective(rows, settings.loss_reduction), events, left_out)
