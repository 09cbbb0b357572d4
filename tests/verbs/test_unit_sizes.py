"""How a sample step is cut into units: longest prompts first, the last units small enough to be shared."""

from __future__ import annotations

import pytest

from reasonrun.verbs.sampling import _unit_size


def sizes(largest: int, total: int, num_workers: int) -> list[int]:
    found, left = [], total
    while left > 0:
        found.append(min(left, _unit_size(largest, left, num_workers)))
        left -= found[-1]
    return found


def test_one_worker_takes_whole_units() -> None:
    assert sizes(64, 200, 1) == [64, 64, 64, 8]


@pytest.mark.parametrize("num_workers", [2, 3, 8])
@pytest.mark.parametrize("total", [100, 1000, 4000])
def test_last_units_shrink_so_that_no_worker_waits_long(total: int, num_workers: int) -> None:
    found = sizes(64, total, num_workers)
    assert sum(found) == total
    assert found == sorted(found, reverse=True)
    assert min(found[:-1]) >= 16  # a quarter
    # Every worker takes the next unit when it is free; a unit takes as long as it is large.
    busy = [0] * num_workers
    for size in found:
        busy[busy.index(min(busy))] += size
    assert max(busy) - min(busy) <= 16
