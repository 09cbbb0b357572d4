"""The trainer that goes with the scripted engine: a training step is a number that grows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from reasonrun.contracts import Engine, TrainEvents
from reasonrun.on_policy import Collector, plan_problems
from reasonrun.records import Checkpoint, digest
from reasonrun.trainers.shared_prefixes import merge
from reasonrun.training import MergeJob, OnPolicyJob, PolicyGradientSettings, TrainJob, TrainResult


class ScriptedTrainer:
    """Writes a checkpoint that the scripted engine understands: its "weights" are the bytes of a script.

    An on-policy job samples and rewards at every optimizer step, as a real trainer does, with the script of its start.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        """One more training in the checkpoint's history. The folder's digest depends on rows, start and settings."""
        final, trained = Path(job.out_dir) / "final", _num_trainings(job.start)
        rows: list[object] = [Path(path).stat().st_size for path in job.rows]
        result = TrainResult(
            num_steps=job.num_steps, num_tokens=0, num_padded_tokens=0, metrics={"loss": 1.0 / (trained + 1)}
        )
        if job.on_policy is None:
            for step in range(1, job.num_steps + 1, max(1, job.num_steps // 4)):
                events({"event": "log", "step": step, "loss": 1.0 / (trained + step)})
        else:
            result = self._on_policy(job, job.on_policy, events)
            rows = [spec.model_dump(mode="json") for spec in (job.on_policy.rollout, job.on_policy.rewards)]
        content = {
            "num_trainings": trained + 1,
            "source": digest([job.start.weights, rows, job.settings, job.num_steps, job.seed]),
        }
        text = _write(final, content)
        optimizer = Path(job.out_dir) / "optimizer"  # so that the next training can carry it on
        optimizer.mkdir()
        (optimizer / "scripted.json").write_text(text)
        return result

    def merge(self, job: MergeJob) -> None:
        """A checkpoint that has learnt what the best of the merged ones has; its digest depends on all and their weights."""
        content = {
            "num_trainings": max(map(_num_trainings, job.models)),
            "source": digest([[model.weights for model in job.models], list(job.weights)]),
        }
        _write(Path(job.out_dir) / "final", content)

    def _on_policy(self, job: TrainJob, spec: OnPolicyJob, events: TrainEvents) -> TrainResult:
        settings = PolicyGradientSettings.model_validate(job.settings)
        self._engine.load(job.start)
        collector = Collector(job, spec, self._engine, settings)
        every, rewards, num_tokens = settings.num_iterations, [], 0
        num_samplings = -(-job.num_steps // every)
        plan = plan_problems(len(collector.problems), settings.problems_per_sampling, num_samplings, job.seed)
        for step in range(1, job.num_steps + 1):
            if (step - 1) % every == 0:
                number = (step - 1) // every + 1
                problems = [collector.problems[place] for place in plan[number - 1]]
                collected = collector.reward(collector.collect(number, problems))
                collected.keep(Path(job.out_dir), step)
            statistics = collected.statistics()
            rewards.append(statistics["reward"])
            num_tokens += int(merge(collected.rows).sequences.lengths.sum())
            events({"event": "log", "step": step, "loss": 0.0, **statistics})
        collector.close()
        return TrainResult(
            num_steps=job.num_steps,
            num_tokens=0,
            num_padded_tokens=num_tokens,
            metrics={"loss": 0.0, "reward": rewards[-1], "mean_reward": float(np.mean(rewards))},
        )


def _num_trainings(checkpoint: Checkpoint) -> int:
    script = Path(checkpoint.path) / "scripted.json"
    return int(json.loads(script.read_text())["num_trainings"]) if script.exists() else 0


def _write(final: Path, content: dict[str, object]) -> str:
    text = json.dumps(content, sort_keys=True)
    final.mkdir(parents=True)
    (final / "scripted.json").write_text(text)
    save_file({"script": np.frombuffer(text.encode(), dtype=np.uint8)}, final / "model.safetensors")
    return text
