r"""One process of the grading pool: reads pairs, compares them with math-verify, is killed when it takes too long.

Started by ``grading.pool`` as ``python -m reasonrun.grading.pool_worker PARENT_PID CPU_SECONDS MEMORY_BYTES``. One
JSON document per line in both directions. The only module that imports math_verify.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import resource
import signal
import sys
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve until standard input ends."""
    parent_pid, cpu_seconds, memory_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _die_with(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the supervisor decides
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    logging.disable(logging.CRITICAL)
    compare("1/2+x", "x+0.5")  # imports and compiles the grammar before anything is charged to an answer
    baseline = _peak_bytes()
    _send(replies, {"ready": True})
    for line in sys.stdin:
        pair = json.loads(line)
        # ITIMER_PROF counts the CPU time of this process, and the default action of SIGPROF ends it even inside a
        # C function that never comes back to Python.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        reason = _reason(pair)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        growth, headroom = _peak_bytes() - baseline, memory_bytes - baseline
        if reason != "correct" and growth > headroom // 2:
            reason = "memory"  # sympy and math-verify swallow MemoryError, then answer as if the text were nonsense
        last = growth > headroom // 8
        _send(replies, {"id": pair["id"], "reason": reason, "last": last})
        if last:
            break
    return 0


def compare(reference: str, answer: str) -> str:
    """``correct``, ``wrong``, ``unparseable`` (the answer) or ``unreadable_reference``.

    math-verify is not symmetric: gold first. Its own timeouts are off because they do not hold (and need signals).
    """
    from math_verify import verify
    from sympy.core.random import seed  # type: ignore[import-untyped]

    random.seed(0)
    seed(0)  # sympy tests equality at random points
    gold = _parse(reference)
    if not gold:
        return "unreadable_reference"
    stated = _parse(answer)
    if not stated:
        return "unparseable"
    return "correct" if verify(gold, stated, timeout_seconds=None, raise_on_error=False) else "wrong"


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # Bare text would be searched for its last number, so it is put in a box.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed: list[Any] = parse(
        f"\\boxed{{{text}}}",
        config,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return parsed


def _reason(pair: dict[str, Any]) -> str:
    try:
        return compare(pair["reference"], pair["answer"])
    except MemoryError:
        return "memory"
    except Exception:  # the recording boundary: whatever the libraries raise becomes a verdict, "could not tell"
        return "crash"


def _die_with(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit(0)


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmPeak:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0  # no /proc, no address-space limit either: the deadline alone protects


def _send(replies: TextIO, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
