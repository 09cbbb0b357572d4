"""What attacks share: a run that nothing happens to, and a fast folder to work in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from recovery import Judge, Recording, record

from reasonrun.ledger.faults import FAULT_VARIABLE
from toy_server import ToyServer, final_bytes


@pytest.fixture(autouse=True)
def no_armed_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that somebody left set would be an attack of its own."""
    monkeypatch.delenv(FAULT_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder in memory where the machine has one: thousands of small trees are written and deleted."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="reasonrun-attack-", dir=parent) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def undisturbed(scratch: Path) -> Recording:
    """The record of a run that nothing happens to."""
    root = scratch / "undisturbed"
    root.mkdir()
    return record(root)


@pytest.fixture(scope="session")
def judge(scratch: Path, undisturbed: Recording) -> Judge:
    return Judge(final_bytes(scratch / "undisturbed" / "run"), scratch)


@pytest.fixture(scope="session")
def toy_server() -> Iterator[ToyServer]:
    server = ToyServer()
    yield server
    server.close()
