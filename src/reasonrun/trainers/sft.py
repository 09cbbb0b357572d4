"""Supervised fine-tuning on weighted, masked token sequences. Ids are used as stored: nothing is added or cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reasonrun.trainers.worker_trainer import WorkerTrainer
from reasonrun.training import OptimizerSettings, SFTSettings, TrainJob

if TYPE_CHECKING:
    from reasonrun.trainers.objective import Objective


class SFT(WorkerTrainer):
    """The trainer of kind ``sft``; rows are SFTExample."""

    Settings = SFTSettings

    def prepare(self, job: TrainJob) -> tuple[OptimizerSettings, Objective, dict[str, int]]:
        from reasonrun.trainers.examples import read_rows, usable_rows
        from reasonrun.trainers.sft_loss import SFTObjective

        settings = SFTSettings.model_validate(job.settings)
        rows, left_out = usable_rows(read_rows(job.rows), settings.max_length)
        return settings, SFTObjective(rows, settings.loss_reduction), left_out
