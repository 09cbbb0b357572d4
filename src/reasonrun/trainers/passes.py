"""Forward passes over many rows that must fit into memory, whatever their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reasonrun.errors import OutOfMemory, RunFailed
from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.objective import is_out_of_memory


@dataclass(frozen=True, kw_only=True)
class Together:
    """How processes whose every pass gathers weights keep step.

    Attributes:
        num_rows: rows of the process that has most.
        idle: a forward pass for a process that has none left, whose result nobody reads.
    """

    num_rows: int
    idle: Callable[[], object]


def in_passes(
    order: Indexes,
    size: int,
    run: Callable[[Indexes], None],
    *,
    what: str,
    single: str,
    together: Together | None = None,
) -> int:
    """Call ``run`` on pieces of ``order`` of ``size`` rows, without gradients; halved when memory runs out.

    Args:
        order: rows, those of like length together.
        size: rows of a piece.
        run: one forward pass.
        what: what is computed, for the message.
        single: how the message calls one row.
        together: given where all processes must run the same passes.

    Returns:
        The size that fitted.

    Raises:
        RunFailed: a single row does not fit.
        OutOfMemory: ``size`` rows do not fit, and other processes wait inside the same pass.
    """
    done = 0
    while done < len(order):
        rows = order[done : done + size]
        try:
            with torch.no_grad():
                run(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise RunFailed(
                    f"Out of memory at {what}: a single {single} does not fit.",
                    hint="Lower max_length, set dtype=bfloat16, or use more memory.",
                ) from error
            if together is not None:
                raise OutOfMemory(
                    f"Out of memory at {what}, {size} at a time.",
                    hint=f"Set micro_batch_size={(size + 1) // 2}, or use more memory.",
                ) from error
            size = (size + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        done += len(rows)
    if together is not None:
        with torch.no_grad():
            for _ in range(-(-together.num_rows // size) - -(-len(order) // size)):
                together.idle()
    return size
