"""Whether processes still run."""

from __future__ import annotations

import contextlib
import os

import psutil


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def group_runs(pgid: int) -> bool:
    """Whether any process of the group exists and is no zombie."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
