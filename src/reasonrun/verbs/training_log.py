"""What a trainer reports while it works, committed with the checkpoint that covers it.

A rerun of uncommitted optimizer steps on a device that is not deterministic must not contradict what is on record.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from reasonrun.ledger.steps import OpenStep
from reasonrun.records import Credit, Experience, Rollout, Score
from reasonrun.training import experience_path
from reasonrun.verbs.context import Context

_CHUNK = 256
EXPERIENCE = "experience"
"""The log of an on-policy step's rollouts; sealed as the tables rollouts, scores and credit, row by row the same."""


class TrainingLog:
    """The curve of a training step, the rollouts of an on-policy one, and the seconds that its parts took.

    Args:
        ctx: of this attempt.
        step: open.
        out_dir: where the trainer writes.
        on_policy: whether the trainer makes rollouts.
    """

    def __init__(self, ctx: Context, step: OpenStep, out_dir: Path, *, on_policy: bool) -> None:
        self._ctx, self._step, self._out_dir, self._on_policy = ctx, step, out_dir, on_policy
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self.seconds: Counter[str] = Counter()
        self.sampled: Counter[str] = Counter()

    def receive(self, event: dict[str, Any]) -> None:
        """Take one event of the trainer."""
        fields = {key: value for key, value in event.items() if key not in ("event", "step")}
        if event["event"] == "log":
            self._waiting.append((int(event["step"]), {"step": event["step"], **fields}))
            reward = f", reward {event['reward']:.3f}" if "reward" in event else ""
            self._ctx.progress.advance(self._step.name, 1, note=f"loss {event['loss']:.4f}{reward}")
        elif event["event"] == "checkpoint":
            self.commit(int(event["step"]))
            self._step.adopt_checkpoint(Path(event["path"]), int(event["step"]))
        elif event["event"] == "seconds":
            self.seconds.update(fields)
        elif event["event"] == "note":
            self._ctx.progress.say(f"{self._step.name}: {event['text']}")
        self._ctx.check_stop()

    def rewind(self, number: int) -> None:
        """Drop what came after optimizer step ``number``: the trainer starts again from there."""
        self._waiting = []
        self._step.rewind("curve", lambda line: int(line["step"]) <= number)
        if self._on_policy:
            self._step.rewind(EXPERIENCE, lambda row: int(row["credit"]["optimizer_step"]) <= number)

    def commit(self, number: int | None = None) -> None:
        """Log what was reported so far, and the rollouts up to optimizer step ``number``; the trainer may be past it."""
        if self._on_policy:
            self._log_rollouts(number)
        wal = self._step.wal("curve")
        wal.append(self._waiting)
        wal.flush()
        self._waiting = []

    def _log_rollouts(self, number: int | None) -> None:
        wal = self._step.wal(EXPERIENCE)
        last = experience_path(self._out_dir, number) if number is not None else None
        for path in sorted(self._out_dir.glob("experience-*.jsonl")):
            if last is not None and path > last:
                break
            with path.open(encoding="utf-8") as lines:
                while chunk := [json.loads(line) for line in islice(lines, _CHUNK)]:
                    wal.append(list(enumerate(chunk, start=len(wal))))
            path.unlink()
        wal.flush()

    def seal(self) -> None:
        """Write the tables of the step that is finished."""
        self.commit()
        curve = self._step.wal("curve")
        self._step.put_json("curve", [curve.read(int(number)) for number in curve.ordinals()])
        if self._on_policy:
            self._seal_rollouts()

    def _seal_rollouts(self) -> None:
        step = self._step
        with (
            step.table("rollouts", Rollout) as rollouts,
            step.table("scores", Score) as scores,
            step.table("credit", Credit) as credit,
        ):
            for row in step.wal(EXPERIENCE).rows():
                experience = Experience.model_validate(row)
                rollouts.append(experience.rollout)
                scores.append(experience.score)
                credit.append(experience.credit)
                self.sampled["num_rollouts"] += 1
                if experience.rollout.logps is not None:  # not one that was given
                    self.sampled["num_completion_tokens"] += len(experience.rollout.logps)
                self.sampled["num_left_out"] += experience.credit.reward is None
