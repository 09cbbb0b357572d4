"""Several jobs, one after another, in one pair of processes: starting such a pair takes far longer than a small job."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from sft_rows import Events

from reasonrun.contracts import TrainEvents
from reasonrun.errors import ReasonrunError
from reasonrun.trainers import launch
from reasonrun.training import TrainJob, TrainResult

_JOBS_FILE = "jobs.json"
_NOTHING = TrainResult(num_steps=0, num_tokens=0, num_padded_tokens=0, metrics={})


class InTurn:
    """A trainer whose job names a folder with further jobs. An error of one, which all processes meet, ends that one only."""

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        for i, (trainer, body) in enumerate(json.loads((Path(job.out_dir) / _JOBS_FILE).read_text())):
            module, _, name = trainer.partition(":")
            part = TrainJob.model_validate(body)
            try:
                result = getattr(importlib.import_module(module), name)().train(
                    part, lambda event, i=i: events({**event, "job": i})
                )
            except ReasonrunError as error:
                events({"event": "failed", "job": i, "error": type(error).__name__, "text": str(error)})
            else:
                events({"event": "done", "job": i, "result": result.model_dump(mode="json")})
        return _NOTHING


def run_in_turn(
    monkeypatch: pytest.MonkeyPatch, folder: Path, jobs: list[tuple[str, TrainJob]], num_processes: int = 2
) -> list[Events]:
    """The events of each job: those of its trainer, then ``done`` with its result or ``failed`` with its error."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    folder.mkdir()
    several: list[tuple[str, Any]] = [(trainer, job.model_dump(mode="json")) for trainer, job in jobs]
    (folder / _JOBS_FILE).write_text(json.dumps(several))
    whole = jobs[0][1].model_copy(update={"out_dir": str(folder), "num_processes": num_processes})
    found = [Events() for _ in jobs]

    def sort(event: dict[str, Any]) -> None:
        found[event.pop("job")](event)

    launch.train_in_processes("jobs_in_turn:InTurn", whole, sort)
    return found
