"""The trainer that goes with the scripted engine: a training step is a number that grows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from reasonrun.contracts import TrainEvents
from reasonrun.records import digest
from reasonrun.training import TrainJob, TrainResult


class ScriptedTrainer:
    """Writes a checkpoint that the scripted engine understands: its "weights" are the bytes of a script."""

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        """One more training in the checkpoint's history. The folder's digest depends on rows, start and settings."""
        final = Path(job.out_dir) / "final"
        final.mkdir(parents=True)
        start = Path(job.start.path) / "scripted.json"
        trained = json.loads(start.read_text())["num_trainings"] if start.exists() else 0
        rows = [Path(path).stat().st_size for path in job.rows]
        content = {
            "num_trainings": trained + 1,
            "source": digest([job.start.weights, rows, job.settings, job.num_steps, job.seed]),
        }
        text = json.dumps(content, sort_keys=True)
        (final / "scripted.json").write_text(text)
        save_file({"script": np.frombuffer(text.encode(), dtype=np.uint8)}, final / "model.safetensors")
        for step in range(1, job.num_steps + 1, max(1, job.num_steps // 4)):
            events({"event": "log", "step": step, "loss": 1.0 / (trained + step)})
        return TrainResult(
            num_steps=job.num_steps, num_tokens=0, num_padded_tokens=0, metrics={"loss": 1.0 / (trained + 1)}
        )
