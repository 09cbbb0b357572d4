"""StepTrainer for a model whose parts lie in several processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reasonrun.errors import OutOfMemory
from reasonrun.trainers import sharding
from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.step_trainer import StepTrainer

_SCHEDULER_FILE = "scheduler.pt"  # the Trainer's name


class ShardedStepTrainer(StepTrainer):
    """Every process runs the same number of passes, for each of them gathers weights; gradients arrive summed.

    A process that runs out of memory in the middle of a pass cannot repeat it: the others wait for it inside theirs. So
    the job ends with OutOfMemory and is started again from its last checkpoint with smaller passes.
    """

    def _passes(self, batch: Indexes) -> list[tuple[Indexes, bool]]:
        passes = super()._passes(batch)
        largest_share = math.ceil(len(batch) / self.args.world_size)
        num_passes = math.ceil(largest_share / self._pass_size(batch))
        shortest = np.argmin(self._objective.lengths[batch], keepdims=True)
        return passes + [(shortest, False)] * (num_passes - len(passes))

    def _accumulate(self, model: Any, batch: Indexes) -> tuple[torch.Tensor, int, bool]:
        sums_NS, num_padded_tokens, out_of_memory = super()._accumulate(model, batch)
        if out_of_memory:
            step, size = self.state.global_step, self._pass_size(batch)
            if size == 1:
                raise self._does_not_fit(step, batch)
            raise OutOfMemory(
                f"Out of memory at optimizer step {step + 1} with {size} examples in a forward pass.",
                hint=f"Set micro_batch_size={math.ceil(size / 2)}, or use more memory.",
            )
        return sums_NS, num_padded_tokens, False

    def _sum_gradients(self, model: Any) -> None:
        """They were summed, and divided among the processes, by the backward pass."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights are written with the moments."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        sharding.write_shard(self.model, self.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        sharding.read_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        sharding.read_optimizer(self.model, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER_FILE, weights_only=True))
        for group, lr in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
