"""Workers on this machine: how many, on which devices, with how many threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reasonrun.errors import EnvironmentProblem, RecipeError
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

_QUERY_SECONDS = 30.0
_CPU_QUOTA_PATH = Path("/sys/fs/cgroup/cpu.max")  # "<microseconds|max> <period>" of control groups version 2


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who gets what. ``device_env[i]`` are the variables of generation worker i, ``through[i]`` what carries it elsewhere."""

    num_workers: int
    num_processes: int
    device_env: tuple[dict[str, str], ...]
    training_env: dict[str, str] = field(default_factory=dict)
    through: tuple[tuple[str, ...], ...] = ()


class Local:
    """Starts workers as processes of this machine."""

    class Settings(WorkerSettings):
        """Recipe fields of ``launcher: local``."""

        name: Literal["local"] = "local"
        num_workers: int = setting(
            1, Effect.OPERATIONAL, "Generation workers; the devices, or the cores, are divided among them.", ge=1
        )
        num_processes: int = setting(
            0, Effect.NUMERIC, "Processes of a training step; 0 takes one for each device, one on the CPU.", ge=0
        )
        sharding: Sharding = setting(
            "none",
            Effect.NUMERIC,
            "What training processes divide: none the batch alone; fsdp also weights, gradients and optimizer state.",
        )
        devices: Literal["auto", "cpu"] | tuple[int | str, ...] = setting(
            "auto", Effect.NUMERIC, "GPUs to use, by number or UUID; auto takes all visible ones, cpu none."
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._has_checked = False

    @property
    def residency(self) -> Residency:
        """What becomes of the engine while a trainer works."""
        return residency_of(self.settings, on_gpus=bool(self._devices()))

    def generation(
        self, *, recipe: RecipeParts, run_dir: RunPlace, interrupted: Callable[[], int], comparing: bool = False
    ) -> GenerationPool:
        """The pool for the recipe's engine; no process is started yet. For ``comparing`` it is one worker, on this machine.

        Raises EnvironmentProblem as ``check_devices`` does.
        """
        from reasonrun.workers.pool import GenerationPool

        placement = self.placement()
        self._check_devices()
        return GenerationPool(
            dotted_path(recipe.classes["engine"]),
            recipe.engine.model_dump_json(),
            num_workers=1 if comparing else placement.num_workers,
            attempt_dir=run_dir.attempt_dir,
            record_worker=run_dir.record_worker,
            name="comparing" if comparing else "generation",
            python=getattr(recipe.engine, "interpreter", None) or self.settings.python,
            device_env=placement.device_env[:1] if comparing else placement.device_env,
            through=None if comparing else placement.through or None,
            limits=self.settings.limits(self.settings.stall_seconds),
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
        """The worker for one trainer; no process is started yet. Raises EnvironmentProblem as ``check_devices`` does."""
        from reasonrun.workers.pool import TrainingWorker

        placement = self.placement()
        self._check_devices()
        return TrainingWorker(
            trainer_class_path,
            num_processes=placement.num_processes,
            sharding=self.settings.sharding,
            attempt_dir=run_dir.attempt_dir,
            record_worker=run_dir.record_worker,
            python=self.settings.python,
            env=placement.training_env,
            limits=self.settings.limits(self.settings.train_stall_seconds),
            interrupted=interrupted,
        )

    def placement(self) -> Placement:
        """Divide devices and cores.

        Raises:
            RecipeError: the devices cannot be divided evenly among the workers, or hold fewer than num_processes.
            EnvironmentProblem: the devices cannot be listed.
        """
        settings = self.settings
        devices = self._devices()
        num_processes = settings.num_processes or max(1, len(devices))
        if devices and num_processes > len(devices):
            raise RecipeError(
                f"launcher.num_processes: {num_processes} training processes for {len(devices)} devices",
                hint=f"allowed: 1 to {len(devices)}, or 0 for one each",
            )
        num_workers = settings.num_workers
        return Placement(
            num_workers=num_workers,
            num_processes=num_processes,
            device_env=tuple({**_visible(part), **_threads(num_workers)} for part in _divide(devices, num_workers)),
            training_env={**_visible(devices[:num_processes]), **_threads(num_processes)},
        )

    def _devices(self) -> list[str]:
        return find_devices() if self.settings.devices == "auto" else _named_devices(self.settings.devices)

    def _check_devices(self) -> None:
        """Once, before the first worker: afterwards it is our own workers that hold the devices."""
        if self._has_checked:
            return
        from reasonrun.launchers._devices import check_devices

        by_variable = self.settings.devices == "auto" and "CUDA_VISIBLE_DEVICES" in os.environ
        check_devices(self._devices(), "CUDA_VISIBLE_DEVICES" if by_variable else "launcher.devices")
        self._has_checked = True


def find_devices() -> list[str]:
    """GPUs that this process may use: those of CUDA_VISIBLE_DEVICES where it is set, else all that the driver lists.

    Raises EnvironmentProblem when there is a driver that does not answer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    query = shutil.which("nvidia-smi")
    if query is None:
        return []
    command = [query, "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except subprocess.CalledProcessError:
        return []  # the tool is installed, a driver is not
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(
            f"the GPU driver does not answer: {' '.join(command)} took more than {_QUERY_SECONDS:g} s",
            hint="name the devices with launcher.devices, or take launcher.devices=cpu",
        ) from None
    return listed.stdout.split()


def num_cores() -> int:
    """Cores that this process may use: its affinity, cut to the container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA_PATH.read_text().split()
    except (OSError, ValueError):
        return affinity
    return affinity if quota == "max" else max(1, min(affinity, int(quota) // int(period)))


def _named_devices(devices: Literal["cpu"] | Sequence[int | str]) -> list[str]:
    return [] if devices == "cpu" else [str(device) for device in devices]


def _divide(devices: Sequence[str], num_workers: int) -> list[Sequence[str]]:
    if len(devices) % num_workers:
        allowed = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise RecipeError(
            f"launcher.num_workers: {len(devices)} devices cannot be divided among {num_workers} workers",
            hint=f"allowed: {', '.join(allowed)}; or name fewer devices with launcher.devices",
        )
    share = len(devices) // num_workers
    return [devices[share * i : share * (i + 1)] for i in range(num_workers)]


def _visible(devices: Sequence[str]) -> dict[str, str]:
    # Empty hides all: a worker that was told to use the CPU must not find a GPU.
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}


def _threads(num_sharers: int) -> dict[str, str]:
    if "OMP_NUM_THREADS" in os.environ:
        return {}  # the user's choice
    return {"OMP_NUM_THREADS": str(max(1, num_cores() // num_sharers))}
