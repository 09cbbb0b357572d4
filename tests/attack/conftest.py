"""What attacks share: the count of what each promise withstood, printed at the end, and a fast folder to work in."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recovery import Judge, Recording, record

from reasonrun.ledger.faults import FAULT_VARIABLE
from toy_server import ToyServer, final_bytes

NUM_PROMISES = 22

Counted = Callable[[str, str, int], None]

_counts = pytest.StashKey[dict[str, Counter[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_counts] = {f"G{number}": Counter() for number in range(1, NUM_PROMISES + 1)}


@pytest.fixture(scope="session")
def counted(pytestconfig: pytest.Config) -> Counted:
    """Call ``counted("G4", "crash states", 2000)`` at the end of a test that attacked a promise so many times."""

    def count(promise: str, what: str, number: int) -> None:
        pytestconfig.stash[_counts][promise][what] += number

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[_counts]
    if not any(counts.values()):
        return
    terminalreporter.section("what each promise withstood")
    for promise, cases in counts.items():
        withstood = ", ".join(f"{number:,} {what}" for what, number in cases.items())
        terminalreporter.write_line(f"{promise:<4} {withstood or 'not attacked'}")


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
