"""A pool of stub engines whose processes are counted, and checked to be gone when the test ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import worker_stubs
from process_checks import group_runs

from reasonrun.workers.pool import GenerationPool, Limits


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Process groups started by the test; it fails if one of them is still there in the end."""
    groups: list[int] = []
    yield groups
    left = [pgid for pgid in groups if group_runs(pgid)]
    for pgid in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pgid, 9)
    assert not left


@pytest.fixture
def make_pool(tmp_path: Path, started: list[int]) -> Iterator[Callable[..., GenerationPool]]:
    """``make_pool(num_workers=2, limits=…, python=…, interrupted=…, <settings of Stub>)``."""
    pools: list[GenerationPool] = []

    def make(
        *, num_workers: int = 1, limits: Limits | None = None, python: str | None = None, **options: Any
    ) -> GenerationPool:
        interrupted = options.pop("interrupted", lambda: 0)
        pool = GenerationPool(
            "worker_stubs.Stub",
            worker_stubs.Stub.Settings(**options).model_dump_json(),
            num_workers=num_workers,
            attempt_dir=tmp_path / "attempt",
            record_worker=lambda pid, pgid: started.append(pgid),
            python=python,
            limits=limits,
            interrupted=interrupted,
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()
