"""Talking to Slurm: what it refuses becomes a message with the cheapest next step."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from reasonrun.contracts import Submission
from reasonrun.errors import EnvironmentProblem, RunConflict

JOBS_FOLDER = "jobs"
SCRIPT_NAME, RECORD_NAME = "submit.sh", "job.json"
_ANSWER_SECONDS = 90.0  # sbatch itself tries for longer while a controller is away
_HERE_INSTEAD = "or run on this machine with launcher=local"

_REFUSALS = {
    r"account/partition|Invalid account": "launcher.account names one of yours; list them: sacctmgr show assoc user=$USER",
    r"Invalid qos": "launcher.qos names one that you may use; list them: sacctmgr show assoc user=$USER format=qos",
    r"time limit": "launcher.time_minutes within the partition's limit; see it: sinfo -o '%P %l'",
    r"node configuration|CPU count|Memory|More processors|node count|Gres|gres|GPU|gpu": (
        "ask for no more than a node has (launcher.num_nodes, gpus_per_node, cpus_per_task, memory_gib);"
        " see it: sinfo -o '%P %D %c %m %G'"
    ),
}
_AWAY = re.compile(
    r"[Uu]nable to contact|Connection refused|[Cc]ommunication|Socket timed out|[Mm]unge|credential"
    r"|configuration source|configuration file"
)


def check_programs() -> None:
    """Raises EnvironmentProblem when Slurm's commands are not on this machine."""
    missing = [name for name in ("sbatch", "squeue") if shutil.which(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"launcher slurm needs Slurm, and {missing[0]} is not on the PATH of this machine",
            hint=f"run the same command on a login node of the cluster (perhaps after `module load slurm`), {_HERE_INSTEAD}",
        )


def refuse_second(jobs: Path, folder: Path) -> None:
    """Raises RunConflict when the last job that was submitted for this folder still waits or runs."""
    try:
        record = json.loads((jobs / RECORD_NAME).read_text())
        job_id, name = str(record["job_id"]), str(record["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    done = _ask(["squeue", "--noheader", "--jobs", job_id, "--format", "%T %j"])
    if done.returncode == 0:
        for line in done.stdout.splitlines():
            state, _, found = line.strip().partition(" ")
            if found == name:
                raise RunConflict(
                    f"{folder} is submitted already: Slurm job {job_id} is {state}",
                    hint=f"follow it with `squeue -j {job_id}`, or end it first with `scancel {job_id}`",
                )
    elif _AWAY.search(done.stderr):
        raise _away(done.stderr)


def submit(text: str, jobs: Path, folder: Path, partition: str | None) -> Submission:
    """Write the script, then submit it.

    Raises:
        EnvironmentProblem: Slurm does not answer, or refuses the job.
    """
    script = jobs / SCRIPT_NAME
    _write(script, text)
    done = _ask(["sbatch", "--parsable", str(script)])
    if done.returncode:
        raise _refusal(done.stderr, script, partition)
    job_id = done.stdout.strip().splitlines()[-1].partition(";")[0]
    log = jobs / f"{job_id}.log"
    follow = (f"squeue -j {job_id}", f"tail -f {log}", f"reasonrun status {folder}")
    _write(jobs / RECORD_NAME, json.dumps({"job_id": job_id, "name": folder.name, "follow": follow[0]}) + "\n")
    return Submission(job_id=job_id, queue="Slurm", script=script, log=log, follow=follow)


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _away(f"{command[0]} took more than {_ANSWER_SECONDS:g} s") from None


def _away(said: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"Slurm does not answer: {_one_line(said)}",
        hint=f"see with `scontrol ping` whether this machine reaches its controller, and try again, {_HERE_INSTEAD}",
    )


def _refusal(said: str, script: Path, partition: str | None) -> EnvironmentProblem:
    if "partition" in said and "account" not in said:
        what = f"Slurm has no partition {partition!r}" if partition else f"Slurm refused the job: {_one_line(said)}"
        return EnvironmentProblem(what, hint=f"launcher.partition is one of: {_partitions()}")
    if _AWAY.search(said):
        return _away(said)
    known = next((hint for pattern, hint in _REFUSALS.items() if re.search(pattern, said)), "")
    hint = known or f"try the script by hand: sbatch --test-only {script}"
    return EnvironmentProblem(f"Slurm refused the job: {_one_line(said)}", hint=hint)


def _partitions() -> str:
    listed = _ask(["sinfo", "--noheader", "--format", "%R"])
    return ", ".join(sorted(set(listed.stdout.split()))) or "none that you may use"


def _one_line(said: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in said.splitlines()]
    return "; ".join(line for line in lines if line) or "it said nothing"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
