"""What a training step leaves on disk: folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrun.errors import RunFailed
from reasonrun.model_folder import copy_all_but_weights
from reasonrun.probing import write_probe

if TYPE_CHECKING:
    import torch

_MOMENTS_FILE = "adamw.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit_folder(staged: Path, target: Path) -> None:
    """Give a finished folder its name: everything in it is on disk before the rename, the rename after it."""
    for directory, _, files in os.walk(staged):
        for name in files:
            _sync(Path(directory) / name)
        _sync(Path(directory))
    staged.rename(target)
    _sync(target.parent)


def write_model(model: Any, start_dir: Path, target: Path, probe_logps: Sequence[float]) -> None:
    """Write a model folder that any engine loads: new weights, everything else as in ``start_dir``.

    ``probe_logps`` go beside them, as evidence of what these weights compute.
    """
    staged = target.with_name(target.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    copy_all_but_weights(start_dir, staged)
    write_probe(staged, probe_logps)
    commit_folder(staged, target)


def moments_of(model: Any, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """AdamW's state by parameter name, each tensor as this process holds it."""
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        yield from ((f"{moment}.{name}", state[moment].detach()) for moment in MOMENTS if moment in state)


def write_moments(tensors: dict[str, torch.Tensor], target: Path) -> None:
    """Write AdamW's state by parameter name. Learning rate and the like are settings, so they are not in it."""
    from safetensors.torch import save_file

    staged = target.with_name(target.name + ".partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    save_file(tensors, staged / _MOMENTS_FILE)
    commit_folder(staged, target)


def read_moments(model: Any, optimizer: Any, source: Path, place: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    """Give a fresh optimizer the state that ``write_moments`` wrote.

    Args:
        model: to train.
        optimizer: over its parameters.
        source: the folder.
        place: gives what of a tensor belongs beside a parameter, on its device.

    Raises:
        RunFailed: the file is missing or belongs to another model.
    """
    from safetensors.torch import load_file

    path = source / _MOMENTS_FILE
    if not path.is_file():
        raise RunFailed(
            f"{path} does not exist, but the step carries its optimizer on.",
            hint="Set carry_optimizer=false, or train the previous step with keep_optimizer=True.",
        )
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        if f"exp_avg.{name}" not in tensors:
            continue
        state = {moment: tensors.pop(f"{moment}.{name}") for moment in MOMENTS}
        if state["exp_avg"].shape != parameter.shape:
            raise _misfit(path, f"{name} is {tuple(parameter.shape)} here, {tuple(state['exp_avg'].shape)} there")
        # A fused optimizer wants its step counter beside the parameter.
        optimizer.state[parameter] = {moment: place(tensor, parameter) for moment, tensor in state.items()}
    if tensors:
        raise _misfit(path, f"this model has no {sorted(tensors)[0].split('.', 1)[1]}")


def _misfit(path: Path, why: str) -> RunFailed:
    return RunFailed(
        f"The optimizer state in {path} does not fit the model: {why}.",
        hint="Carry an optimizer only to the same architecture, or set carry_optimizer=false.",
    )
