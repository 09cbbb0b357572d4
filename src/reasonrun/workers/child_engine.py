"""An engine in a process of its own that serves a trainer: weights go to it through files in memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reasonrun.generation import Completion, Request
from reasonrun.model_folder import ModelFolder, copy_all_but_weights
from reasonrun.records import Checkpoint
from reasonrun.workers.pool import GenerationPool

_MEMORY = Path("/dev/shm")


class ChildEngine:
    """What an on-policy trainer samples with when the engine needs another interpreter than the trainer.

    The process is a child of the trainer's and ends with it. ``update`` writes the weights as safetensors into memory and has the
    child read them; the objective compares the probabilities of every sampling, so weights that did not arrive are noticed.

    Args:
        class_path: dotted path of the engine's class.
        settings: its settings.
        out_dir: of the job; the log of the engine goes there.
    """

    def __init__(self, class_path: str, settings: Any, out_dir: Path) -> None:
        self._pool = GenerationPool(
            class_path,
            settings.model_dump_json(),
            num_workers=1,
            attempt_dir=out_dir,
            record_worker=lambda pid, pgid: None,  # the kernel ends it with its parent
            python=getattr(settings, "interpreter", None),
            env=_own_device(),
            name="engine",
        )
        self._start: Checkpoint | None = None
        self._num_updates = 0
        self._out_dir = out_dir
        run = Path(str(out_dir.resolve()).partition("/attempts/")[0])
        self._name = f"{_prefix(run)}{os.environ.get('LOCAL_RANK', '0')}"
        self._folder = _MEMORY / self._name

    @property
    def num_tokens_made(self) -> int:
        """Tokens that the child has shown so far."""
        return self._pool.num_done

    def load(self, checkpoint: Checkpoint) -> None:
        """Start the child, with ``checkpoint`` in place."""
        self._start = checkpoint.model_copy(update={"adapter": None})  # what is pushed comes merged
        self._pool.load(self._start)

    def update(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Give the child these tensors by their names in a checkpoint, in the dtype of the model it was started with."""
        import torch
        from safetensors.torch import save_file

        assert self._start is not None
        config = ModelFolder(Path(self._start.path)).config
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
        seen: set[int] = set()
        tensors = {}
        for name, tensor in weights:
            if tensor.data_ptr() not in seen:  # a tied output layer is stored once, as the embedding
                seen.add(tensor.data_ptr())
                tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = _with_room(sum(tensor.nbytes for tensor in tensors.values()), self._out_dir) / self._name
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        copy_all_but_weights(Path(self._start.path), self._folder)
        save_file(tensors, self._folder / "model.safetensors")
        del tensors
        self._num_updates += 1
        live = self._start.model_copy(update={"path": str(self._folder), "weights": f"update-{self._num_updates}"})
        self._pool.load(live)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """As the engine's own."""
        for _, completions in self._pool.generate([(0, requests)]):
            yield from completions

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """As the engine's own."""
        return self._pool.logprobs(sequences)

    def sleep(self) -> None:
        """Have the child give its memory back."""
        self._pool.sleep()

    def close(self) -> None:
        """End the child, and free the memory of the weights."""
        self._pool.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def remove_weights(run_path: Path) -> None:
    """Free the memory that trainers of this run, which were ended, have left their weights in."""
    for folder in _MEMORY.glob(f"{_prefix(run_path)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(run_path: Path) -> str:
    return f"reasonrun-weights-{hashlib.sha256(str(run_path.resolve()).encode()).hexdigest()[:16]}-"


def _with_room(num_bytes: int, otherwise: Path) -> Path:
    """Memory, where it is offered as files and large enough: containers often have 64 MB."""
    with contextlib.suppress(OSError):
        if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 1.1 * num_bytes:
            return _MEMORY
    return otherwise


def _own_device() -> dict[str, str]:
    """One of several training processes shares its GPU with its own engine, and with no other's."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return {"CUDA_VISIBLE_DEVICES": visible[rank]} if rank < len(visible) and "RANK" in os.environ else {}
