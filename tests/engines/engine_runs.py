"""Requests for the Hugging Face engine, and what plain transformers answers to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from reasonrun.engines.hf import HuggingFace
from reasonrun.generation import Completion, Request
from reasonrun.records import Checkpoint, Sampling

MakeLlama = Callable[[int], Path]
Rows = dict[tuple[str, int], Completion]


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(path=str(folder), weights=folder.name, tokenizer="t")


def engine_for(folder: Path, **settings: Any) -> HuggingFace:
    # One thread: several wait for each other without end on a busy machine.
    engine = HuggingFace(HuggingFace.Settings(num_threads=1, **settings))
    engine.load(checkpoint(folder))
    return engine


def ask(num_requests: int, *, n: int = 1, max_new_tokens: int = 8, **sampling: Any) -> list[Request]:
    """Requests with random prompts of 1 to 50 tokens."""
    parameters = Sampling(max_new_tokens=max_new_tokens, **sampling)
    rng = random.Random(7)
    prompts = [tuple(rng.randrange(3, 500) for _ in range(rng.randrange(1, 51))) for _ in range(num_requests)]
    return [
        Request(key=f"r{i}", problem_id="p", prompt_ids=ids, n=n, seed=100 + i, sampling=parameters)
        for i, ids in enumerate(prompts)
    ]


def rows_of(engine: HuggingFace, requests: Sequence[Request]) -> Rows:
    completions = list(engine.generate(requests))
    rows = {(completion.request, completion.index): completion for completion in completions}
    assert len(rows) == len(completions)
    assert rows.keys() == {(request.key, i) for request in requests for i in range(request.n)}
    return rows


def reference_greedy(folder: Path, requests: Sequence[Request], **options: Any) -> dict[str, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = {}
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        budget = request.sampling.max_new_tokens
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=budget, pad_token_id=2, **options
        )
        found[request.key] = tuple(whole[0, ids.shape[1] :].tolist())
    return found
