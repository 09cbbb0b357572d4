"""Forward passes over many rows that must fit into memory, whatever their number."""

from __future__ import annotations

from collections.abc import Callable

import torch

from reasonrun.errors import RunFailed
from reasonrun.trainers.batches import Indexes
from reasonrun.trainers.objective import is_out_of_memory


def in_passes(order: Indexes, size: int, run: Callable[[Indexes], None], *, what: str, single: str) -> int:
    """Call ``run`` on pieces of ``order`` of ``size`` rows, without gradients; halved when memory runs out.

    Args:
        order: rows, those of like length together.
        size: rows of a piece.
        run: one forward pass.
        what: what is computed, for the message.
        single: how the message calls one row.

    Returns:
        The size that fitted.

    Raises:
        RunFailed: a single row does not fit.
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
            size = (size + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        done += len(rows)
    return size
