"""The entry point of a worker: ``python -P -m reasonrun.workers.main PARENT_PID``.

The process that the supervisor started stays small and guards; its child does the work (``serving.py``). The guard
holds no lock that a library could take from it, so that it ends the whole process group, grandchildren included, the
moment its parent or the child dies, whatever the child's threads are doing. The parent is the supervisor, or on another
machine whatever started the worker there; that one's number is not known before, and given as ``any``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GUARDED = {signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1}


def main() -> None:
    parent_pid = os.getppid() if sys.argv[1] == "any" else int(sys.argv[1])
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    # Ctrl-C reaches every process of a terminal; what it means is the supervisor's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked before the fork, so that a child that dies at once is not missed.
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _GUARDED)
    die_with_parent(signal.SIGTERM, parent_pid, _kill_group)
    guard_pid = os.getpid()
    child_pid = os.fork()
    if child_pid:
        _guard(child_pid)
    signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
    die_with_parent(signal.SIGKILL, guard_pid, _kill_group)
    from reasonrun.workers.serving import serve

    serve()


def die_with_parent(number: signal.Signals, parent_pid: int, when_orphaned: Callable[[], None]) -> None:
    """Ask the kernel for signal ``number`` when the parent ends; call ``when_orphaned`` if it has ended already.

    Does nothing outside Linux, where the end of file on the protocol pipe is what tells a worker.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent_pid:
        when_orphaned()


def _kill_group() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _guard(child_pid: int) -> NoReturn:
    # The pipes belong to the child: the supervisor must see their end when the child has gone.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    while True:
        number = signal.sigwait(_GUARDED)
        if number == signal.SIGTERM:
            _kill_group()
        if number == signal.SIGUSR1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child_pid, signal.SIGUSR1)
            continue
        ended_pid, status = os.waitpid(child_pid, os.WNOHANG)
        if ended_pid:
            # The supervisor reads a signal as 128 + its number, as a shell does, and ends what is left of the group.
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
