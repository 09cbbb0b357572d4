"""Runs to read: some made by the scripted engine, one put together row by row with the ledger's own writers."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import MakeRun, write_handmade_run, write_scripted_run


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A run of ``smoke_star`` with these overrides; the same ones give the same directory, which nobody changes."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = write_scripted_run(tmp_path_factory.mktemp("run") / "run", *overrides)
        return made[overrides]

    return make


@pytest.fixture(scope="session")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``write_handmade_run``."""
    return write_handmade_run(tmp_path_factory.mktemp("handmade") / "run")
