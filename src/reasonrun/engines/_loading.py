"""Models from folders: safetensors only, and no code from them unless the recipe pins its commit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from reasonrun.engines._slots import ATTENTION, attend
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from reasonrun.model_folder import ModelFolder

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device that a recipe names. Raises EnvironmentProblem when this machine or this torch lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(
            f"engine.device={name} cannot be used with torch {torch.__version__}: {reason}",
            hint="Set engine.device=auto or cpu, or install a torch build for that device.",
        ) from error
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic that a recipe names; ``auto`` is bfloat16 on a GPU, float32 on the CPU."""
    return _DTYPES[("bfloat16" if device.type == "cuda" else "float32") if name == "auto" else name]


def load_model(folder: ModelFolder, *, device: torch.device, dtype: str, trusted_commit: str) -> Any:
    """A causal language model in evaluation mode, with the engine's attention.

    Raises:
        EnvironmentProblem: transformers does not know the architecture, it has layers that this engine cannot decode,
            or memory does not suffice.
        RecipeError: the model brings code of its own, and the recipe does not allow it.
    """
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    folder.weight_paths()
    # A bar per load would drown a worker's log: every round loads.
    logging.disable_progress_bar()
    trusted = _trusted(folder, trusted_commit)
    options = {"trust_remote_code": trusted, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder.path, **options)
        _check_layers(config.get_text_config(), folder)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=config,
            dtype=find_dtype(dtype, device),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
        _check_complete(sorted(loaded["missing_keys"]), folder)
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"The model in {folder.path} does not fit on {device}.",
            hint="Set engine.dtype=bfloat16, or use a smaller model or a device with more memory.",
        ) from error
    except (ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _explained(folder, error) from error
    if not getattr(model, "_supports_attention_backend", False):
        raise _unsupported(folder, "its attention cannot be replaced")
    AttentionInterface.register(ATTENTION, attend)
    model.set_attn_implementation(ATTENTION)
    return model


def copy_weights(model: nn.Module, folder: ModelFolder) -> bool:
    """Copy a folder's weights into a model of the same architecture; False if names or shapes do not match.

    Much faster than a new model: nothing is built, initialised or moved. Nothing is copied unless everything fits.
    """
    try:
        return _copy_weights(model, folder)
    except SafetensorError as error:
        raise _explained(folder, error) from error


def _copy_weights(model: nn.Module, folder: ModelFolder) -> bool:
    targets = dict(model.state_dict(keep_vars=False))
    sources: list[Any] = [safe_open(path, framework="pt") for path in folder.weight_paths()]
    shapes = {name: tuple(source.get_slice(name).get_shape()) for source in sources for name in source.keys()}  # noqa: SIM118
    if any(name not in targets or tuple(targets[name].shape) != shape for name, shape in shapes.items()):
        return False
    written = {targets[name].data_ptr() for name in shapes}
    # A tied output layer is not in the file: it shares the memory of the embedding, which is.
    if any(tensor.data_ptr() not in written for tensor in targets.values()):
        return False
    with torch.no_grad():
        for source in sources:
            for name in source.keys():  # noqa: SIM118  (not a dict)
                targets[name].copy_(source.get_tensor(name))
    return True


def copy_tensors(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors by name over the model's own, in its arithmetic and on its device.

    Raises:
        RunFailed: a name or shape is not the model's, or one of its parameters is missing: it would answer with a mixture.
    """
    targets = dict(model.named_parameters(remove_duplicate=False))
    written = set()
    with torch.no_grad():
        for name, tensor in weights:
            target = targets.get(name)
            if target is None or target.shape != tensor.shape:
                raise RunFailed(f"the engine's model has no parameter {name} of shape {tuple(tensor.shape)}")
            target.copy_(tensor)
            written.add(target.data_ptr())
    missing = [name for name, target in targets.items() if target.data_ptr() not in written]
    if missing:
        raise RunFailed(f"the trainer gave no weights for {', '.join(missing[:3])} of the engine's model")


def longest_window(config: Any) -> int | None:
    """Tokens within which every layer sees everything; None when all layers always do.

    A layer with a sliding window equals full attention up to the window's length.
    """
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return int(window) if kinds is None or "sliding_attention" in kinds else None


def _check_complete(missing: list[str], folder: ModelFolder) -> None:
    """transformers draws weights that the files lack at random, and only warns."""
    if missing:
        raise EnvironmentProblem(
            f"The weight files in {folder.path} lack {len(missing)} of the model's weights: {', '.join(missing[:3])} …",
            hint="Copy or download the folder again; if config.json is of another model, take its own.",
        )


def _check_layers(config: Any, folder: ModelFolder) -> None:
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise _unsupported(folder, f"it has layers of kind {', '.join(sorted(unknown))}")


def _trusted(folder: ModelFolder, commit: str) -> bool:
    if not commit or "auto_map" not in folder.config:
        return False
    found = folder.path.resolve().name
    if found != commit:
        raise RecipeError(
            f"engine.trust_remote_code_commit={commit} does not name the code in {folder.path}, which is of {found}.",
            hint="Name the model's Hub commit there and in model.revision, after reading its code.",
        )
    return True


def _explained(folder: ModelFolder, error: Exception) -> RecipeError | EnvironmentProblem:
    if "trust_remote_code" in str(error):
        return RecipeError(
            f"The model in {folder.path} runs Python code of its own, which the recipe does not allow.",
            hint="Read that code, then set engine.trust_remote_code_commit and model.revision to the commit you read.",
        )
    reason = str(error).strip().splitlines()[0]
    return EnvironmentProblem(
        f"transformers cannot load the model in {folder.path}: {reason}",
        hint="Upgrade transformers if the model is newer than it; otherwise copy the folder again.",
    )


def _unsupported(folder: ModelFolder, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"The Hugging Face engine cannot decode the model in {folder.path}: {reason}.",
        hint="Use engine=vllm for this model.",
    )


def check_window(config: Any, num_tokens: int, path: Path) -> None:
    """Raise EnvironmentProblem when a sequence outgrows a sliding window, which this engine would not honour."""
    window = longest_window(config)
    if window is not None and num_tokens > window:
        raise EnvironmentProblem(
            f"A sequence of {num_tokens} tokens outgrows the {window}-token attention window of the model in {path}.",
            hint="Use engine=vllm for this model, or shorten prompts and sampling.max_new_tokens.",
        )
