"""Learning from preference pairs: DPO and its relatives. Ids are used as stored: nothing is added or cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reasonrun.errors import RecipeError
from reasonrun.trainers.worker_trainer import WorkerTrainer
from reasonrun.training import OptimizerSettings, PreferenceSettings, TrainJob

if TYPE_CHECKING:
    from reasonrun.trainers.objective import Objective


class Preference(WorkerTrainer):
    """The trainer of kind ``preference``; rows are PreferenceExample.

    A step that is not the last of its solution gets no end-of-sequence token: whoever makes the pair decides what its
    continuations end with.
    """

    Settings = PreferenceSettings

    def prepare(self, job: TrainJob) -> tuple[OptimizerSettings, Objective, dict[str, int]]:
        """As in WorkerTrainer. Raises RecipeError when the job names no reference, or one with another tokenizer, or a
        pair carries a number that the loss does not read."""
        from reasonrun.trainers.examples import read_pairs, usable_pairs
        from reasonrun.trainers.preference_loss import PreferenceObjective, refuse_columns

        if job.reference is None:
            raise RecipeError(
                "a preference loss needs a reference model",
                hint='pass reference= to lab.train("preference", …), usually the checkpoint that sampled the pairs',
            )
        if job.reference.tokenizer != job.start.tokenizer:
            raise RecipeError(
                f"the reference {job.reference.path} has another tokenizer than the model to train ({job.start.path})",
                hint="take a reference of the same model family",
            )
        settings = PreferenceSettings.model_validate(job.settings)
        pairs, left_out = usable_pairs(read_pairs(job.rows), settings.max_length)
        refuse_columns(pairs, settings.loss)
        return settings, PreferenceObjective(pairs, settings), left_out
