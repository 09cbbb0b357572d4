"""What the ledger's tests share: the fork server for the toy run, and the bytes of a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toy_server import ToyServer, final_bytes


@pytest.fixture
def toy_server() -> Iterator[ToyServer]:
    server = ToyServer()
    yield server
    server.close()


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing takes most of the time of a small run and proves nothing while the machine stays up."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a run that must not depend on how often it was stopped, by relative path."""
    return final_bytes
