"""Rows, events and files that the trainer tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from reasonrun.columns import arrow_schema, to_arrow_rows
from reasonrun.records import PreferenceExample, Segment, SFTExample

VOCAB = 64


def example(
    name: str, prompt: Sequence[int], answer: Sequence[int], *, weight: float = 1.0, answer_weight: float = 1.0
) -> SFTExample:
    segments = (
        Segment(token_ids=tuple(prompt), src="gold", loss=False),
        Segment(token_ids=tuple(answer), src="model", loss=True, weight=answer_weight),
    )
    return SFTExample(problem_id=f"p-{name}", rollout_ids=(name,), segments=segments, weight=weight)


def random_examples(num: int, seed: int = 0, longest: int = 24) -> list[SFTExample]:
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(num):
        num_prompt, num_answer = rng.integers(1, longest // 2, size=2)
        ids = [int(x) for x in rng.integers(3, VOCAB, size=num_prompt + num_answer)]
        examples.append(example(f"r{i}", ids[:num_prompt], ids[num_prompt:]))
    return examples


def pair(
    name: str, prefix: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], **numbers: float
) -> PreferenceExample:
    return PreferenceExample(
        problem_id=f"p-{name}",
        rollout_ids=(name,),
        prefix_ids=tuple(prefix),
        chosen_ids=tuple(chosen),
        rejected_ids=tuple(rejected),
        **numbers,
    )


def random_pairs(num: int, seed: int = 0, longest: int = 24) -> list[PreferenceExample]:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(num):
        parts = [[int(x) for x in rng.integers(3, VOCAB, size=size)] for size in rng.integers(2, longest // 2, size=3)]
        pairs.append(pair(f"r{i}", *parts))
    return pairs


def write_rows(path: Path, examples: Sequence[SFTExample] | Sequence[PreferenceExample]) -> str:
    """A file with the columns that the ledger seals."""
    kind = type(examples[0]) if examples else SFTExample
    batches = [to_arrow_rows(kind, list(examples))] if examples else []
    pq.write_table(pa.Table.from_batches(batches, schema=arrow_schema(kind)), path)
    return str(path)


class Table(torch.nn.Module):
    """A model whose logits are its parameters, so that their gradients can be read off."""

    def __init__(self, logits_BTV: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits_BTV)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[: len(input_ids), logits_to_keep])


class Events(list[dict[str, Any]]):
    """Collects events; ``of("log")`` filters them."""

    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self if event["event"] == kind]


def weights_of(folder: Path | str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
