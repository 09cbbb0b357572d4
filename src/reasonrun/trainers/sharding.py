"""Weights, gradients and optimizer state divided among the processes that train together (FSDP2).

Every process holds a part of each parameter, its gradient and its moments. A layer's parameters are gathered before its
forward and its backward pass and given back after it, so all processes must run the same passes in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from reasonrun.errors import RecipeError
from reasonrun.trainers.folders import MOMENTS

_SHARD_FILES = "shard-*-of-*.safetensors"


def is_sharded(model: Any) -> bool:
    """Whether every process holds a part of ``model`` only."""
    return isinstance(model, FSDPModule)


def shard(model: Any, *, stored_as: torch.dtype | None, computed_as: torch.dtype | None) -> Any:
    """Divide a plain model on the CPU among the processes, in place; its parts move to this process's device.

    Args:
        model: a causal language model, adapters included.
        stored_as: dtype of the parts, such as float32 for master weights; None leaves what is there.
        computed_as: dtype of gathered weights and of the arithmetic on them; gradients are summed in float32.

    Raises:
        RecipeError: the model does not say which of its modules are layers.
    """
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=computed_as, reduce_dtype=torch.float32 if computed_as else None)
    # Layer by layer, so that no process ever holds the whole model in the larger dtype.
    for module in [*_layers(model), model]:
        for parameter in module.parameters():
            if stored_as is not None and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(stored_as)
        # The outermost one would by default stay gathered after a forward pass, also after one without a backward pass.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # A loss is its rows' share of the whole batch's, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a factor needs an operation that gloo lacks
    model.set_reduce_scatter_unused_params(True)  # an expert that no token of this process reached
    # The Trainer then prepares mixed precision only, and neither moves nor wraps the model.
    _base_of(model)._is_distributed_loading_by_transformers = True
    return model


def _base_of(model: Any) -> Any:
    """The model inside its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers(model: Any) -> list[Any]:
    base = _base_of(model)
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    if not layers:
        raise RecipeError(
            f"launcher.sharding=fsdp divides a model layer by layer, and {type(base).__name__} does not say which of its"
            " modules are layers (_no_split_modules)",
            hint="take launcher.sharding=none",
        )
    return layers


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this process may hold a part only. Every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, parameter: Any) -> torch.Tensor:
    """What of ``tensor``, complete in every process, belongs beside ``parameter``, on its device."""
    if isinstance(parameter, DTensor) and tensor.ndim:
        moved = tensor.to(parameter.device)
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to(parameter.device)


def copy_whole(model: Any, target: Any | None) -> None:
    """Copy a sharded model's weights into a plain one of the same architecture, in its dtype.

    Args:
        model: sharded; every process must call this.
        target: None in processes that need no copy.
    """
    plain = dict(target.named_parameters()) if target is not None else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gathered = whole(parameter.detach())
            if target is not None:
                plain[name].copy_(gathered)


# -- checkpoints: each process writes its own part -----------------------------------------------------------------


def write_shard(model: Any, optimizer: Any, folder: Path) -> None:
    """Write this process's part of weights and moments as one safetensors file."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # as in the start checkpoint
        tensors[f"weight.{name}"] = parameter
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state[parameter].items()}
    folder.mkdir(parents=True, exist_ok=True)
    local = {name: _local(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    save_file(local, folder / f"shard-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors")


def read_weights(model: Any, folder: Path) -> None:
    """Give a sharded model the weights that ``write_shard`` wrote, with any number of processes."""
    with _Shards(folder) as shards, torch.no_grad():
        for name, parameter in _trained(model):
            _local(parameter).copy_(shards.read(f"weight.{name}", parameter))


def read_optimizer(model: Any, optimizer: Any, folder: Path) -> None:
    """Give an optimizer the moments that ``write_shard`` wrote, with any number of processes."""
    with _Shards(folder) as shards:
        for name, parameter in _trained(model):
            state: dict[str, torch.Tensor] = {}
            for moment in MOMENTS:
                value = shards.read(f"{moment}.{name}", parameter).to(parameter.device)
                state[moment] = _as_part(value, parameter) if value.ndim else value
            optimizer.state[parameter] = state


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint was written by sharded training."""
    return any(folder.glob(_SHARD_FILES))


def _trained(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _as_part(local: torch.Tensor, parameter: Any) -> torch.Tensor:
    mesh, placements = parameter.device_mesh, parameter.placements
    part: torch.Tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return part


class _Shards:
    """The files of one checkpoint: this process's own where their number is that of the processes, else all."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob(_SHARD_FILES))
        self._is_own = len(self._paths) == dist.get_world_size()
        if self._is_own:
            self._paths = [self._paths[dist.get_rank()]]
        self._open = ExitStack()

    def __enter__(self) -> _Shards:
        self._files = [self._open.enter_context(safe_open(path, framework="pt")) for path in self._paths]
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def read(self, name: str, parameter: Any) -> torch.Tensor:
        """The part of a tensor that belongs beside ``parameter``."""
        first: torch.Tensor = self._files[0].get_tensor(name)
        if self._is_own or not first.ndim:
            return first
        return _local(part_like(torch.cat([file.get_tensor(name) for file in self._files]), parameter))
