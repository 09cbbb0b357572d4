"""A merge as a process of its own: it may take gigabytes and minutes, and a stop must not wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from reasonrun.errors import RecipeError, RunFailed, Stopped
from reasonrun.training import MergeJob

_POLL_SECONDS = 0.05
_MAX_SAID = 500


def merge_in_process(job: MergeJob, record_worker: Callable[[int, int], None], interrupted: Callable[[], int]) -> None:
    """Write the merged model to ``<out_dir>/final``.

    Args:
        job: what to merge.
        record_worker: called with (pid, process group), so that a later attempt can end what this one leaves behind.
        interrupted: the exit code of a stop that was asked for, or 0.

    Raises:
        RecipeError: the models do not fit together.
        RunFailed: the result is not finite, or the process died.
        Stopped: ``interrupted()`` became true; the process is ended.
    """
    pairs = [text for model, weight in zip(job.models, job.weights, strict=True) for text in (repr(weight), model.path)]
    search_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "reasonrun.merging", str(Path(job.out_dir) / "final"), *pairs],
        env={**os.environ, "PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            record_worker(process.pid, process.pid)
            out, err = _communicate(process, interrupted)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise _explained(process.returncode, out, err)


def _communicate(process: subprocess.Popen[bytes], interrupted: Callable[[], int]) -> tuple[bytes, bytes]:
    while True:
        if code := interrupted():
            raise Stopped(
                "stopped while models were merged; what is committed is safe",
                exit_code=code if code is not True else Stopped.exit_code,
                hint="the same command continues this run",
            )
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_POLL_SECONDS)


def _explained(code: int, out: bytes, err: bytes) -> RecipeError | RunFailed:
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(out)
        return (RecipeError if said["is_recipe"] else RunFailed)(str(said["message"]), hint=str(said["hint"]))
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    last = err.decode(errors="replace").strip()[-_MAX_SAID:]
    return RunFailed(
        f"The process that merges models ended {how}. {last}".strip(), hint="the same command tries it again"
    )
