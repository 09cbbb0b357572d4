"""A few graded completions of a step, evenly spaced, for a table in W&B."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("problem_id", "kind", "prompt", "completion", "finish_reason", "verdict", "answer")
_ROLLOUT_COLUMNS = ["problem_id", "kind", "messages", "text", "finish_reason"]
_SCORE_COLUMNS = ["value", "answer", "reason"]


def sample_rows(run_dir: Path, grade_step: str, earlier: Sequence[Mapping[str, Any]], limit: int) -> list[list[Any]]:
    """At most ``limit`` rows in the order of ``COLUMNS``; none when the step's tables are not there to read.

    Args:
        run_dir: the run directory.
        grade_step: the step whose verdicts to show.
        earlier: rows of the metrics record above that step's.
        limit: the most rows.
    """
    sampled = _rollouts_of(run_dir, grade_step, earlier)
    if sampled is None:
        return []
    scores = _Table(run_dir / "steps" / grade_step)
    rollouts = _Table(run_dir / "steps" / sampled)
    total = scores.num_rows
    if not total or total != rollouts.num_rows:
        return []
    chosen = [position * total // min(limit, total) for position in range(min(limit, total))]
    pairs = zip(rollouts.take(chosen, _ROLLOUT_COLUMNS), scores.take(chosen, _SCORE_COLUMNS), strict=True)
    return [_row(rollout, score) for rollout, score in pairs]


def _rollouts_of(run_dir: Path, grade_step: str, earlier: Sequence[Mapping[str, Any]]) -> str | None:
    """The sample step that was graded: what the step says it read, else the last sample step before it."""
    path = run_dir / "steps" / grade_step / "step.json"
    if path.is_file():
        inputs = json.loads(path.read_bytes()).get("fingerprint", {}).get("inputs", [])
        if inputs:
            return str(inputs[0])
    return next((str(row["step"]) for row in reversed(earlier) if row.get("verb") == "sample"), None)


def _row(rollout: Mapping[str, Any], score: Mapping[str, Any]) -> list[Any]:
    prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in rollout["messages"])
    return [
        rollout["problem_id"],
        rollout["kind"],
        prompt,
        rollout["text"],
        rollout["finish_reason"],
        score["reason"],
        score["answer"],
    ]


class _Table:
    """The shards of a sealed table, read one row group at a time."""

    def __init__(self, step_dir: Path) -> None:
        import pyarrow.parquet as pq

        self._files = [pq.ParquetFile(path) for path in sorted(step_dir.glob("rows-*.parquet"))]
        self.num_rows = sum(file.metadata.num_rows for file in self._files)

    def take(self, positions: Sequence[int], columns: list[str]) -> Iterator[dict[str, Any]]:
        """The rows at ``positions``, which rise."""
        wanted, start = list(positions), 0
        for file in self._files:
            for group in range(file.num_row_groups):
                stop = start + file.metadata.row_group(group).num_rows
                here = [position - start for position in wanted if start <= position < stop]
                if here:
                    yield from file.read_row_group(group, columns=columns).take(here).to_pylist()
                start = stop
