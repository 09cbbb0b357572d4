"""The weighted average of several models, tensor by tensor: linear merging, model soups.

Wortsman et al. 2022 (arXiv 2203.05482) average models that were fine-tuned from one; Kim et al. 2024 (arXiv 2405.01535,
Prometheus 2) a judge of single answers with a judge of pairs, with equal weights. Run as a process of its own by
``workers/merging.py``; needs neither torch nor more memory than a slice of a tensor for each model.

python -m reasonrun.merging OUT_DIR WEIGHT MODEL_DIR WEIGHT MODEL_DIR …

The format of safetensors is eight bytes that give the length of a header, the header (JSON: data type, shape and place of
each tensor), and the tensors. Headers of the result are those of the first model, byte for byte.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.errors import ReasonrunError, RecipeError, RunFailed
from reasonrun.model_folder import INDEX_NAME, ModelFolder, copy_all_but_weights

Floats = npt.NDArray[np.floating[Any]]

_STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_SLICE = 1 << 22  # elements that are in memory at a time, for each model
_NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes ``start`` to ``end`` of a file. ``dtype`` is what safetensors calls it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def is_float(self) -> bool:
        return self.dtype in _STORED

    def slices(self) -> Iterator[bytes]:
        """The tensor's bytes, in as many slices for every type of float. Raises RunFailed when the file ends before."""
        width = _STORED[self.dtype].itemsize if self.is_float else 1
        with self.path.open("rb") as file:
            file.seek(self.start)
            for begin in range(self.start, self.end, _SLICE * width):
                size = min(_SLICE * width, self.end - begin)
                data = file.read(size)
                if len(data) != size:
                    raise RunFailed(f"{self.path} is damaged: it ends before its last tensor.")
                yield data


def read_header(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """The first bytes of a safetensors file, up to its tensors, and the tensors by name, in the order of the file.

    Raises:
        RunFailed: it is no such file.
    """
    try:
        with path.open("rb") as file:
            size = file.read(8)
            header = file.read(int.from_bytes(size, "little"))
        begin = len(size) + len(header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        tensors = {
            name: Tensor(path, entry["dtype"], tuple(entry["shape"]), *(begin + n for n in entry["data_offsets"]))
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFailed(f"{path} is damaged: it is no safetensors file ({error}).") from None
    return size + header, dict(sorted(tensors.items(), key=lambda item: item[1].start))


def tensors_of(model_dir: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name, from the files that its index names, or from those that are there."""
    found: dict[str, Tensor] = {}
    for path in ModelFolder(model_dir).weight_paths():
        tensors = read_header(path)[1]
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise RecipeError(
                f"{model_dir} holds the tensor {twice[0]} twice, in {found[twice[0]].path.name} and {path.name}"
            )
        found |= tensors
    return found


def misfits(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Why two models cannot be averaged, a line for each tensor; empty when they can."""
    lines = [f"{name} is in the first only" for name in first if name not in other]
    lines += [f"{name} is in the other only" for name in other if name not in first]
    for name in (name for name in first if name in other):
        a, b = first[name], other[name]
        if a.shape != b.shape:
            lines.append(f"{name} has shape {list(a.shape)} and {list(b.shape)}")
        elif a.dtype != b.dtype and not (a.is_float and b.is_float):
            lines.append(f"{name} has type {a.dtype} and {b.dtype}")
    return lines


def check_fit(models: Sequence[Path]) -> None:
    """Raises RecipeError unless all models have the first one's tensors; only headers are read."""
    first = tensors_of(models[0])
    for model in models[1:]:
        lines = misfits(first, tensors_of(model))
        if lines:
            more = f"\n  … and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
            raise RecipeError(
                f"{models[0]} and {model} cannot be merged, their tensors differ:"
                + "".join(f"\n  {line}" for line in lines[:_NAMED])
                + more,
                hint="merge models of one architecture, best such as were trained from the same base",
            )


def decode(data: bytes, dtype: str) -> Floats:
    """Numbers of a stored tensor, in float32; in float64 when they are stored so."""
    stored = np.frombuffer(data, _STORED[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored if dtype == "F64" else stored.astype(np.float32)


def encode(values: Floats, dtype: str) -> bytes:
    """The numbers as safetensors stores them, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # it becomes infinite, which the caller looks for
            return values.astype(_STORED[dtype]).tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(_STORED["BF16"]).tobytes()


def average(parts: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """The weighted mean of arrays of one shape, in the arithmetic of the first.

    Weights sum to 1, so that it is x_0 + sum_i w_i (x_i - x_0): what is equal in all models stays as it is to the last bit.
    """
    first = parts[0]
    total = first.copy()
    with np.errstate(all="ignore"):  # what is not finite is looked for in the result
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total += first.dtype.type(weight) * (part.astype(first.dtype, copy=False) - first)
    return total


def averaged(name: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Iterator[bytes]:
    """The bytes of one tensor of the result, in slices.

    Raises:
        RunFailed: a number of it is not finite; or it holds no floats (a counter, a mask), and is not the same everywhere.
    """
    dtype = tensors[0].dtype
    for data in zip(*(tensor.slices() for tensor in tensors), strict=True):
        if not tensors[0].is_float:
            if any(other != data[0] for other in data[1:]):
                raise RunFailed(f"{name} holds {dtype}, which has no average, and differs between the models.")
            yield data[0]
            continue
        parts = [decode(part, tensor.dtype) for part, tensor in zip(data, tensors, strict=True)]
        mean = average(parts, weights)
        merged = encode(mean, dtype)
        if not (np.isfinite(mean).all() and np.isfinite(decode(merged, dtype)).all()):  # rounding can hide a NaN
            raise RunFailed(
                f"{name} of the merged model is not finite in {dtype}.",
                hint="look at the models that are merged: one of them may have diverged",
            )
        yield merged


def merge_folders(models: Sequence[Path], weights: Sequence[float], out_dir: Path) -> None:
    """Write the weighted average of model folders to ``out_dir``: files, data types, configs, tokenizer of the first.

    Raises:
        RecipeError: the tensors of the models differ in name or shape.
        RunFailed: the result is not finite, or a file is damaged.
    """
    check_fit(models)
    out_dir.mkdir(parents=True)
    every = [tensors_of(model) for model in models]
    for path in ModelFolder(models[0]).weight_paths():
        header, tensors = read_header(path)
        with (out_dir / path.name).open("wb") as file:
            file.write(header)
            for name, tensor in tensors.items():
                if file.tell() != tensor.start:
                    raise RunFailed(f"{path} is damaged: there is a gap before {name}.")
                for data in averaged(name, [found[name] for found in every], weights):
                    file.write(data)
    copy_all_but_weights(models[0], out_dir)
    index = models[0] / INDEX_NAME
    if index.is_file():
        shutil.copyfile(index, out_dir / INDEX_NAME)


def main(arguments: Sequence[str]) -> int:
    """Merge; what is wrong goes to standard output as JSON. Returns the exit code."""
    out_dir, pairs = Path(arguments[0]), arguments[1:]
    try:
        merge_folders([Path(path) for path in pairs[1::2]], [float(weight) for weight in pairs[::2]], out_dir)
    except ReasonrunError as error:
        print(json.dumps({"message": error.message, "hint": error.hint, "is_recipe": isinstance(error, RecipeError)}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
