"""One optimizer step at a time on transformers.Trainer: micro-batches, processes, memory and guards."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from reasonrun.contracts import TrainEvents
from reasonrun.errors import RunFailed
from reasonrun.trainers.batches import Indexes, micro_batches, share_of_rank
from reasonrun.trainers.folders import commit_folder
from reasonrun.trainers.objective import Objective, is_out_of_memory
from reasonrun.trainers.sharding import whole

_MAX_NAMED_ROWS = 20
# Gradients are summed over processes in pieces of about this many elements: few messages, little extra memory.
_ALL_REDUCE_ELEMENTS = 16 * 2**20


class StepTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A transformers.Trainer whose unit is the optimizer batch.

    One item of its loader is one planned batch; ``training_step`` cuts it into forward passes, sums gradients over
    processes and repeats the whole batch in smaller pieces when memory runs out. Gradients are summed here rather
    than by DistributedDataParallel, because all processes must first agree that none of them ran out of memory.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: TrainingArguments,
        objective: Objective,
        num_steps: int,
        micro_batch_size: int,
        checkpoint_every: int,
        out_dir: Path,
        events: TrainEvents,
    ) -> None:
        every = math.ceil(checkpoint_every / objective.steps_per_checkpoint) * objective.steps_per_checkpoint
        super().__init__(model=model, args=args, callbacks=[_Checkpoints(every, num_steps)])
        self.remove_callback(PrinterCallback)
        # Prepared as for evaluation: mixed precision, but no wrapper that sums gradients (see above).
        self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self._objective = objective
        self._num_steps = num_steps
        self._batch: Indexes = np.empty(0, dtype=np.int64)  # of the optimizer step at hand
        self._micro_batch_size = micro_batch_size  # 0 takes the whole share
        self._out_dir = out_dir
        self._events = events if args.process_index == 0 else _ignore
        self._counts: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item per optimizer step: its number."""
        steps = [{"step": step} for step in range(self._num_steps)]
        return DataLoader(cast(Any, steps), batch_size=1, collate_fn=_only)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of one optimizer batch, complete and summed over processes.

        Raises:
            RunFailed: the loss is not finite, or one example does not fit into memory.
        """
        model.train()
        batch = self._batch = self._objective.batch(inputs["step"])
        while True:
            sums_NS, num_padded_tokens, out_of_memory = self._agree(*self._accumulate(model, batch))
            if not out_of_memory:
                break
            self._halve(inputs["step"], batch)
            model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        losses_N = sums_NS[:, 0]
        finite_N = torch.isfinite(losses_N)
        if not bool(finite_N.all()):
            raise self._not_finite("loss", batch[~finite_N.numpy()].tolist())
        self._sum_gradients(model)
        self._counts = {"num_tokens": self._objective.num_tokens(batch), "num_padded_tokens": num_padded_tokens}
        means = sums_NS[:, 1:].mean(dim=0).tolist()
        self._counts |= dict(zip(self._objective.statistics, means, strict=True)) | self._objective.step_statistics()
        return losses_N.sum().to(self.args.device)

    def _accumulate(self, model: Any, batch: Indexes) -> tuple[torch.Tensor, int, bool]:
        """Forward and backward passes over this process's share: loss and statistics by position in the batch (N, 1 + S),
        tokens, failure."""
        sums_NS = torch.zeros((len(batch), 1 + len(self._objective.statistics)), dtype=torch.float64)
        num_padded_tokens = 0
        for micro, counts in self._passes(batch):
            try:
                computed = self._objective.losses(model, batch, micro, self.args.device)
                self.accelerator.backward(computed.losses_B.sum() * float(counts))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return sums_NS, num_padded_tokens, True
            num_padded_tokens += computed.num_tokens
            if counts:
                columns = [computed.losses_B, *computed.statistics]
                sums_NS[torch.from_numpy(micro)] = torch.stack([c.detach().double().cpu() for c in columns], dim=1)
        return sums_NS, num_padded_tokens, False

    def _passes(self, batch: Indexes) -> list[tuple[Indexes, bool]]:
        """Positions in the batch of each forward pass of this process, and whether they count."""
        share = share_of_rank(batch, self._objective.lengths, self.args.process_index, self.args.world_size)
        return [(micro, True) for micro in micro_batches(share, self._pass_size(batch))]

    def _agree(
        self, sums_NS: torch.Tensor, num_padded_tokens: int, out_of_memory: bool
    ) -> tuple[torch.Tensor, int, bool]:
        """Sum what every process saw, so that all of them decide alike."""
        if self.args.world_size == 1:
            return sums_NS, num_padded_tokens, out_of_memory
        counts = torch.tensor([num_padded_tokens, out_of_memory], dtype=torch.float64)
        both = torch.cat([sums_NS.flatten(), counts]).to(self.args.device)
        dist.all_reduce(both)
        both = both.cpu()
        return both[:-2].view_as(sums_NS), int(both[-2]), bool(both[-1] > 0)

    def _pass_size(self, batch: Indexes) -> int:
        """Rows of one forward pass."""
        return self._micro_batch_size or math.ceil(len(batch) / self.args.world_size)

    def _halve(self, step: int, batch: Indexes) -> None:
        size = self._pass_size(batch)
        if size == 1:
            raise self._does_not_fit(step, batch)
        self._micro_batch_size = math.ceil(size / 2)
        self._events(
            {
                "event": "note",
                "reason": "out_of_memory",
                "step": step + 1,
                "micro_batch_size": self._micro_batch_size,
                "text": f"out of memory at optimizer step {step + 1}; the step is repeated with"
                f" micro_batch_size={self._micro_batch_size}, its batch and its result are the same",
            }
        )

    def _does_not_fit(self, step: int, batch: Indexes) -> RunFailed:
        longest = max((int(row) for row in batch), key=lambda row: int(self._objective.lengths[row]))
        return RunFailed(
            f"Out of memory at optimizer step {step + 1}: a single example does not fit. The longest of this batch"
            f" has {self._objective.lengths[longest]} tokens ({self._objective.name(longest)}).",
            hint="Lower max_length, set gradient_checkpointing=true, dtype=bfloat16 or lora, or use more memory.",
        )

    def _sum_gradients(self, model: Any) -> None:
        if self.args.world_size == 1:
            return
        piece: list[torch.Tensor] = []
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # a batch smaller than the number of processes leaves some without rows
                parameter.grad = torch.zeros_like(parameter)
            piece.append(parameter.grad)
            if sum(grad.numel() for grad in piece) >= _ALL_REDUCE_ELEMENTS:
                _all_reduce(piece)
                piece = []
        _all_reduce(piece)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Norm before clipping; the last look at the gradients before the optimizer steps.

        Raises:
            RunFailed: it is not finite.
        """
        norm = float(whole(super()._get_grad_norm(model, grad_norm=grad_norm)))
        if not math.isfinite(norm):
            raise self._not_finite("gradient", self._batch.tolist())
        return norm

    def _not_finite(self, what: str, rows: Sequence[int]) -> RunFailed:
        names = list(dict.fromkeys(self._objective.name(row) for row in rows))
        shown = ", ".join(names[:_MAX_NAMED_ROWS])
        more = f" and {len(names) - _MAX_NAMED_ROWS} more" if len(names) > _MAX_NAMED_ROWS else ""
        return RunFailed(
            f"The {what} is not finite at optimizer step {self.state.global_step + 1}; nothing was updated with it."
            f" Examples: {shown}{more}.",
            hint="Look at their weights and token ids; lower lr or max_grad_norm if earlier steps already grew.",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep and emit one row per optimizer step; the Trainer's closing summary holds clocks and is left out."""
        if "loss" not in logs:
            return
        row = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs["grad_norm"], **self._counts}
        super().log(dict(row))
        self._events({"event": "log", "step": self.state.global_step, **row})
        seconds = self._objective.seconds()
        if seconds:
            self._events({"event": "seconds", "step": self.state.global_step, **seconds})

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: an item of the loader holds no tensors."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its final place and move it there when it is complete and on disk."""
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            dist.barrier()
        if self.args.process_index != 0:
            return
        name = f"checkpoint-{self.state.global_step}"
        staged = Path(self.args.output_dir) / name
        # A pickle that resuming never reads.
        (staged / "training_args.bin").unlink(missing_ok=True)
        self._objective.save(staged)
        commit_folder(staged, self._out_dir / name)
        self._events({"event": "checkpoint", "step": self.state.global_step, "path": str(self._out_dir / name)})

    def remove_staging(self) -> None:
        """Delete the folder in which checkpoints were written."""
        if self.args.process_index == 0:
            shutil.rmtree(self.args.output_dir, ignore_errors=True)


class _Checkpoints(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Says when to write a checkpoint. The Trainer's own interval would be restored from the one resumed from."""

    def __init__(self, every: int, num_steps: int) -> None:
        self._every = every
        self._num_steps = num_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # After the last step the final folder follows at once.
        control.should_save = state.global_step % self._every == 0 and state.global_step < self._num_steps
        return control


def _ignore(event: dict[str, Any]) -> None:
    """Events are reported by the first process only."""


def _only(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def _all_reduce(grads: Sequence[torch.Tensor]) -> None:
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))
