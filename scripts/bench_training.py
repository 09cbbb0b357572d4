"""Tokens per second of the SFT trainer against TRL's SFTTrainer with its defaults, on the same rows; one JSON line.

Both train the same model on the same pre-tokenised rows for one epoch; the clock runs from the end of the first step
to the end of the last, so loading is not in it. Tokens are those of the rows, padding not counted. TRL runs with its
defaults except what the CPU cannot do (bfloat16); because its default of gradient checkpointing costs time by itself,
it is measured without it too. The losses are of the first batch, before any update.

    python scripts/bench_training.py [--model FOLDER] [--num-steps 40] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reasonrun.columns import to_arrow_rows
from reasonrun.records import Checkpoint, Segment, SFTExample
from reasonrun.trainers.sft import SFT
from reasonrun.training import SFTSettings, TrainJob

BATCH_SIZE = 8  # TRL's default
LEARNING_RATE = 2e-5  # TRL's default


def ragged_examples(num: int, vocab_size: int) -> list[SFTExample]:
    """Prompts of 20 to 80 tokens and answers of a few to 400, log-normal, as sampled rationales are."""
    rng = np.random.default_rng(0)
    examples = []
    for i in range(num):
        num_prompt = int(rng.integers(20, 80))
        num_answer = int(np.clip(rng.lognormal(4.3, 0.7), 8, 400))
        ids = [int(x) for x in rng.integers(3, vocab_size, size=num_prompt + num_answer)]
        segments = (
            Segment(token_ids=tuple(ids[:num_prompt]), src="gold", loss=False),
            Segment(token_ids=tuple(ids[num_prompt:]), src="model", loss=True),
        )
        examples.append(SFTExample(problem_id=str(i), rollout_ids=(str(i),), segments=segments))
    return examples


def random_model(folder: Path, layers: int, hidden: int, vocab_size: int) -> None:
    """A Llama of the shape of the embedded model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run_ours(model: str, examples: list[SFTExample], num_steps: int, work_dir: Path) -> tuple[float, float]:
    """Loss of the first batch and seconds from the first to the last step."""
    rows_path = work_dir / "rows.parquet"
    pq.write_table(pa.Table.from_batches([to_arrow_rows(SFTExample, examples)]), rows_path)
    stamps: list[float] = []
    settings = SFTSettings(lr=LEARNING_RATE, batch_size=BATCH_SIZE, schedule="linear", checkpoint_every=10**6)
    job = TrainJob(
        kind="sft",
        rows=(str(rows_path),),
        start=Checkpoint(path=model, weights="", tokenizer=""),
        settings=settings.model_dump(mode="json"),
        num_steps=num_steps,
        seed=1,
        out_dir=tempfile.mkdtemp(dir=work_dir),
    )
    result = SFT().train(job, lambda event: stamps.append(time.perf_counter()))
    return result.metrics["first_loss"], stamps[-1] - stamps[0]


def run_trl(
    model: str, examples: list[SFTExample], num_steps: int, work_dir: Path, **overrides: Any
) -> tuple[float, float]:
    """The same of TRL's trainer; rows are given to it as ids and labels, which it leaves alone."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    rows = []
    for example in examples:
        prompt, answer = (list(segment.token_ids) for segment in example.segments)
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    on_gpu = torch.cuda.is_available()
    config = SFTConfig(
        output_dir=str(work_dir / "trl"),
        max_steps=num_steps,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **overrides,
    )
    words = {f"t{i}": i for i in range(8)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), eos_token="t2", pad_token="t1"
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"], stamps[-1] - stamps[0]


def measure(arguments: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    model = arguments.model
    if model is None:
        model = str(work_dir / "model")
        random_model(Path(model), arguments.layers, arguments.hidden, arguments.vocab_size)
    vocab_size = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    examples = ragged_examples(BATCH_SIZE * arguments.num_steps, vocab_size)
    # One batch that holds every row: the loss that both start from.
    loss_ours, _ = run_ours(model, examples[:BATCH_SIZE], 1, work_dir)
    loss_trl, _ = run_trl(model, examples[:BATCH_SIZE], 1, work_dir)

    contenders: dict[str, Any] = {
        "ours": run_ours,
        "trl": run_trl,
        "trl_without_gradient_checkpointing": lambda *a: run_trl(*a, gradient_checkpointing=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    # Alternating, so that a machine that slows down slows all of them.
    for _ in range(arguments.repeats):
        for name, contender in contenders.items():
            seconds[name].append(contender(model, examples, arguments.num_steps, work_dir)[1])
    num_tokens = sum(len(segment.token_ids) for example in examples for segment in example.segments)
    timed_tokens = num_tokens * (arguments.num_steps - 1) / arguments.num_steps
    return report(
        "P3 sft",
        {name: timed_tokens / statistics.median(values) for name, values in seconds.items()},
        (loss_ours, loss_trl),
        {"num_rows": len(examples), "num_tokens": num_tokens, "repeats": arguments.repeats},
    )


def report(
    benchmark: str, rates: dict[str, float], first_losses: tuple[float, float], sizes: dict[str, int]
) -> dict[str, Any]:
    """One line of a benchmark against TRL: tokens per second, their ratios, and whether both began with the same loss."""
    import torch

    ours, theirs = first_losses
    return {
        "benchmark": benchmark,
        **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["trl"], 3),
        "ratio_without_gradient_checkpointing": round(rates["ours"] / rates["trl_without_gradient_checkpointing"], 3),
        "first_loss_ours": ours,
        "first_loss_trl": theirs,
        "same_loss": abs(ours - theirs) < 1e-3,
        **sizes,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
    }


def run(measure: Callable[[argparse.Namespace, Path], dict[str, Any]], description: str | None) -> int:
    """The command line of a benchmark against TRL; 1 when the losses differ."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; a random Llama without it")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--num-steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    with tempfile.TemporaryDirectory() as work_dir:
        line = measure(parser.parse_args(), Path(work_dir))
    print(json.dumps(line))
    return 0 if line["same_loss"] else 1


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
