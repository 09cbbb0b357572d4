"""Seconds of an on-policy optimizer step, by part, and against TRL's GRPOTrainer on the same task; one JSON line.

Both sample, grade and update the carried model on single-turn problems of ``arith``: the same prompts, 16 problems with 4
rollouts each a step, at temperature 1 with at most 64 new tokens, a KL coefficient above 0 and one update a sampling, on
the CPU in float32. The first step of each is left out, which holds what is done once. TRL runs with its defaults except what
the CPU cannot do (bfloat16) and the batch; because its default of gradient checkpointing costs time by itself, it is measured
without it too. Accuracies are of the rollouts of the measured steps, at a learning rate that hardly moves the policy.

    python scripts/bench_on_policy.py [--num-steps 6] [--repeats 3]
    python scripts/bench_on_policy.py --run runs/score_arith

The second form reads a finished run: seconds per optimizer step of its on-policy training steps, by part, and the share of
their wall time (model load, checkpoints and the supervisor's log included) in which nothing is generated, graded, scored or
updated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from reasonrun.curate.attempts import AttemptSettings, TurnRewards, attempts, turn_rewards
from reasonrun.engines.hf import HuggingFace
from reasonrun.ledger.catalogue import read_lines
from reasonrun.models import resolve
from reasonrun.parts import part, plugin_part, write_records
from reasonrun.recipe import load
from reasonrun.records import Checkpoint, Problem
from reasonrun.rendering import Renderer
from reasonrun.tasks.arith import Arith
from reasonrun.trainers.policy_gradient import PolicyGradient
from reasonrun.training import OnPolicyJob, PolicyGradientSettings, TrainJob

GROUP_SIZE, NUM_GROUPS = 4, 16
MAX_NEW_TOKENS = 64
LEARNING_RATE = 1e-6
KL_COEF = 0.01


def run_ours(model: Checkpoint, task: Arith, num_steps: int, work_dir: Path) -> dict[str, Any]:
    """Seconds of each step but the first, by part, and the accuracy of their rollouts."""
    problems = list(task.problems("train"))[: NUM_GROUPS * num_steps]
    write_records(work_dir / "problems.jsonl", problems)
    settings = PolicyGradientSettings(
        lr=LEARNING_RATE,
        batch_size=NUM_GROUPS * GROUP_SIZE,
        group_size=GROUP_SIZE,
        max_length=512,
        advantage="group_normalised",
        loss_reduction="token",
        ratio="token",
        clip_ratio=0.2,
        micro_batch_size=16,
        checkpoint_every=10**6,
    )
    source = OnPolicyJob(
        tokenizer=model.path,
        problems=str(work_dir / "problems.jsonl"),
        task=plugin_part(Arith, task.config),
        engine=plugin_part(HuggingFace, HuggingFace.Settings()),
        rollout=part(attempts, AttemptSettings(num_attempts=1, max_new_tokens=MAX_NEW_TOKENS)),
        rewards=part(turn_rewards, TurnRewards(kl_coefs=(KL_COEF,))),
    )
    job = TrainJob(
        kind="policy_gradient",
        rows=(),
        start=model,
        reference=model,
        settings=settings.model_dump(mode="json"),
        num_steps=num_steps,
        seed=1,
        out_dir=tempfile.mkdtemp(dir=work_dir),
        on_policy=source,
    )
    seconds: list[dict[str, float]] = []
    accuracies: list[float] = []

    def receive(event: dict[str, Any]) -> None:
        if event["event"] == "seconds":
            seconds.append({key: value for key, value in event.items() if key not in ("event", "step")})
        elif event["event"] == "log":
            accuracies.append(event["accuracy_1"])

    PolicyGradient().train(job, receive)
    total: Counter[str] = Counter()
    for step in seconds[1:]:
        total.update(step)
    parts = {key: value / (num_steps - 1) for key, value in total.items()}
    return {"seconds": sum(parts.values()), "parts": parts, "accuracy": statistics.fmean(accuracies[1:])}


def run_trl(model: Checkpoint, task: Arith, num_steps: int, work_dir: Path, **overrides: Any) -> dict[str, Any]:
    """Seconds of each step but the first, and the accuracy of their rollouts."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    renderer, grader = Renderer.load(model.path), task.grader()
    problems = {problem.id: problem for problem in list(task.problems("train"))[: NUM_GROUPS * num_steps]}
    rows = [
        {"prompt": renderer.decode(renderer.render(problem.messages), skip_special=False), "key": problem.id}
        for problem in problems.values()
    ]
    stamps: list[float] = []
    accuracies: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    def verdicts(completions: list[str], key: list[str], **_: Any) -> list[float]:
        found = [_value(grader, problems[id], text) for id, text in zip(key, completions, strict=True)]
        accuracies.append(statistics.fmean(found))
        return found

    config = GRPOConfig(
        output_dir=str(work_dir / "trl"),
        max_steps=num_steps,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=NUM_GROUPS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS,
        beta=KL_COEF,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
        **overrides,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model.path, dtype="float32"),
        reward_funcs=verdicts,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model.path),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"seconds": (stamps[-1] - stamps[0]) / (num_steps - 1), "accuracy": statistics.fmean(accuracies[1:])}


def _value(grader: Any, problem: Problem, text: str) -> float:
    return float(grader.grade(problem, text, truncated=False).value or 0.0)


def of_run(run: Path) -> dict[str, Any]:
    """Seconds per optimizer step by part, and the share of overhead, of a finished run's on-policy training steps."""
    notes = [note for path in sorted(run.glob("attempts/*/notes.jsonl")) for note in read_lines(path)]
    parts: Counter[str] = Counter()
    for note in notes:
        parts.update(note.get("parts", {}))
    steps = {note["step"] for note in notes if "parts" in note}
    wall = sum(note["seconds"] for note in notes if note.get("verb") == "train" and note["step"] in steps)
    num_steps = sum(row["num_steps"] for row in read_lines(run / "metrics.jsonl") if row["step"] in steps)
    kernels = sum(parts[part] for part in ("generate", "grade", "score", "update"))
    return {
        "optimizer_steps": num_steps,
        "seconds_per_step": wall / num_steps,
        "parts": {part: seconds / num_steps for part, seconds in sorted(parts.items())},
        "overhead_share": 1 - kernels / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a finished run to read instead")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(of_run(arguments.run)))
        return
    model = resolve(load("star_arith").model)
    task = Arith(Arith.Settings())
    variants: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": [], "trl_without_checkpointing": []}
    with tempfile.TemporaryDirectory(prefix="reasonrun-bench-") as folder:
        work_dir = Path(folder)
        for _ in range(arguments.repeats):
            variants["ours"].append(run_ours(model, task, arguments.num_steps, work_dir))
            variants["trl"].append(run_trl(model, task, arguments.num_steps, work_dir))
            variants["trl_without_checkpointing"].append(
                run_trl(model, task, arguments.num_steps, work_dir, gradient_checkpointing=False)
            )
    seconds = {name: statistics.median(one["seconds"] for one in runs) for name, runs in variants.items()}
    median = sorted(variants["ours"], key=lambda one: one["seconds"])[arguments.repeats // 2]
    line = {
        "seconds_per_step": seconds,
        "ratio": seconds["trl"] / seconds["ours"],
        "ratio_without_checkpointing": seconds["trl_without_checkpointing"] / seconds["ours"],
        "parts": median["parts"],
        "accuracy": {name: statistics.fmean(one["accuracy"] for one in runs) for name, runs in variants.items()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
