"""A whole run as one job of a Slurm cluster: submitted outside, at work like ``local`` inside its allocation."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import field_validator, model_validator

from reasonrun.contracts import Submission
from reasonrun.errors import EnvironmentProblem
from reasonrun.launchers import _slurm_queue as queue
from reasonrun.launchers._slurm_script import OWN_JOB, OWNED_PARAMETERS, Job, is_writable, script_text
from reasonrun.launchers.local import Local, Placement
from reasonrun.settings import Effect, setting

_PARAMETER = re.compile(r"[a-z][a-z-]*")


class Slurm(Local):
    """Submits the command as one job, and in that job starts workers on the nodes that it was given.

    The supervisor, training and the first share of the generation workers are processes of the job's first node; the
    other generation workers are steps (``srun``) on the further nodes.
    """

    class Settings(Local.Settings):
        """Recipe fields of ``launcher: slurm``; what Slurm is not told, the cluster's own defaults decide."""

        name: Literal["slurm"] = "slurm"  # type: ignore[assignment]
        partition: str | None = setting(None, Effect.OPERATIONAL, "Partition of the job.", min_length=1)
        account: str | None = setting(None, Effect.OPERATIONAL, "Account that the job is charged to.", min_length=1)
        qos: str | None = setting(None, Effect.OPERATIONAL, "Quality of service of the job.", min_length=1)
        time_minutes: int | None = setting(
            None, Effect.OPERATIONAL, "Time limit of one start of the job; the run may need several.", ge=1
        )
        num_nodes: int = setting(
            1, Effect.OPERATIONAL, "Nodes of the job; generation workers are divided among them.", ge=1
        )
        gpus_per_node: int | None = setting(None, Effect.NUMERIC, "GPUs of each node.", ge=0)
        cpus_per_task: int | None = setting(None, Effect.OPERATIONAL, "CPUs of each node.", ge=1)
        memory_gib: int | None = setting(None, Effect.OPERATIONAL, "Memory of each node in GiB.", ge=1)
        signal_seconds: int = setting(
            120,
            Effect.OPERATIONAL,
            "How long before the time limit the run is asked to stop at its next boundary.",
            ge=0,
            le=65535,
        )
        max_requeues: int = setting(
            50, Effect.OPERATIONAL, "Starts of the job, after the first, until it is left to be submitted again.", ge=0
        )
        setup: tuple[str, ...] = setting(
            (), Effect.OPERATIONAL, "Lines of the job's script before the command, such as `module load cuda`."
        )
        extra: dict[str, str | int | bool] = setting(
            None,
            Effect.OPERATIONAL,
            "Further parameters of sbatch by their long names: {gres: gpu:a100:4, exclusive: true}.",
            default_factory=dict,
        )

        @field_validator("extra")
        @classmethod
        def _parameters_of_sbatch(cls, extra: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
            for key, value in extra.items():
                if not _PARAMETER.fullmatch(key):
                    raise ValueError(f"{key!r} is no long name of a parameter of sbatch, such as gres or mail-type")
                if key in OWNED_PARAMETERS:
                    raise ValueError(f"{key} is set by reasonrun: {OWNED_PARAMETERS[key]}")
                if value is False or not is_writable(str(value)):
                    raise ValueError(
                        f"{key} must be a number, text without a quote, or true for a parameter without a value"
                    )
            return extra

        @model_validator(mode="after")
        def _as_many_workers_on_every_node(self) -> Self:
            if self.num_workers % self.num_nodes:
                raise ValueError(
                    f"{self.num_workers} generation workers cannot be divided among {self.num_nodes} nodes;"
                    f" num_workers is a multiple of {self.num_nodes}"
                )
            return self

    settings: Settings

    def submit(
        self, arguments: Sequence[str], *, once: Sequence[str] = (), folder: Path, program: Sequence[str]
    ) -> Submission | None:
        """Hand the command to Slurm, to be run in this working folder; None within the job that came of it.

        Args:
            arguments: what follows the program: ``train``, the recipe, overrides, flags.
            once: flags for the first start alone.
            folder: the run directory; script, log and job number go to ``folder/jobs``.
            program: the command's beginning: interpreter and module.

        Raises:
            EnvironmentProblem: submitit or Slurm is missing or does not answer, or Slurm refuses the job.
            RunConflict: a job for this folder waits or runs.
        """
        if in_own_job():
            return None
        jobs = folder.resolve() / queue.JOBS_FOLDER
        queue.check_programs()
        text = script_text(
            Job(command=(*program, *arguments), once=tuple(once), name=folder.name, jobs=jobs, cwd=Path.cwd()),
            self.settings,
        )
        queue.refuse_second(jobs, folder)
        return queue.submit(text, jobs, folder, self.settings.partition)

    def placement(self) -> Placement:
        """Divide the workers among the nodes, and on each its devices and cores; see ``Local.placement``.

        Raises:
            EnvironmentProblem: this process is in no job of its own, or the job has another number of nodes.
        """
        if not in_own_job():
            raise EnvironmentProblem(
                "launcher slurm works inside the job that it submits, and this process is in none",
                hint="reasonrun train, eval and sweep submit it; elsewhere, and in a salloc of yours, take launcher=local",
            )
        nodes = job_nodes()
        if self.settings.num_workers % len(nodes):
            raise EnvironmentProblem(
                f"the job has {len(nodes)} nodes, and {self.settings.num_workers} generation workers cannot be divided"
                " among them",
                hint=f"submit it with launcher.num_nodes={len(nodes)} and a multiple of that for launcher.num_workers",
            )
        per_node = self.settings.num_workers // len(nodes)
        here = Local(self.settings.model_copy(update={"num_workers": per_node})).placement()
        places = [(node, env) for node in nodes for env in here.device_env]
        through = [
            carrier(node, f"generation-{i}", env) if node != nodes[0] else () for i, (node, env) in enumerate(places)
        ]
        return Placement(
            num_workers=self.settings.num_workers,
            num_processes=here.num_processes,
            device_env=here.device_env * len(nodes),
            training_env=here.training_env,
            through=tuple(through),
        )


def in_own_job() -> bool:
    """Whether this process runs in a job whose script reasonrun wrote."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get(OWN_JOB) == os.environ["SLURM_JOB_ID"]


def job_nodes() -> list[str]:
    """The nodes of the job that this process is in, its own first."""
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1":
        return [os.environ.get("SLURMD_NODENAME", "")]
    from submitit.slurm.slurm import SlurmJobEnvironment

    nodes: list[str] = SlurmJobEnvironment().hostnames
    own = os.environ["SLURMD_NODENAME"]
    return [own, *(node for node in nodes if node != own)]


def carrier(node: str, name: str, env: Mapping[str, str]) -> tuple[str, ...]:
    """The beginning of a command that runs the rest of it on a node of this job, as a step of this name."""
    module = (sys.executable, "-P", "-m", "reasonrun.launchers._slurm_step")
    return (*module, node, name, *(f"{variable}={value}" for variable, value in env.items()), "--")
