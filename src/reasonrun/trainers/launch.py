"""One training job in several processes of this machine, and the entry point that each of them runs.

The processes are started directly, with the environment that torchrun would give them, not by torchrun: it puts every
process into a session of its own, where a signal to our process group does not reach it. The entry point also runs
under torchrun (``torchrun --nproc-per-node 8 -m reasonrun.trainers.launch JOB.json``); then the events are lines of
JSON on the standard output of the first process.

A process ends when it loses its parent: it watches a pipe whose other end only the parent holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from reasonrun import errors
from reasonrun.contracts import TrainEvents
from reasonrun.errors import ReasonrunError, RunFailed
from reasonrun.training import TrainJob, TrainResult

_POLL_SECONDS = 0.1
_TELL_SECONDS = 1.0
# How long the first process may go on after another one failed, so that it can report what it knows.
_GRACE_SECONDS = 10.0
# The same when that one has said why: the first may be waiting for it for ever.
_SAID_SECONDS = 1.0
_LOG_TAIL_LINES = 12
_LOST_PARENT_EXIT_CODE = 75


def prepare_environment() -> None:
    """Keep libraries that are imported after this off the network: a job's model is a folder."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")


def take_device() -> None:
    """Make this process's GPU the one that "cuda" means to every library in it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def is_rank() -> bool:
    """Whether this process is one of several that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def train_in_processes(
    trainer: str, job: TrainJob, events: TrainEvents, note_tokens: Callable[[int], None] = lambda num_tokens: None
) -> TrainResult:
    """Run ``job`` in ``job.num_processes`` child processes of our own process group and relay their events.

    Args:
        trainer: module and class, such as ``reasonrun.trainers.sft:SFT``.
        job: the job; ``job.json`` and one log per process are written into its ``out_dir``.
        events: receives what the first process emits.
        note_tokens: called with the tokens that the first process has sampled so far, whenever there are more.

    Raises:
        ReasonrunError: what a process raised, with its own class.
        RunFailed: a process died without saying why; the message ends with the tail of its log.
    """
    out_dir = Path(job.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    job_path = out_dir / "job.json"
    job_path.write_text(job.model_dump_json(), encoding="utf-8")
    read_end, write_end = os.pipe()
    processes = [_start(trainer, job, job_path, rank, write_end) for rank in range(job.num_processes)]
    os.close(write_end)
    result: TrainResult | None = None
    try:
        with os.fdopen(read_end, encoding="utf-8") as stream:
            for event in _events(stream, processes, out_dir):
                if event["event"] == "result":
                    result = TrainResult.model_validate(event["result"])
                elif event["event"] == "error":
                    raise _rebuild(event)
                elif event["event"] == "tokens":
                    note_tokens(event["num_tokens"])
                else:
                    events(event)
        _wait(processes)
    finally:
        _end(processes)
    failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
    for said in (_error_path(out_dir, rank) for rank in failed):
        if said.is_file():
            raise _rebuild(json.loads(said.read_text(encoding="utf-8")))
    if result is None or failed:
        raise _died(processes, failed, out_dir)
    return result


def _start(trainer: str, job: TrainJob, job_path: Path, rank: int, events_fd: int) -> subprocess.Popen[bytes]:
    num_threads = max(1, (os.cpu_count() or 1) // job.num_processes)
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_processes),
        "LOCAL_WORLD_SIZE": str(job.num_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(num_threads)),
    }
    # Left over from an outer launcher, they would make these processes look for its store.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "reasonrun.trainers.launch", str(job_path), "--trainer", trainer, "--watch-parent"]
    if rank == 0:
        command += ["--events-fd", str(events_fd)]
    with (job_path.parent / f"rank-{rank}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(events_fd,) if rank == 0 else (),
        )


def _events(stream: IO[str], processes: list[subprocess.Popen[bytes]], out_dir: Path) -> Iterator[dict[str, Any]]:
    """Events until the first process closes its end, or is past its grace after another one failed."""
    os.set_blocking(stream.fileno(), False)
    pending = b""
    failed_at: float | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if selector.select(_POLL_SECONDS):
                chunk = os.read(stream.fileno(), 2**16)
                if not chunk:
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines)
            if failed_at is None and any(process.poll() not in (None, 0) for process in processes):
                failed_at = time.monotonic()
            if failed_at is not None:
                said = any(_error_path(out_dir, rank).is_file() for rank in range(len(processes)))
                if time.monotonic() - failed_at > (_SAID_SECONDS if said else _GRACE_SECONDS):
                    return


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _error_path(out_dir: Path, rank: int) -> Path:
    return out_dir / f"rank-{rank}.error.json"


def _rebuild(event: dict[str, Any]) -> ReasonrunError:
    kind = getattr(errors, event["kind"])
    rebuilt: ReasonrunError = kind(event["message"], hint=event["hint"])
    if isinstance(rebuilt, errors.Finding):
        rebuilt.evidence = event["evidence"]
    return rebuilt


def _died(processes: list[subprocess.Popen[bytes]], failed: list[int], out_dir: Path) -> RunFailed:
    # The process that died of itself tells more than those that were ended because of it.
    rank = min(failed, key=lambda rank: processes[rank].returncode == -9, default=0)
    log_path = out_dir / f"rank-{rank}.log"
    tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    return RunFailed(
        f"Training process {rank} of {len(processes)} ended with code {processes[rank].returncode} before the step was"
        f" done. The end of {log_path}:\n{tail}",
        hint="The same command continues from the last checkpoint; a code of -9 often means that memory ran out.",
    )


def main(arguments: list[str] | None = None) -> int:
    """Train as one of several processes. Exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="python -m reasonrun.trainers.launch", description=main.__doc__)
    parser.add_argument("job", type=Path, help="a TrainJob as JSON")
    parser.add_argument("--trainer", default="reasonrun.trainers.sft:SFT", help="module:class")
    parser.add_argument("--events-fd", type=int, default=1, help="open file that receives the events")
    parser.add_argument("--watch-parent", action="store_true", help="end when standard input closes")
    options = parser.parse_args(arguments)
    if options.watch_parent:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare_environment()
    job = TrainJob.model_validate_json(options.job.read_text(encoding="utf-8"))
    module, _, name = options.trainer.partition(":")

    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        if os.environ.get("RANK", "0") == "0":
            with lock:
                os.write(options.events_fd, json.dumps(event).encode() + b"\n")

    try:
        made = getattr(importlib.import_module(module), name)()
        threading.Thread(target=_tell_tokens, args=(made, emit), daemon=True).start()
        result = made.train(job, emit)
    except ReasonrunError as error:
        print(error, file=sys.stderr)
        evidence = getattr(error, "evidence", {})
        kind = type(error).__name__
        said = {"event": "error", "kind": kind, "message": error.message, "hint": error.hint, "evidence": evidence}
        emit(said)
        if options.watch_parent:  # the first process may never learn of it: it waits for this one
            path = _error_path(options.job.parent, int(os.environ["RANK"]))
            path.with_suffix(".partial").write_text(json.dumps(said), encoding="utf-8")
            path.with_suffix(".partial").rename(path)
        return error.exit_code
    emit({"event": "result", "result": result.model_dump(mode="json")})
    return 0


def _tell_tokens(trainer: Any, emit: TrainEvents) -> None:
    # The worker that started this process shows the supervisor that it makes progress; long rollouts would look like a hang.
    told = 0
    while True:
        time.sleep(_TELL_SECONDS)
        num_tokens = int(getattr(trainer, "num_tokens_made", 0))
        if num_tokens != told:
            told = num_tokens
            emit({"event": "tokens", "num_tokens": told})


def _end_with_parent() -> None:
    # os.read, not sys.stdin: a buffered reader that a daemon thread holds cannot be closed at interpreter exit.
    while os.read(0, 1):
        pass
    os._exit(_LOST_PARENT_EXIT_CODE)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: threads that a failed job leaves in torch abort a process whose destructors run
