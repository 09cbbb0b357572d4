"""The table of a sweep: arms as means over seeds with Student t intervals, and what sets them apart. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reasonrun.correction import overall
from reasonrun.metrics import mean_interval_over_seeds

PARTS = ("greedy", "sampled")
PAIR_METRICS = ("reward_margin", "pair_accuracy")  # on pairs that no arm learnt from
_SHARES = {"incorrect_to_correct": "i→c", "correct_to_incorrect": "c→i", "changed_share": "changed"}
INDISTINGUISHABLE = "not distinguishable"
_ROUNDING = 1e-12  # differences below are those of adding in another order

Summary = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % t interval; one seed has none."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Raises ValueError when there is no value."""
        mean, low, high = mean_interval_over_seeds(values)
        is_alone = len(values) == 1
        return cls(mean=mean, low=None if is_alone else low, high=None if is_alone else high, num_seeds=len(values))


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """Test accuracy of one part (greedy or sampled); the gain is paired by seed."""

    base: Estimate | None
    last: Estimate | None
    gain: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the table."""

    name: str
    seeds: tuple[int, ...]  # of the runs that are done
    num_findings: int  # runs that ended in one
    num_alarms: int  # runs that are done and have something to say
    num_failed: int
    scores: Mapping[str, PartScores]
    train_metrics: Mapping[str, Estimate]  # of the last training step; those that all its runs have
    held_out_pairs: Mapping[str, Estimate]
    correction: Mapping[str, Estimate]  # of the last checkpoint on test, see ``correction_metrics``


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Test accuracy of the last checkpoint, first or last attempt, what the last attempt gains, or a metric on held-out
    pairs: ``arm`` minus ``reference``, paired by seed."""

    arm: str
    reference: str
    part: str
    difference: Estimate

    @property
    def verdict(self) -> str:
        """Whether the interval excludes 0; without an interval nothing is claimed."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return "one seed: no interval"
        if low <= _ROUNDING and high >= -_ROUNDING:
            return INDISTINGUISHABLE
        which = "higher" if low > 0 else "lower"
        return which if high - low > _ROUNDING else f"{which}, by the same in every seed"


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """All arms in the order of the sweep, each compared with the first."""

    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def common_metrics(self) -> tuple[str, ...]:
        """Training metrics that every arm with a finished run has."""
        named = [arm.train_metrics for arm in self.arms if arm.seeds]
        return tuple(name for name in (named[0] if named else ()) if all(name in metrics for metrics in named))

    @property
    def pair_metrics(self) -> tuple[str, ...]:
        """Metrics on held-out pairs that some arm has."""
        return tuple(key for key in PAIR_METRICS if any(key in arm.held_out_pairs for arm in self.arms))

    @property
    def correction_metrics(self) -> tuple[str, ...]:
        """Metrics of asking again that some arm has."""
        return tuple(dict.fromkeys(key for arm in self.arms for key in arm.correction))

    def to_json(self) -> dict[str, Any]:
        """The table as one JSON value; absent intervals are null."""
        return {
            "arms": [asdict(arm) for arm in self.arms],
            "comparisons": [{**asdict(line), "verdict": line.verdict} for line in self.comparisons],
        }


def sweep_table(summaries: Iterable[Summary]) -> SweepTable:
    """Fold the summaries of runs, which come in any order, into arms."""
    by_arm: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda summary: (summary["position"], summary["run"])):
        by_arm.setdefault(summary["arm"], []).append(summary)
    arms = tuple(_arm(name, runs) for name, runs in by_arm.items())
    reference, *others = by_arm or [""]
    compared = {name: _compared(runs) for name, runs in by_arm.items()}
    comparisons = [
        Comparison(arm=name, reference=reference, part=part, difference=Estimate.of(differences))
        for name in others
        for part, values in compared[reference].items()
        if (differences := _paired(values, compared[name].get(part, {})))
    ]
    return SweepTable(arms=arms, comparisons=tuple(comparisons))


def _arm(name: str, runs: Sequence[Summary]) -> Arm:
    done = sorted((run for run in runs if run["exit_code"] == 0), key=lambda run: int(run["seed"]))
    num_findings = sum(run["exit_code"] == 5 for run in runs)
    metrics = [run["train_metrics"] for run in done]
    return Arm(
        name=name,
        seeds=tuple(run["seed"] for run in done),
        num_findings=num_findings,
        num_alarms=sum(bool(run.get("findings")) for run in done),
        num_failed=len(runs) - len(done) - num_findings,
        scores={part: _scores(done, part) for part in PARTS},
        train_metrics={
            key: Estimate.of([one[key] for one in metrics])
            for key in (metrics[0] if metrics else {})
            if all(key in one for one in metrics)
        },
        held_out_pairs=_estimates(_of_pairs(done)),
        correction=_estimates(_of_attempts(done)),
    )


def _scores(done: Sequence[Summary], part: str) -> PartScores:
    base, last = _accuracy(done, "base", part), _last(done, part)
    gain = _paired(base, last)
    return PartScores(
        base=Estimate.of(list(base.values())) if base else None,
        last=Estimate.of(list(last.values())) if last else None,
        gain=Estimate.of(gain) if gain else None,
    )


def _compared(runs: Sequence[Summary]) -> dict[str, dict[int, float]]:
    """What arms are compared by: numbers of the last checkpoint by name, then seed."""
    of_attempts = {
        key: values
        for key, values in _of_attempts(runs).items()
        if not key.endswith(("acc@t1", *_SHARES.values()))  # the first attempt is the part itself
    }
    return {**{part: _last(runs, part) for part in PARTS}, **_of_pairs(runs), **of_attempts}


def _of_pairs(runs: Sequence[Summary]) -> dict[str, dict[int, float]]:
    pairs = {run["seed"]: run["held_out_pairs"] for run in runs if run.get("held_out_pairs")}
    return {key: {seed: one[key] for seed, one in pairs.items()} for key in (PAIR_METRICS if pairs else ())}


def _of_attempts(runs: Sequence[Summary]) -> dict[str, dict[int, float]]:
    """What asking again did to the last checkpoint on test: ``greedy acc@t2``, ``greedy t1→t2 delta`` …, by seed."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        for part, section in run["test"].get("last", {}).get("correction", {}).items():
            change = overall(section)
            numbers = {f"acc@t{t}": one["accuracy"] for t, one in enumerate(section["attempts"], start=1)}
            span = f"t1→t{change['to']}"
            numbers |= {f"{span} delta": change["delta"]}
            numbers |= {f"{span} {short}": change[key] for key, short in _SHARES.items()}
            for name, value in numbers.items():
                found.setdefault(f"{part} {name}", {})[run["seed"]] = value
    return found


def _estimates(metrics: Mapping[str, Mapping[int, float]]) -> dict[str, Estimate]:
    return {key: Estimate.of(list(by_seed.values())) for key, by_seed in metrics.items()}


def _last(runs: Sequence[Summary], part: str) -> dict[int, float]:
    return _accuracy(runs, "last", part)


def _accuracy(runs: Sequence[Summary], which: str, part: str) -> dict[int, float]:
    """Test accuracy by seed, of the runs that measured it."""
    return {run["seed"]: run["test"][which][part]["accuracy"] for run in runs if part in run["test"].get(which, {})}


def _paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    return [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]


def format_text(table: SweepTable) -> list[str]:
    """For a terminal: aligned columns, then the comparisons."""
    body = [_header(table), *(_cells(arm, table) for arm in table.arms)]
    widths = [max(len(row[column]) for row in body) for column in range(len(body[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]
    return [*lines, "", *_comparison_lines(table), *_notes(table)]


def format_markdown(table: SweepTable) -> list[str]:
    """For a page: the same table and lines in Markdown."""
    header = _header(table)
    rows = [header, ["---"] * len(header), *(_cells(arm, table) for arm in table.arms)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    comparisons = [f"- {line}" for line in _comparison_lines(table)]
    return [*lines, "", *comparisons, *([""] if comparisons else []), *_notes(table)]


def _header(table: SweepTable) -> list[str]:
    scores = [f"{part} {what}" for part in _parts(table) for what in ("base", "last", "gain")]
    pairs = [f"held-out {key}" for key in table.pair_metrics]
    return ["arm", "seeds", *scores, *table.correction_metrics, *pairs, *table.common_metrics]


def _parts(table: SweepTable) -> list[str]:
    return [part for part in PARTS if any(arm.scores[part].last for arm in table.arms)]


def _cells(arm: Arm, table: SweepTable) -> list[str]:
    ended = [(arm.num_alarms, "with findings"), (arm.num_findings, "ended in a finding"), (arm.num_failed, "failed")]
    counts = [str(len(arm.seeds)), *(f"{count} {what}" for count, what in ended if count)]
    cells = [arm.name, ", ".join(counts)]
    for scores in (arm.scores[part] for part in _parts(table)):
        cells += [_percent(scores.base), _percent(scores.last), _percent(scores.gain, sign="+")]
    cells += [
        _percent(arm.correction.get(key), sign="+" if key.endswith("delta") else "") for key in table.correction_metrics
    ]
    cells += [_in_its_unit(arm.held_out_pairs.get(key), key) for key in table.pair_metrics]
    metrics = [arm.train_metrics.get(key) for key in table.common_metrics]
    return [*cells, *("-" if metric is None else f"{metric.mean:.4g}" for metric in metrics)]


def _percent(estimate: Estimate | None, sign: str = "") -> str:
    """In percent; an interval without width (the base is the same for every seed) is left out."""
    if estimate is None:
        return "-"
    text = f"{100 * estimate.mean:{sign}.1f}"
    if estimate.low is None or estimate.high is None or estimate.high - estimate.low <= _ROUNDING:
        return text
    return f"{text} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"


def _in_its_unit(estimate: Estimate | None, key: str, sign: str = "") -> str:
    """A reward margin in nats, everything else in percent."""
    if key != "reward_margin" or estimate is None:
        return _percent(estimate, sign)
    text = f"{estimate.mean:{sign}.3f}"
    return text if estimate.low is None else f"{text} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def _comparison_lines(table: SweepTable) -> list[str]:
    lines = []
    for line in table.comparisons:
        seeds = f"{line.difference.num_seeds} seed{'s' if line.difference.num_seeds > 1 else ''}"
        difference = _in_its_unit(line.difference, line.part, sign="+")
        lines.append(f"{line.arm} against {line.reference}, {line.part}: {difference} ({seeds}): {line.verdict}")
    return lines


def _notes(table: SweepTable) -> list[str]:
    most = max((len(arm.seeds) for arm in table.arms), default=0)
    if most == 0:
        return ["no run is done"]
    if most == 1:
        return ["accuracies in percent; one seed, so there are no intervals"]
    note = "accuracies in percent: mean over seeds [95 % t interval]; differences are paired by seed"
    many = len(table.arms) > 2
    return [note + ("; intervals are not corrected for the number of comparisons" if many else "")]
