"""The weights of a model in training, as an engine would load them from disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from reasonrun.trainers.sharding import whole


def live_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the plain model; adapters come merged, without touching what is trained.

    Of a sharded model each tensor is gathered in turn, so every process must take all of them. Merging in place and
    taking it back would round the frozen weights a little every time.
    """
    if not hasattr(model, "merge_and_unload"):
        yield from ((name, whole(parameter.detach())) for name, parameter in model.named_parameters())
        return
    base = model.get_base_model()
    adapted = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in base.named_parameters():
        owner, _, rest = name.partition(".base_layer.")
        if owner in adapted:
            weight = whole(parameter.detach())
            if rest == "weight":
                for adapter in adapted[owner].active_adapters:
                    weight = weight + whole(adapted[owner].get_delta_weight(adapter).detach()).to(weight.dtype)
            yield f"{owner}.{rest}", weight
        elif ".lora_" not in name:
            yield name, whole(parameter.detach())
