"""Measure the Hugging Face engine against plain ``model.generate``, side by side in one process.

Plain means: samples in arrival order, batches of ``--batch-rows`` rows padded on the left, every batch runs until its
last row is finished, and each sample reads its prompt again. Both sides draw at temperature 1 without filters from the
same prompts: arith problems, every other one with demonstrations, so that lengths are ragged as in a round that mixes
styles. Sides alternate and the median of the ratios counts, because other work on the machine slows both.

    PYTHONPATH=src python scripts/bench_generation.py src/reasonrun/assets/tiny-1 --num-prompts 128

Prints one JSON line: tokens per second of both sides, their ratio, how many greedy completions are equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from reasonrun.engines._loading import find_device, find_dtype
from reasonrun.engines.hf import HuggingFace
from reasonrun.generation import Request
from reasonrun.records import Checkpoint, Sampling
from reasonrun.rendering import Renderer
from reasonrun.tasks.arith import Arith

Ids = tuple[int, ...]


def prompts(renderer: Renderer, num_prompts: int) -> list[Ids]:
    """Rendered prompts in arrival order, plain and few-shot by turns."""
    task = Arith(Arith.Settings())
    problems = task.problems("train")[:num_prompts]
    styles = ("plain", "few_shot")
    return [renderer.render(task.messages(problem, styles[i % 2])) for i, problem in enumerate(problems)]


def run_plain(
    model: Any, rows: Sequence[Ids], eos_ids: Ids, *, batch_rows: int, copies: int, sampling: Sampling
) -> Iterator[Ids]:
    """Completions of plain ``generate``, ``copies`` for each of ``rows``, cut after the first end-of-sequence token."""
    for start in range(0, len(rows), batch_rows):
        batch = rows[start : start + batch_rows]
        width = max(map(len, batch))
        ids = torch.tensor([[eos_ids[0]] * (width - len(row)) + list(row) for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        options = {"do_sample": False} if sampling.temperature == 0 else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            block = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                num_return_sequences=copies,
                eos_token_id=list(eos_ids),
                pad_token_id=eos_ids[0],
                **options,
            )
        for row in block[:, width:].tolist():
            end = next((i + 1 for i, token_id in enumerate(row) if token_id in eos_ids), len(row))
            yield tuple(row[:end])


def requests(rows: Sequence[Ids], *, n: int, sampling: Sampling, seed: int) -> list[Request]:
    return [
        Request(key=str(i), problem_id="bench", prompt_ids=row, n=n, seed=seed + i, sampling=sampling)
        for i, row in enumerate(rows)
    ]


def timed(completions: Iterator[Ids]) -> tuple[float, float]:
    """Tokens per second and mean tokens of a completion."""
    began = time.perf_counter()
    lengths = [len(ids) for ids in completions]
    return sum(lengths) / (time.perf_counter() - began), statistics.mean(lengths)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--n", type=int, default=4, help="samples of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=32, help="rows of a plain batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-batch-rows", type=int, default=HuggingFace.Settings().max_batch_rows)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args()


@dataclass
class Sides:
    """The two sides of the comparison, with everything they share."""

    engine: HuggingFace
    model: Any
    renderer: Renderer
    rows: list[Ids]
    sampling: Sampling

    def speeds(self, *, n: int, batch_rows: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
        """(Tokens per second, mean length) of each repeat: the engine, plain batches of rows and of prompts."""
        plain_sets = {"rows": ([row for row in self.rows for _ in range(n)], 1), "prompts": (self.rows, n)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("engine", *plain_sets)}
        for repeat in range(repeats):
            asked = requests(self.rows, n=n, sampling=self.sampling, seed=repeat * 10**6)
            found["engine"].append(timed(completion.token_ids for completion in self.engine.generate(asked)))
            for name, (rows, copies) in plain_sets.items():
                plain = self.plain(rows, batch_rows=batch_rows, copies=copies, sampling=self.sampling)
                found[name].append(timed(plain))
        return found

    def greedy_equal(self, num_prompts: int) -> tuple[int, int]:
        """How many greedy completions are equal, of how many."""
        greedy = self.sampling.model_copy(update={"temperature": 0.0})
        few = self.rows[:num_prompts]
        ours = {c.request: c.token_ids for c in self.engine.generate(requests(few, n=1, sampling=greedy, seed=0))}
        plain = self.plain(few, batch_rows=1, copies=1, sampling=greedy)
        return sum(ours[str(i)] == ids for i, ids in enumerate(plain)), len(few)

    def plain(self, rows: Sequence[Ids], *, batch_rows: int, copies: int, sampling: Sampling) -> Iterator[Ids]:
        eos_ids = self.renderer.eos_ids
        return run_plain(self.model, rows, eos_ids, batch_rows=batch_rows, copies=copies, sampling=sampling)


def main() -> None:
    arguments = read_arguments()
    logging.disable_progress_bar()
    device = find_device(arguments.device)
    dtype = find_dtype(arguments.dtype, device)
    names = ("max_batch_rows", "device", "dtype")
    engine = HuggingFace(HuggingFace.Settings.model_validate({name: getattr(arguments, name) for name in names}))
    began = time.perf_counter()
    engine.load(Checkpoint(path=str(arguments.model_dir), weights="bench", tokenizer="bench"))
    load_seconds = time.perf_counter() - began
    model = AutoModelForCausalLM.from_pretrained(arguments.model_dir, dtype=dtype).to(device).eval()
    renderer = Renderer.load(arguments.model_dir)
    rows = prompts(renderer, arguments.num_prompts)
    sides = Sides(engine, model, renderer, rows, Sampling(max_new_tokens=arguments.max_new_tokens))
    found = sides.speeds(n=arguments.n, batch_rows=arguments.batch_rows, repeats=arguments.repeats)
    ratios = {
        name: statistics.median(
            ours / plain for (ours, _), (plain, _) in zip(found["engine"], found[name], strict=True)
        )
        for name in ("rows", "prompts")
    }
    report = {
        "model": arguments.model_dir.name,
        "device": str(device),
        "dtype": str(dtype),
        "num_threads": torch.get_num_threads(),
        "num_prompts": len(rows),
        "n": arguments.n,
        "prompt_tokens_min_max": [min(map(len, rows)), max(map(len, rows))],
        "plain_batch": arguments.batch_rows,
        "tokens_per_second": {name: round(statistics.median(s for s, _ in each)) for name, each in found.items()},
        "ratio_to_plain_batch_of_rows": round(ratios["rows"], 2),
        "ratio_to_plain_batch_of_prompts": round(ratios["prompts"], 2),
        "mean_completion_tokens": {name: round(statistics.mean(m for _, m in each), 1) for name, each in found.items()},
        "greedy_equal": sides.greedy_equal(32),
        "load_seconds": round(load_seconds, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
