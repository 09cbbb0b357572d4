"""A pytest plug-in: what each promise of docs/reliability.md withstood, and canaries that nothing may write down.

A test that attacks a promise once carries ``@pytest.mark.promise("G9", "signals in a step")``; one that attacks it many
times asks for ``counted``. What passed is printed at the end, a line for each promise.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NUM_PROMISES = 22
WAITING = {"G15": "waits for tasks that run code"}
CANARY = "canary-71c3-must-stay-here"
SECRET_VARIABLES = ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "MY_DATABASE_PASSWORD")
"""Of W&B's key a test of its own knows: with one in the environment W&B behaves otherwise."""

Counted = Callable[[str, str, int], None]

_counts = pytest.StashKey[dict[str, Counter[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_counts] = {f"G{number}": Counter() for number in range(1, NUM_PROMISES + 1)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first one prints
        session.config.workeroutput["promises"] = {
            promise: dict(cases) for promise, cases in session.config.stash[_counts].items()
        }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    for promise, cases in getattr(node, "workeroutput", {}).get("promises", {}).items():
        node.config.stash[_counts][promise].update(cases)


@pytest.fixture(scope="session")
def counted(pytestconfig: pytest.Config) -> Counted:
    """Call ``counted("G4", "crash states", 2000)`` at the end of a test that attacked a promise so many times."""

    def count(promise: str, what: str, number: int) -> None:
        pytestconfig.stash[_counts][promise][what] += number

    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.passed:
        for mark in item.iter_markers("promise"):
            item.config.stash[_counts][mark.args[0]][mark.args[1]] += 1
    for title, text in report.sections:
        if CANARY in text:
            report.outcome, report.longrepr = "failed", f"G18: {title} shows {text[text.index(CANARY) :][:80]}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _canaries(tmp_path_factory: pytest.TempPathFactory, counted: Counted) -> Iterator[None]:
    """Secrets in the environment of every test, looked for afterwards in every byte that the tests have written."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRET_VARIABLES:
            patch.setenv(name, f"{CANARY}-{name}")
        yield
    written = [Path(folder) / name for folder, _, names in os.walk(tmp_path_factory.getbasetemp()) for name in names]
    written = [path for path in written if path.is_file() and not path.is_symlink()]
    leaks = [str(path) for path in written if holds(path, CANARY.encode())]
    assert not leaks, f"G18: secrets of the environment in {leaks[:20]}"
    if written:
        counted("G18", "files searched for secrets", len(written))


def holds(path: Path, wanted: bytes) -> bool:
    """Whether a file holds ``wanted``; read in pieces, because weights are large."""
    overlap = b""
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            if wanted in overlap + part:
                return True
            overlap = part[-len(wanted) :]
    return False


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[_counts]
    if not any(cases for promise, cases in counts.items() if promise != "G18"):
        return
    terminalreporter.section("what each promise withstood")
    for promise, cases in counts.items():
        withstood = ", ".join(f"{number:,} {what}" for what, number in cases.items())
        terminalreporter.write_line(f"{promise:<4} {withstood or WAITING.get(promise, 'not attacked')}")
