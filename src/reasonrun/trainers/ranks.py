"""What processes that train together tell each other; alone, a process is the first of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from reasonrun.records import Graded, Problem

Floats = npt.NDArray[np.float64]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(collect: Callable[[Sequence[Problem]], list[Graded]], problems: Sequence[Problem]) -> list[Graded]:
    """Rollouts of all problems, each process making its part; in the order of the problems, whatever their number."""
    share = problems[rank() :: world()]
    graded = collect(share) if share else []
    if world() > 1:
        parts: list[list[Graded]] = [[] for _ in range(world())]
        dist.all_gather_object(parts, graded)
        graded = [row for part in parts for row in part]
    places = {problem.id: place for place, problem in enumerate(problems)}
    return sorted(graded, key=lambda row: places[row.rollout.problem_id])


def summed(values: Floats, device: torch.device) -> Floats:
    """What the processes found, each its own rows and 0 elsewhere."""
    if world() == 1:
        return values
    both = torch.from_numpy(values).to(device)
    dist.all_reduce(both)
    total: Floats = both.cpu().numpy()
    return total
