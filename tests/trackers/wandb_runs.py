"""Run directories made by hand, and a reader of W&B's offline files that shares no code with the exporter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonrun.ledger.files import Files
from reasonrun.ledger.tables import TableWriter
from reasonrun.records import Message, Rollout, Sampling, Score, Segment

INTERVAL_OF_HALF = [0.3, 0.7]


def evaluate_row(step: str, split: str, accuracy: float) -> dict[str, Any]:
    table = {"accuracy": accuracy, "interval": INTERVAL_OF_HALF, "num_samples": 4}
    return {"step": step, "verb": "evaluate", "split": split, "num_problems": 4, "greedy": table}


def round_rows(number: int) -> list[dict[str, Any]]:
    """What a round of a self-training method writes: dev, samples, verdicts, kept rows, a training step."""
    scope = f"round-{number:03d}"
    return [
        evaluate_row(f"{scope}/evaluate", "dev", number / 10),
        {"step": f"{scope}/sample", "verb": "sample", "num_rollouts": 6, "num_completion_tokens": 60 + number},
        {
            "step": f"{scope}/grade",
            "verb": "grade",
            "num_rollouts": 6,
            "num_correct": 3,
            "reasons": {"correct": 3, "wrong": 3},
        },
        {"step": f"{scope}/star_rows", "verb": "curate", "num_examples": 3, "kept_share": 0.5, "sources": {"self": 3}},
        {"step": f"{scope}/train", "verb": "train", "num_steps": 2, "loss": 0.25, "weights": "abc"},
    ]


def write_round(run: Path, number: int) -> None:
    """The files of the steps that ``round_rows`` names."""
    scope = run / "steps" / f"round-{number:03d}"
    curve = [{"step": 1, "loss": 2.0 / number, "lr": 0.1}, {"step": 2, "loss": 1.0 / number, "lr": 0.1}]
    for name in ("sample", "grade", "train"):
        (scope / name).mkdir(parents=True, exist_ok=True)
    (scope / "train" / "curve.json").write_text(json.dumps(curve))
    rollouts = [rollout(number, index) for index in range(6)]
    scores = [
        Score(value=float(i % 2), answer=str(i), reason="correct" if i % 2 else "wrong", grader="number-1")
        for i in range(6)
    ]
    for name, rows in (("sample", rollouts), ("grade", scores)):
        with TableWriter(scope / name, "rows", type(rows[0]), Files()) as table:
            for row in rows:
                table.append(row)


def rollout(number: int, index: int) -> Rollout:
    return Rollout(
        id=f"{number}-{index}",
        problem_id=f"problem-{index // 2}",
        index=index % 2,
        kind="plain",
        messages=(Message(role="user", content=f"What is {index} + {number}?"),),
        prompt_ids=(1, 2),
        segments=(Segment(token_ids=(3,), src="model", loss=True),),
        text=f"It is {index + number}.",
        finish_reason="stop",
        policy="p",
        sampling=Sampling(),
        seed=1,
    )


def write_metrics(run: Path, rows: list[dict[str, Any]]) -> None:
    """As the supervisor does: a temporary file, renamed."""
    temporary = run / "metrics.jsonl.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, run / "metrics.jsonl")


@dataclass
class WandbRun:
    """What W&B's offline files of one run hold, in order of the sessions that wrote them."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    project: str = ""
    name: str = ""

    def steps(self) -> list[int]:
        return [entry["_step"] for entry in self.history]

    def series(self, metric: str) -> list[Any]:
        return [entry[metric] for entry in self.history if metric in entry]


def read_offline(run: Path) -> dict[str, WandbRun]:
    """W&B runs by id."""
    found: dict[str, WandbRun] = {}
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        _read(path, found.setdefault(path.stem.removeprefix("run-"), WandbRun()))
    return found


def _read(path: Path, into: WandbRun) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            into.project, into.name = record.run.project, record.run.display_name
            into.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            into.history.append(items)
        elif kind == "metric":
            into.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric


def _records(data: bytes) -> list[bytes]:
    """The log format that LevelDB documents: blocks of 32 KiB, records of CRC, length, type and payload."""
    assert data[:4] == b":W&B"
    payload, out = b"", []
    for start in range(0, len(data), 32768):
        block = data[start : start + 32768]
        at = 7 if start == 0 else 0
        while len(block) - at > 7:
            crc, length, kind = (int.from_bytes(block[at + a : at + b], "little") for a, b in ((0, 4), (4, 6), (6, 7)))
            piece = block[at + 7 : at + 7 + length]
            assert crc == zlib.crc32(bytes([kind]) + piece)
            payload = piece if kind in (1, 2) else payload + piece
            if kind in (1, 4):
                out.append(payload)
            at += 7 + length
    return out


def run_python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Another interpreter with this one's import path, offline as far as W&B goes."""
    path = os.pathsep.join(str(Path(entry or ".").resolve()) for entry in sys.path)
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env={"WANDB_MODE": "offline", **os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def catch_up(run: Path) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", "reasonrun.trackers.wandb", str(run)])
