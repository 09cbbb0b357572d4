"""What every launcher of worker processes shares: recipe fields, limits, and what it needs from run and recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from reasonrun.settings import Effect, Settings, setting

if TYPE_CHECKING:
    from reasonrun.workers.pool import Limits


Residency = Literal["exit", "sleep", "resident"]


class RunPlace(Protocol):
    """The part of a run directory that workers need."""

    @property
    def attempt_dir(self) -> Path: ...

    def record_worker(self, pid: int, pgid: int) -> None: ...


class RecipeParts(Protocol):
    """The part of a resolved recipe that decides what a generation worker runs."""

    @property
    def engine(self) -> Any: ...

    @property
    def classes(self) -> Mapping[str, Any]: ...


class WorkerSettings(Settings):
    """Recipe fields of every launcher that starts worker processes."""

    residency: Literal["auto", "exit", "sleep", "resident"] = setting(
        "auto",
        Effect.OPERATIONAL,
        "While training, the engine's process exits, sleeps without its memory, or stays; auto stays on the CPU only.",
    )
    python: str | None = setting(
        None, Effect.OPERATIONAL, "Python executable of the workers; null takes the one that runs reasonrun."
    )
    start_seconds: float = setting(
        300.0, Effect.OPERATIONAL, "Longest start of a worker, before it counts as hanging.", gt=0
    )
    load_seconds: float = setting(
        1800.0, Effect.OPERATIONAL, "Longest load of a model, before it counts as hanging.", gt=0
    )
    stall_seconds: float = setting(
        600.0, Effect.OPERATIONAL, "Longest time without a new token, before a worker counts as hanging.", gt=0
    )
    train_stall_seconds: float = setting(
        1800.0, Effect.OPERATIONAL, "Longest time without an optimizer step, before training counts as hanging.", gt=0
    )

    def limits(self, stall_seconds: float, *, before_start_seconds: float = 0.0) -> Limits:
        """When a worker counts as hanging; ``before_start_seconds`` is what passes before its process is started."""
        from reasonrun.workers.pool import Limits

        return Limits(
            start_seconds=before_start_seconds + self.start_seconds,
            load_seconds=self.load_seconds,
            stall_seconds=stall_seconds,
        )


def residency_of(settings: WorkerSettings, *, on_gpus: bool) -> Residency:
    """What becomes of the engine while a trainer works: on the CPU memory is plenty, on GPUs it is all taken."""
    if settings.residency == "auto":
        return "exit" if on_gpus else "resident"
    return settings.residency


def dotted_path(cls: type) -> str:
    """``package.module.Class``, as a worker finds it."""
    return f"{cls.__module__}.{cls.__qualname__}"
