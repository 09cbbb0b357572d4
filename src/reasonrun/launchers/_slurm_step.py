"""Carries a worker to a node of the job: ``python -P -m reasonrun.launchers._slurm_step NODE NAME VARIABLE=VALUE… -- COMMAND``.

The process becomes ``srun``, so that signals and the exit status are the worker's. Slurm leaves a step running whose srun was
killed: a watcher outside its process group, told by the kernel, then ends the step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from reasonrun.workers.main import die_with_parent

_END_SECONDS = 30.0
_POLL_SECONDS = 0.5


def main() -> None:
    node, name = sys.argv[1:3]
    middle = sys.argv.index("--")
    end_steps(name)  # of a worker that was killed just now: it may hold the devices still
    _watch(name)
    command = srun_command(node, name, sys.argv[3:middle], sys.argv[middle + 1 :])
    os.execvp(command[0], command)


def srun_command(node: str, name: str, variables: Sequence[str], command: Sequence[str]) -> list[str]:
    """Run a command as one step on one node of this job, with all that the job has there, connected to these streams.

    ``variables`` are set on the node itself, because Slurm sets CUDA_VISIBLE_DEVICES to all devices of the step; all others
    come from the environment of srun.
    """
    place = ("--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", f"--job-name={name}")
    streams = ("--export=ALL", "--unbuffered", "--kill-on-bad-exit=1", "--cpu-bind=none", "--mpi=none", "--quiet")
    return ["srun", *place, *streams, "env", *variables, *command]


def end_steps(name: str) -> None:
    """Kill the steps of this job that have this name, and wait until they are gone, for at most 30 seconds."""
    steps = _steps(name)
    if steps:
        subprocess.run(["scancel", "--signal=KILL", *steps], check=False, capture_output=True)
    deadline = time.monotonic() + _END_SECONDS
    while steps and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        steps = _steps(name)


def _steps(name: str) -> list[str]:
    command = ["squeue", "--steps", "--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format", "%i %j"]
    lines = subprocess.run(command, check=False, capture_output=True, text=True).stdout.splitlines()
    pairs = [line.split(maxsplit=1) for line in lines]
    return [pair[0] for pair in pairs if len(pair) == 2 and pair[1].strip() == name]


def _watch(name: str) -> None:
    """Fork the watcher: it holds none of the worker's streams, and ends the step when this process is no more."""
    parent_pid = os.getpid()
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    if os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    die_with_parent(signal.SIGUSR2, parent_pid, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    signal.sigwait({signal.SIGUSR2})
    end_steps(name)
    os._exit(0)


if __name__ == "__main__":
    main()
