"""The metrics record as W&B history: a pure function of the run's files, so that every point has a fixed step.

Names: ``dev/greedy`` and ``test/best/greedy`` are accuracies (with ``/low``, ``/high`` and the other numbers of the
table below them), ``dev/greedy/attempt-2`` that of a second attempt and ``dev/greedy/correction/delta`` what it gains,
``round/kept_share`` and the like come from the curate and train rows, ``train/loss`` is the curve of the steps named
train, ``<step>/…`` the numbers of any other row, ``seconds/<verb>`` the time of the round so far.
Steps of a scope that is no round keep the scope's name in front: ``probe-T=0.5/sample/num_rollouts``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonrun.correction import overall

_ROUND = re.compile(r"round-(\d+)")
_FINAL = re.compile(r"final(-[^/]*)?")  # its labels tell runs of different length apart, not metrics
_EVALUATION = re.compile(r"(^|/)(evaluate|test-)")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One history entry of W&B, drawn against its metric ``axis``. ``samples_of`` names the grade step to show."""

    metrics: dict[str, float]
    axis: str = "round"
    samples_of: str | None = None
    samples_key: str = ""


@dataclass(kw_only=True)
class Projection:
    """Turns rows into points, in order; what earlier rows said (rounds, optimizer steps, time) is kept here."""

    run_dir: Path
    seconds: Mapping[str, float] = field(default_factory=dict)  # by step, over all attempts
    _round: int = 0
    _in_rounds: bool = False
    _scope: str = ""
    _spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _optimizer_steps: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def points(self, row: Mapping[str, Any]) -> list[Point]:
        """The points of the next row: a training curve first, then the row's own numbers."""
        step, verb = str(row["step"]), str(row.get("verb", ""))
        scope, _, leaf = step.rpartition("/") if step.count("/") == 0 else step.partition("/")
        if verb != "problems":  # problems are read wherever the method first asks for them
            self._enter(scope)
        prefix = leaf if not scope or _ROUND.fullmatch(scope) else f"{_FINAL.sub('final', scope)}/{leaf}"
        metrics: dict[str, float] = {"round": self._round}
        metrics |= self._numbers(row, verb, prefix, leaf, scope)
        metrics |= self._time(step, verb, leaf)
        shown = verb == "grade" and not _EVALUATION.search(leaf)
        own = Point(metrics=metrics, samples_of=step if shown else None, samples_key=f"samples/{prefix}")
        return [*self._curve(row, step, verb, prefix), own]

    def _enter(self, scope: str) -> None:
        found = _ROUND.fullmatch(scope)
        if found:
            self._round, self._in_rounds = int(found.group(1)), True
        elif self._in_rounds and scope:
            # What follows the last round measures what that round made, as the next round's first line would.
            self._round, self._in_rounds = self._round + 1, False
        if scope != self._scope:
            self._scope = scope
            self._spent.clear()

    def _numbers(self, row: Mapping[str, Any], verb: str, prefix: str, leaf: str, scope: str) -> dict[str, float]:
        if verb != "evaluate" and _EVALUATION.search(leaf):
            return {}  # the evaluation's own row says it better
        values = {key: value for key, value in row.items() if key not in ("step", "verb")}
        if verb == "evaluate":
            split, name = str(row.get("split", "dev")), leaf.rpartition("/")[2]
            table = split if not name.startswith(f"{split}-") else f"{split}/{name.removeprefix(f'{split}-')}"
            is_own_axis = not scope or _FINAL.fullmatch(scope) or _ROUND.fullmatch(scope)
            name = table if is_own_axis else f"{scope}/{table}"
            sections = values.pop("correction", {})
            return dict(_flat(name, values)) | dict(_attempts(name, sections))
        numbers = dict(_flat("round" if verb == "train" else prefix, values))
        if verb == "curate":
            numbers |= _flat("round", values)
        if verb == "grade" and values.get("num_rollouts"):
            numbers[f"{prefix}/accuracy"] = float(values.get("num_correct", 0)) / float(values["num_rollouts"])
        return numbers

    def _time(self, step: str, verb: str, leaf: str) -> dict[str, float]:
        if step not in self.seconds:
            return {}
        spent_on = "evaluate" if _EVALUATION.search(leaf) else verb
        self._spent[spent_on] += self.seconds[step]
        return {f"seconds/{spent_on}": self._spent[spent_on]}

    def _curve(self, row: Mapping[str, Any], step: str, verb: str, prefix: str) -> list[Point]:
        if verb != "train":
            return []
        before = self._optimizer_steps[prefix]
        self._optimizer_steps[prefix] += int(row.get("num_steps", 0))
        path = self.run_dir / "steps" / step / "curve.json"
        lines = json.loads(path.read_bytes()) if path.is_file() else []
        points = []
        for line in lines:
            values = {key: value for key, value in line.items() if key != "step"}
            axis = f"{prefix}/optimizer_step"
            place = {"round": float(self._round), axis: float(before + int(line["step"]))}
            points.append(Point(metrics=place | dict(_flat(prefix, values)), axis=axis))
        return points


def _attempts(name: str, sections: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Further attempts of every part by their number, and what the last one makes of the first."""
    for part, section in sections.items():
        for number, attempt in enumerate(section["attempts"][1:], start=2):
            yield from _flat(f"{name}/{part}/attempt-{number}", attempt)
        change = {key: value for key, value in overall(section).items() if key not in ("from", "to")}
        yield from _flat(f"{name}/{part}/correction", change)


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers under ``name`` by slashed path; a table with an accuracy gives that number its own name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "interval" and isinstance(inner, Sequence) and len(inner) == 2:
                yield from zip((f"{name}/low", f"{name}/high"), map(float, inner), strict=True)
            elif key == "accuracy" and "interval" in value:
                yield from _flat(name, inner)
            else:
                yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, bool | int | float):
        yield name, value if isinstance(value, float) else int(value)


def read_rows(path: Path) -> list[bytes]:
    """Complete lines of ``metrics.jsonl``; none when there is no file yet."""
    data = path.read_bytes() if path.is_file() else b""
    return [line for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line.strip()]


def read_seconds(run_dir: Path) -> dict[str, float]:
    """Seconds by step, summed over attempts. A line that is still being written is passed over."""
    total: dict[str, float] = defaultdict(float)
    for path in sorted(run_dir.glob("attempts/*/notes.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                note = json.loads(line)
                total[note["step"]] += float(note["seconds"])
            except (ValueError, KeyError, TypeError):
                continue
    return dict(total)
