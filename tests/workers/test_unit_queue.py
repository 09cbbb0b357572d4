"""Who is blamed when workers end: nobody for a kill or two, the one bad request of a unit after a few."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrun.errors import RunFailed
from reasonrun.workers import protocol
from reasonrun.workers.units import NUM_EXCUSED, Unit, UnitQueue

Dies = Callable[[Unit], protocol.WorkerCrash | None]


def crash(*, from_outside: bool = False) -> protocol.WorkerCrash:
    return protocol.WorkerCrash("w", "ended", log_path=Path("log"), log_tail="", from_outside=from_outside)


def make_queue(num_units: int, unit_size: int, num_workers: int) -> UnitQueue:
    def message(call: int, items: tuple[str, ...]) -> protocol.Generate:
        raise NotImplementedError  # nobody sends it

    keys = [tuple(f"request-{number * 1000 + i}" for i in range(unit_size)) for number in range(num_units)]
    return UnitQueue((Unit(number, items, message, ", ".join) for number, items in enumerate(keys)), num_workers)


def work_off(queue: UnitQueue, num_workers: int, dies: Dies) -> tuple[Counter[str], list[Unit]]:
    """Answered request keys and all calls, with workers that finish in turn; ``dies`` decides how each call ends."""
    answered: Counter[str] = Counter()
    calls: list[Unit] = []
    while not queue.done:
        for slot in range(num_workers):
            if slot not in queue.in_flight and (unit := queue.take(slot)) is not None:
                calls.append(unit)
        slot = min(queue.in_flight, default=None)
        if slot is None:
            continue
        if (error := dies(queue.in_flight[slot])) is not None:
            queue.lose(slot, error)
        else:
            answered.update(queue.finish(slot).items)
    return answered, calls


def is_poisoned(*keys: str) -> Dies:
    return lambda unit: crash() if set(keys) & set(unit.items) else None


@pytest.mark.parametrize(("unit_size", "num_crashes"), [(1, 4), (4, 4), (16, 4), (17, 5), (64, 5), (256, 6)])
def test_one_bad_request_is_found_at_the_cost_of_few_workers(unit_size: int, num_crashes: int) -> None:
    queue = make_queue(4, unit_size, 2)
    answered, calls = work_off(queue, 2, is_poisoned("request-1000"))
    assert set(answered.values()) == {1}
    assert len(answered) == 4 * unit_size - 1
    with pytest.raises(RunFailed, match=rf"request-1000 \(of unit 1; ended {num_crashes} workers"):
        queue.check_complete()
    assert sum("request-1000" in unit.items for unit in calls) == num_crashes


def test_several_bad_requests_in_the_first_units_are_all_named() -> None:
    queue = make_queue(6, 8, 2)
    bad = ("request-0", "request-3", "request-1001")
    answered, _ = work_off(queue, 2, is_poisoned(*bad))
    keys = {f"request-{unit * 1000 + i}" for unit in range(6) for i in range(8)}
    assert answered == Counter(keys - set(bad))
    with pytest.raises(RunFailed) as caught:
        queue.check_complete()
    assert all(f"{key} (of" in str(caught.value) for key in bad)


def test_suspects_wait_for_the_others_and_go_alone() -> None:
    queue = make_queue(3, 1, 2)
    for _ in range(2):
        queue.take(0)
        queue.lose(0, crash())
    assert queue.take(0).number == 1  # type: ignore[union-attr]
    assert queue.take(1).number == 2  # type: ignore[union-attr]
    queue.finish(0)
    assert queue.take(0) is None
    queue.finish(1)
    assert queue.take(1).number == 0  # type: ignore[union-attr]
    assert queue.take(0) is None
    assert not queue.done
    queue.finish(1)
    assert queue.done
    queue.check_complete()


def test_losses_from_outside_blame_nobody_for_long() -> None:
    queue = make_queue(1, 1, 1)
    num_lost = 0
    while not queue.done:
        queue.take(0)
        queue.lose(0, crash(from_outside=True))
        num_lost += 1
    assert num_lost == NUM_EXCUSED + 4
    with pytest.raises(RunFailed, match="request-0"):
        queue.check_complete()


@pytest.mark.parametrize(("unit_size", "max_failed"), [(1, 3), (16, 0)])
def test_twenty_kills_at_random_set_nothing_aside(unit_size: int, max_failed: int) -> None:
    # Half of the kills hit the working process alone, which looks like a crash of its own. A single request is lost four
    # times in one of a hundred loads of which every sixth call is killed.
    num_failed = 0
    for seed in range(300):
        rng = random.Random(seed)
        moments = set(rng.sample(range(120), 20))
        num_calls = [0]

        def dies(
            unit: Unit, rng: random.Random = rng, moments: set[int] = moments, num_calls: list[int] = num_calls
        ) -> protocol.WorkerCrash | None:
            num_calls[0] += 1
            return crash(from_outside=rng.random() < 0.5) if num_calls[0] in moments else None

        queue = make_queue(100, unit_size, 2)
        answered, _ = work_off(queue, 2, dies)
        assert set(answered.values()) <= {1}
        num_failed += len(answered) != 100 * unit_size
    assert num_failed <= max_failed


def test_workers_that_end_whatever_they_are_asked_stop_the_run() -> None:
    queue = make_queue(100, 4, 3)
    with pytest.raises(RunFailed, match="ended 10 times without answering"):
        work_off(queue, 3, lambda unit: crash())
