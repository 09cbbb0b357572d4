"""Tokens per second of the pair trainer against TRL's DPOTrainer with its defaults, on the same rows; one JSON line.

Both train the same model on the same pre-tokenised pairs for one epoch, against the same reference, which is another model
than the one trained, so that the first loss tells something. Reference log-probabilities are counted in on both sides: ours
are computed before the first step (the seconds of a run of one batch are taken off, which hold the loading), TRL's in every
step. Tokens are those of both sequences of each pair, prefix included, padding not. TRL runs with its defaults except what
the CPU cannot do (bfloat16); because its default of gradient checkpointing costs time by itself, it is measured without it
too. The losses are of the first batch, before any update.

    python scripts/bench_pairs.py [--model FOLDER] [--num-steps 40] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench_training import random_model, report, run
from reasonrun.columns import to_arrow_rows
from reasonrun.records import Checkpoint, PreferenceExample
from reasonrun.trainers.preference import Preference
from reasonrun.training import PreferenceSettings, TrainJob

BATCH_SIZE = 8  # TRL's default
LEARNING_RATE = 1e-6  # TRL's default
BETA = 0.1  # TRL's default


def ragged_pairs(num: int, vocab_size: int) -> list[PreferenceExample]:
    """Prefixes of 40 to 240 tokens and steps of a few to 120, log-normal, as step pairs are."""
    rng = np.random.default_rng(0)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(int(x) for x in rng.integers(3, vocab_size, size=size))

    def step() -> tuple[int, ...]:
        return ids(int(np.clip(rng.lognormal(3.3, 0.6), 4, 120)))

    return [
        PreferenceExample(
            problem_id=str(i),
            rollout_ids=(str(i),),
            prefix_ids=ids(int(rng.integers(40, 240))),
            chosen_ids=step(),
            rejected_ids=step(),
        )
        for i in range(num)
    ]


def run_ours(
    model: str, reference: str, pairs: list[PreferenceExample], num_steps: int, work_dir: Path
) -> tuple[float, float]:
    """Loss of the first batch and seconds of the whole job."""
    rows_path = work_dir / "pairs.parquet"
    pq.write_table(pa.Table.from_batches([to_arrow_rows(PreferenceExample, pairs)]), rows_path)
    settings = PreferenceSettings(
        lr=LEARNING_RATE, beta=BETA, batch_size=BATCH_SIZE, schedule="linear", checkpoint_every=10**6
    )
    job = TrainJob(
        kind="preference",
        rows=(str(rows_path),),
        start=Checkpoint(path=model, weights="start", tokenizer=""),
        reference=Checkpoint(path=reference, weights="reference", tokenizer=""),
        settings=settings.model_dump(mode="json"),
        num_steps=num_steps,
        seed=1,
        out_dir=tempfile.mkdtemp(dir=work_dir),
    )
    began = time.perf_counter()
    result = Preference().train(job, lambda event: None)
    return result.metrics["first_loss"], time.perf_counter() - began


def run_trl(
    model: str, reference: str, pairs: list[PreferenceExample], num_steps: int, work_dir: Path, **overrides: Any
) -> tuple[float, float]:
    """Loss of the first batch and seconds from the end of the first step to the end of the last."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    class Untouched(DPOTrainer):
        """Takes ids as they are; the stock trainer wants text."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    on_gpu = torch.cuda.is_available()
    config = DPOConfig(
        output_dir=str(work_dir / "trl"),
        max_steps=num_steps,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **overrides,
    )
    words = {f"t{i}": i for i in range(8)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), eos_token="t2", pad_token="t1"
    )
    rows = [
        {"prompt_ids": [*p.prefix_ids], "chosen_ids": [*p.chosen_ids], "rejected_ids": [*p.rejected_ids]} for p in pairs
    ]
    trainer = Untouched(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype="float32"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"], stamps[-1] - stamps[0]


def perturbed(model: str, folder: Path) -> str:
    """The model a little away from itself."""
    import torch
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    start.save_pretrained(folder)
    return str(folder)


def measure(arguments: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    reference = arguments.model
    if reference is None:
        reference = str(work_dir / "reference")
        random_model(Path(reference), arguments.layers, arguments.hidden, arguments.vocab_size)
    model = perturbed(reference, work_dir / "model")
    vocab_size = json.loads((Path(reference) / "config.json").read_text())["vocab_size"]
    pairs = ragged_pairs(BATCH_SIZE * arguments.num_steps, vocab_size)
    first = pairs[:BATCH_SIZE]
    contenders: dict[str, Any] = {
        "ours": run_ours,
        "trl": run_trl,
        "trl_without_gradient_checkpointing": lambda *a: run_trl(*a, gradient_checkpointing=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # The first call of each imports its libraries; counted as loading, it would be taken off what is measured.
    losses = {name: contender(model, reference, first, 1, work_dir)[0] for name, contender in contenders.items()}
    # Alternating, so that a machine that slows down slows all of them.
    for _ in range(arguments.repeats):
        for name, contender in contenders.items():
            loading = contender(model, reference, first, 1, work_dir)[1] if name == "ours" else 0.0
            spent = contender(model, reference, pairs, arguments.num_steps, work_dir)[1]
            seconds[name].append(spent - loading)
    num_tokens = sum(pair.num_tokens for pair in pairs)
    timed_tokens = num_tokens * (arguments.num_steps - 1) / arguments.num_steps
    return report(
        "P3 pairs",
        {name: timed_tokens / statistics.median(values) for name, values in seconds.items()},
        (losses["ours"], losses["trl"]),
        {"num_pairs": len(pairs), "num_tokens": num_tokens, "repeats": arguments.repeats},
    )


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
