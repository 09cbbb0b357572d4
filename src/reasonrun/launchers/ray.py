"""Workers as actors of a Ray cluster, each in a placement group of its own."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from reasonrun.errors import EnvironmentProblem, Stopped
from reasonrun.launchers.worker_settings import (
    RecipeParts,
    Residency,
    RunPlace,
    WorkerSettings,
    dotted_path,
    residency_of,
)
from reasonrun.settings import Effect, setting
from reasonrun.training import Sharding

if TYPE_CHECKING:
    from reasonrun.workers.pool import GenerationPool, TrainingWorker

_HEAD_SECONDS = 120.0
_POLL_SECONDS = 0.1


class Ray:
    """Starts workers on the nodes of a Ray cluster. The supervisor speaks to a relay for each, and imports no Ray."""

    class Settings(WorkerSettings):
        """Recipe fields of ``launcher: ray``."""

        name: Literal["ray"] = "ray"
        address: str | None = setting(
            None,
            Effect.OPERATIONAL,
            "host:port of the cluster, or local for one that lasts as long as the run; null joins the Ray that was started "
            "on this machine (or RAY_ADDRESS), and starts one where there is none.",
        )
        num_workers: int = setting(1, Effect.OPERATIONAL, "Generation workers.", ge=1)
        gpus_per_worker: float = setting(
            0.0, Effect.NUMERIC, "GPUs of a generation worker; may be a share of one.", ge=0
        )
        cpus_per_worker: float = setting(
            1.0, Effect.NUMERIC, "Cores of a generation worker, and threads of its libraries.", ge=0
        )
        resources: dict[str, float] = setting(
            {}, Effect.OPERATIONAL, "Further resources of a generation worker, by the names that the nodes declare."
        )
        training_gpus: int = setting(0, Effect.NUMERIC, "GPUs of the training worker, all of one node.", ge=0)
        training_cpus: float = setting(1.0, Effect.NUMERIC, "Cores of the training worker.", ge=0)
        training_resources: dict[str, float] = setting(
            {}, Effect.OPERATIONAL, "Further resources of the training worker."
        )
        num_processes: int = setting(
            0, Effect.NUMERIC, "Processes of a training step; 0 takes one for each of its GPUs, one on the CPU.", ge=0
        )
        strategy: Literal["SPREAD", "PACK"] = setting(
            "SPREAD",
            Effect.OPERATIONAL,
            "Whether generation workers go to different nodes or share as few as possible.",
        )
        sharding: Sharding = setting(
            "none", Effect.NUMERIC, "What the processes of a training step divide; see launcher local."
        )
        shared_path: Literal["auto", "yes", "no"] = setting(
            "auto",
            Effect.OPERATIONAL,
            "Whether nodes see the run directory and the models under the same paths; auto looks, and sends what they "
            "do not see.",
        )
        cache_dir: str | None = setting(
            None, Effect.OPERATIONAL, "Folder on the nodes for what is sent; null takes one in their temporary folder."
        )
        place_seconds: float = setting(
            120.0, Effect.OPERATIONAL, "Longest wait for room in the cluster, before the run stops.", gt=0
        )

        @field_validator("address")
        @classmethod
        def _is_no_client(cls, address: str | None) -> str | None:
            if address and address.startswith("ray://"):
                raise ValueError("Ray Client hides the loss of nodes; start the run on a node, with address host:port")
            return address

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._head: subprocess.Popen[bytes] | None = None
        self._env: dict[str, str] = {}
        self._address = settings.address if settings.address not in (None, "local") else ""

    @property
    def residency(self) -> Residency:
        """Whether generation workers leave, and give their GPUs back to the cluster, while a trainer works."""
        return residency_of(self.settings, on_gpus=self.settings.gpus_per_worker + self.settings.training_gpus > 0)

    def generation(
        self, *, recipe: RecipeParts, run_dir: RunPlace, interrupted: Callable[[], int], comparing: bool = False
    ) -> GenerationPool:
        """The pool for the recipe's engine; no worker is started yet. For ``comparing`` it is one worker.

        Raises EnvironmentProblem without Ray.
        """
        from reasonrun.workers.pool import GenerationPool

        settings = self.settings
        num_workers = 1 if comparing else settings.num_workers
        self._find_cluster(run_dir, interrupted)
        resources = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker, **settings.resources}
        return GenerationPool(
            dotted_path(recipe.classes["engine"]),
            recipe.engine.model_dump_json(),
            num_workers=num_workers,
            attempt_dir=run_dir.attempt_dir,
            record_worker=run_dir.record_worker,
            name="comparing" if comparing else "generation",
            python=getattr(recipe.engine, "interpreter", None) or settings.python,
            env=self._env,
            through=[
                self._relay(
                    run_dir,
                    resources,
                    what=f"generation worker {index + 1} of {num_workers}",
                    fewer="launcher.num_workers, cpus_per_worker, gpus_per_worker, resources",
                    index=index,
                )
                for index in range(num_workers)
            ],
            limits=settings.limits(settings.stall_seconds, before_start_seconds=settings.place_seconds),
            interrupted=interrupted,
        )

    def training(
        self,
        trainer_class_path: str,
        *,
        recipe: RecipeParts,
        run_dir: RunPlace,
        interrupted: Callable[[], int],
    ) -> TrainingWorker:
        """The worker for one trainer; not started yet. Raises EnvironmentProblem without Ray."""
        from reasonrun.workers.pool import TrainingWorker

        settings = self.settings
        self._find_cluster(run_dir, interrupted)
        resources = {"CPU": settings.training_cpus, "GPU": settings.training_gpus, **settings.training_resources}
        fewer = "launcher.training_cpus, training_gpus, or launcher.residency=exit if generation workers hold the rest"
        return TrainingWorker(
            trainer_class_path,
            num_processes=settings.num_processes or max(1, settings.training_gpus),
            sharding=settings.sharding,
            attempt_dir=run_dir.attempt_dir,
            record_worker=run_dir.record_worker,
            python=settings.python,
            env=self._env,
            through=self._relay(run_dir, resources, what="the training worker", fewer=fewer, index=0),
            limits=settings.limits(settings.train_stall_seconds, before_start_seconds=settings.place_seconds),
            interrupted=interrupted,
        )

    def _relay(
        self, run_dir: RunPlace, resources: dict[str, float], *, what: str, fewer: str, index: int
    ) -> tuple[str, ...]:
        from reasonrun.workers.on_ray.cluster import Place
        from reasonrun.workers.on_ray.relay import Options

        settings = self.settings
        place = Place(
            what=what,
            fewer=fewer,
            resources={name: amount for name, amount in resources.items() if amount},
            index=index,
            spread=settings.strategy == "SPREAD",
            seconds=settings.place_seconds,
        )
        options = Options(
            address=self._address,
            place=place,
            env=_env(resources),
            shared_path=settings.shared_path,
            cache_dir=settings.cache_dir or "",
            attempt_dir=str(run_dir.attempt_dir.absolute()),
        )
        return (sys.executable, "-P", "-m", "reasonrun.workers.on_ray.relay", options.model_dump_json())

    def _find_cluster(self, run_dir: RunPlace, interrupted: Callable[[], int]) -> None:
        """Join or start the Ray of this machine, unless an address is known."""
        from reasonrun.workers.spawning import import_path

        if self._address and (self._head is None or self._head.poll() is None):
            return
        log_path = run_dir.attempt_dir / "logs" / "ray.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            self._head = subprocess.Popen(
                [sys.executable, "-P", "-m", "reasonrun.workers.on_ray.head", self.settings.address or ""],
                env={**os.environ, "PYTHONPATH": import_path()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        run_dir.record_worker(self._head.pid, self._head.pid)
        found = json.loads(_first_line(self._head, interrupted) or "{}")
        if "address" not in found:
            raise EnvironmentProblem(
                found.get("message", f"Ray did not start within {_HEAD_SECONDS:g} s; its log is {log_path}"),
                hint=found.get("hint", "`ray start --head` on this machine shows why"),
            )
        self._address = found["address"]
        self._env = {"RAY_AUTH_MODE": found["auth_mode"]} if found["auth_mode"] else {}


def _first_line(process: subprocess.Popen[bytes], interrupted: Callable[[], int]) -> bytes:
    """What the process writes first; ends it and gives nothing when it takes too long. Raises Stopped."""
    assert process.stdout is not None
    deadline = time.monotonic() + _HEAD_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < deadline:
            if code := interrupted():
                process.kill()
                raise Stopped(
                    "stopped while Ray was started",
                    exit_code=code if code is not True else Stopped.exit_code,
                    hint="the same command continues this run",
                )
            if selector.select(_POLL_SECONDS):
                return process.stdout.readline()
    process.kill()
    return b""


def _env(resources: dict[str, float]) -> dict[str, str]:
    env = {} if resources["GPU"] else {"CUDA_VISIBLE_DEVICES": ""}  # told to use the CPU, it must not find a GPU
    if "OMP_NUM_THREADS" not in os.environ:  # the user's choice
        env["OMP_NUM_THREADS"] = str(max(1, int(resources["CPU"])))
    return env
