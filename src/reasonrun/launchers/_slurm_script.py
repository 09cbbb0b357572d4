"""The script of a job: parameters by submitit, then the command as a person would type it.

submitit runs pickled functions; a pickle cannot be read before it runs, and it ties the job to the code of the moment of
submission. A run needs neither: its command line and its directory say all. So only submitit's maker of sbatch scripts is
used, and stopping and requeueing, which submitit does within the pickled function, are lines of the script.
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrun.errors import EnvironmentProblem

if TYPE_CHECKING:
    from reasonrun.launchers.slurm import Slurm

OWN_JOB = "REASONRUN_SLURM_JOB"
"""Variable that holds the number of the job inside a job that reasonrun submitted."""

OWNED_PARAMETERS = {
    "array": "a run is one job",
    "chdir": "the job runs in the folder of the command",
    "error": "the log is in the run directory",
    "open-mode": "the log is in the run directory",
    "output": "the log is in the run directory",
    "no-requeue": "launcher.max_requeues=0 does that",
    "ntasks": "a job has one task on each of its nodes",
    "ntasks-per-node": "a job has one task on each of its nodes",
    "requeue": "launcher.max_requeues says how often",
    "signal": "launcher.signal_seconds says when",
    "partition": "launcher.partition is its field",
    "account": "launcher.account is its field",
    "qos": "launcher.qos is its field",
    "time": "launcher.time_minutes is its field",
    "nodes": "launcher.num_nodes is its field",
    "gpus-per-node": "launcher.gpus_per_node is its field",
    "cpus-per-task": "launcher.cpus_per_task is its field",
    "mem": "launcher.memory_gib is its field",
    "job-name": "it is the name of the run directory",
}
"""Parameters of sbatch that ``launcher.extra`` cannot set, and why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job runs: the command, what only its first start adds to it, its name, and the folders of script and work."""

    command: tuple[str, ...]
    once: tuple[str, ...]
    name: str
    jobs: Path
    cwd: Path


def is_writable(value: str) -> bool:
    """Whether sbatch reads ``value`` back from a script: it does not know a shell's way to write a quote within quotes."""
    return "'" not in value and "\n" not in value


def script_text(job: Job, settings: Slurm.Settings) -> str:
    """The whole script. Raises EnvironmentProblem when submitit is not installed, or sbatch could not read a path."""
    for path in (job.cwd, job.jobs):
        if not is_writable(str(path)):
            raise EnvironmentProblem(
                f"{path}: the parameters of a Slurm job cannot hold a path with a quote in it",
                hint="run in another folder, or name another run directory with --run DIR",
            )
    try:
        from submitit.slurm.slurm import _make_sbatch_string as make_script
    except ImportError:
        raise EnvironmentProblem(
            "launcher slurm needs the package submitit, which is not installed",
            hint="pip install 'reasonrun[slurm]', or run on this machine with launcher=local",
        ) from None
    silent = dict.fromkeys(_defaults_of(make_script))  # what is None is left to the cluster
    text: str = make_script(
        **{
            **silent,
            "command": _command(job, settings),
            "folder": job.jobs,
            "job_name": job.name.replace("'", "_"),
            "partition": settings.partition,
            "account": settings.account,
            "qos": settings.qos,
            "time": settings.time_minutes,
            "nodes": settings.num_nodes,
            "ntasks_per_node": 1,
            "gpus_per_node": settings.gpus_per_node,
            "cpus_per_task": settings.cpus_per_task,
            "mem": f"{settings.memory_gib}G" if settings.memory_gib else None,
            "setup": list(settings.setup) or None,
            "signal_delay_s": settings.signal_seconds,
            "stderr_to_stdout": True,
            "use_srun": False,
            "additional_parameters": {
                "chdir": job.cwd,
                "output": f"{str(job.jobs).replace('%', '%%')}/%j.log",
                "requeue": True,
                "signal": f"B:TERM@{settings.signal_seconds}",
                **settings.extra,
            },
        }
    )
    return text


def _defaults_of(function: Any) -> Mapping[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


_SCRIPT = """\
export {own_job}=$SLURM_JOB_ID{import_path}

command=({command}){once}

# Slurm signals this shell before the time limit and when the job must make room. The run stops at its next boundary then,
# with status 75, and goes on when the job starts again.
pid=
stopping=
signalled=1
trap 'stopping=1; signalled=1; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' TERM
"${{command[@]}}" &
pid=$!
[ -z "$stopping" ] || kill -TERM "$pid" 2>/dev/null
while [ "$signalled" ]; do
  signalled=
  wait "$pid"
  status=$?
done

# A signal may also have come before the run could listen to it, and then has ended it.
if [ "$stopping" ] && {{ [ "$status" -gt 128 ] || [ "$status" -lt 0 ]; }}; then
  status=75
fi
# A job that was cancelled ends, and one that made room by being requeued comes back by itself: neither is running any more.
if [ "$status" -eq 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then
    echo "reasonrun: this job was started again ${{SLURM_RESTART_COUNT:-0}} times (launcher.max_requeues={max_requeues});" \
      "the same command submits it anew" >&2
  else
    echo "reasonrun: Slurm starts this job again" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status\""""

_ONCE = """

# What sets work aside must not do so again after a requeue.
[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || command+=({once})"""


def _command(job: Job, settings: Slurm.Settings) -> str:
    import_path = os.environ.get("PYTHONPATH")
    return _SCRIPT.format(
        own_job=OWN_JOB,
        import_path=f"\nexport PYTHONPATH={shlex.quote(import_path)}" if import_path else "",
        command=shlex.join(job.command),
        once=_ONCE.format(once=shlex.join(job.once)) if job.once else "",
        max_requeues=settings.max_requeues,
    )
