"""What makes one kind of training differ from another: its rows and their loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size

from reasonrun.trainers.batches import Indexes, plan_batches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time may help."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What one forward pass gave.

    Attributes:
        losses_B: each row's share of the batch loss, already divided for the whole batch, differentiable.
        num_tokens: tokens that went through the forward pass, padding included.
        statistics: one number per row for each of the objective's ``statistics``, shape (B,).
    """

    losses_B: torch.Tensor
    num_tokens: int
    statistics: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """What an objective may compute from before the weights move.

    Attributes:
        start: the model to train, on its device.
        start_is_reference: whether ``start``, as it is now, equals the reference.
        load_reference: gives the reference model, on that device; for a job that names one.
        resume_from: the checkpoint that training goes on from, in which ``save`` left what it needs.
        rows: the rows that the step will learn from, ascending.
        tell: says something a person should know. Long work must, or it counts as a hang.
    """

    start: Any
    start_is_reference: bool
    load_reference: Callable[[], Any]
    resume_from: Path | None
    rows: Indexes
    tell: Callable[[str], None]


class Objective(ABC):
    """Rows and their loss."""

    lengths: Indexes  # tokens of each row
    statistics: ClassVar[tuple[str, ...]] = ()  # what is logged beside the loss, as means over the batch
    steps_per_checkpoint: int = 1  # checkpoints fall on multiples of it
    _planned: list[Indexes]

    def plan(self, batch_size: int, num_steps: int, seed: int) -> Indexes:
        """Choose the rows of every optimizer step; gives those that take part, ascending."""
        self._planned = plan_batches(self.lengths, batch_size, num_steps, seed)
        return np.unique(np.concatenate(self._planned))

    def batch(self, step: int) -> Indexes:
        """The rows of optimizer step ``step`` (from 0), asked for once, before its first forward pass."""
        return self._planned[step]

    def step_statistics(self) -> dict[str, float]:
        """What else is logged of the optimizer step at hand."""
        return {}

    def totals(self, history: Sequence[Mapping[str, float]], batch_size: int) -> dict[str, float]:
        """What the finished job reports of its rows. ``history`` has one line for each optimizer step."""
        num_rows = len(self.lengths)
        return {"num_examples": num_rows, "num_epochs": len(history) * batch_size / num_rows}

    def seconds(self) -> dict[str, float]:
        """Seconds of the parts of the optimizer step that has just ended; clocks never enter what is logged."""
        return {}

    def close(self) -> None:  # noqa: B027 - most objectives hold nothing
        """Give back what it holds."""

    @abstractmethod
    def name(self, row: int) -> str:
        """How messages call a row."""

    @abstractmethod
    def num_tokens(self, batch: Indexes) -> int:
        """Tokens of an optimizer batch that carry loss."""

    @abstractmethod
    def losses(self, model: Any, batch: Indexes, micro: Indexes, device: torch.device) -> Computed:
        """Losses of the positions ``micro`` of an optimizer batch.

        Args:
            model: a causal language model.
            batch: row indexes of the whole optimizer batch, for the divisor.
            micro: positions in ``batch`` to compute now.
            device: where the model is.
        """

    def begin(self, fixed: Fixed) -> None:  # noqa: B027 - most objectives keep nothing fixed
        """Compute what stays fixed while the weights move; called before the first update of every attempt."""

    def save(self, folder: Path) -> None:  # noqa: B027
        """Leave in a checkpoint's folder what ``begin`` computed."""
