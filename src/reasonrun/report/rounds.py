"""The table of rounds: what each round tried, kept, learnt and scored, from the metrics record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasonrun.correction import overall


@dataclass(kw_only=True)
class RoundRow:
    """One line of the table; ``accuracy`` belongs to the policy that the round began with."""

    scope: str
    evaluations: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # part -> accuracy, low, high
    corrections: dict[str, dict[str, Any]] = field(default_factory=dict)  # dev: part -> its ``correction_section``
    judgings: dict[str, dict[str, Any]] = field(default_factory=dict)  # dev: part -> its ``judging_section``
    num_rollouts: int = 0
    num_correct: int = 0
    num_kept: int = 0
    num_hinted: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    loss: float | None = None
    pairs: tuple[float, float] | None = None  # reward margin and pair accuracy on held-out pairs
    seconds: dict[str, float] = field(default_factory=dict)
    num_switches: int = 0  # changes of what is on the devices
    switch_seconds: float = 0.0
    mismatch: float | None = None  # largest mean difference per token between the engine and the trainer

    @property
    def kept_share(self) -> float | None:
        return self.num_kept / self.num_rollouts if self.num_rollouts else None


def round_table(rows: Iterable[dict[str, Any]], notes: Sequence[dict[str, Any]]) -> list[RoundRow]:
    """Rows of the metrics record, folded by outermost scope, in order; evaluation samples are not counted as tries.

    Args:
        rows: lines of ``metrics.jsonl``.
        notes: what the attempts noted about steps: seconds, switches, differences between engine and trainer.
    """
    table: dict[str, RoundRow] = {}
    for row in rows:
        scope, _, rest = row["step"].partition("/")
        if not rest or scope == "problems":
            continue
        line = table.setdefault(scope, RoundRow(scope=scope))
        _fold(line, row, in_evaluation=rest.startswith("evaluate/") or rest.startswith("test-"))
    for step, spent in seconds_by_step(notes).items():
        scope, _, rest = step.partition("/")
        if scope in table:
            verb = "evaluate" if rest.startswith(("evaluate", "test-")) else rest.split("-")[0]
            by_verb = table[scope].seconds
            by_verb[verb] = by_verb.get(verb, 0.0) + spent
    for note in notes:
        scope = note.get("step", "").partition("/")[0]
        if scope in table:
            _fold_note(table[scope], note)
    return list(table.values())


def _fold_note(line: RoundRow, note: dict[str, Any]) -> None:
    line.num_switches += note.get("switches", 0)
    line.switch_seconds += note.get("switch_seconds", 0.0)
    if "mean" in note.get("mismatch", {}):
        line.mismatch = max(line.mismatch or 0.0, note["mismatch"]["mean"])


def _fold(line: RoundRow, row: dict[str, Any], *, in_evaluation: bool) -> None:
    verb = row["verb"]
    if verb == "evaluate":
        for part in ("greedy", "sampled"):
            if part in row:
                low, high = row[part]["interval"]
                key = part if row["split"] == "dev" else f"{part} {row['step'].split('/')[-1]}"
                line.evaluations[key] = (row[part]["accuracy"], low, high)
        if row["split"] == "dev":
            line.corrections |= row.get("correction", {})
            line.judgings |= row.get("judging", {})
    elif verb == "evaluate_pairs" and row["num_pairs"]:
        line.pairs = (row["reward_margin"], row["pair_accuracy"])
    elif in_evaluation:
        return
    elif verb == "sample":
        line.num_tokens += row["num_completion_tokens"]
    elif verb == "grade" and "grader" not in row:  # a judge's verdicts are no tries
        line.num_rollouts += row["num_rollouts"]
        line.num_correct += row["num_correct"]
    elif verb == "curate":
        line.num_kept += row["num_examples"]
        line.num_hinted += row["sources"].get("hinted", 0)
    elif verb == "train":
        line.num_steps += row["num_steps"]
        line.num_tokens += row.get("num_completion_tokens", 0)
        line.loss = row.get("loss")


def format_table(table: list[RoundRow]) -> list[str]:
    """The table as aligned text lines."""
    parts = list(dict.fromkeys(p for line in table for p in line.evaluations if " " not in p))
    with_pairs = any(line.pairs for line in table)
    pairs_header = ["held-out margin, pairs right"] if with_pairs else []
    engine_columns = _engine_columns(table)
    header = [
        "round",
        *(column for p in parts for column in (f"dev {p}", *_correction_header(table, p), *_judging_header(table, p))),
        *pairs_header,
        "tried",
        "right",
        "kept",
        "hinted",
        "steps",
        "tokens",
        *engine_columns,
        "seconds",
    ]
    body = [header]
    for line in table:
        scores = []
        for part in parts:
            cells = _correction_cells(line.corrections.get(part)) if _correction_header(table, part) else []
            judged = [_judging_cell(line.judgings.get(part), name) for name in _judging_header(table, part)]
            scores += [_interval(line.evaluations.get(part)), *cells, *judged]
        if with_pairs:
            scores.append("-" if line.pairs is None else f"{line.pairs[0]:.3f}, {line.pairs[1]:.1%}")
        counts = [line.num_rollouts, line.num_correct, line.num_kept, line.num_hinted, line.num_steps, line.num_tokens]
        spent = " ".join(f"{verb} {value:.1f}" for verb, value in line.seconds.items())
        engine = [_engine_cell(line, column) for column in engine_columns]
        body.append([line.scope, *scores, *(f"{count:,}" if count else "-" for count in counts), *engine, spent])
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body]


def _engine_columns(table: list[RoundRow]) -> list[str]:
    """What is shown of the engine, where there is anything to show."""
    shown = {
        "switches": any(line.num_switches for line in table),
        "engine off by": any(line.mismatch is not None for line in table),
    }
    return [column for column, is_shown in shown.items() if is_shown]


def _engine_cell(line: RoundRow, column: str) -> str:
    if column == "switches":
        return f"{line.num_switches} in {line.switch_seconds:.1f} s" if line.num_switches else "-"
    return "-" if line.mismatch is None else f"{line.mismatch:.1e}"


def _correction_header(table: list[RoundRow], part: str) -> list[str]:
    """The columns of the last attempt, where any line has several; a run asks equally often in all of them."""
    last = max((overall(line.corrections[part])["to"] for line in table if part in line.corrections), default=0)
    return [f"dev {part} t{last}", "delta"] if last else []


def _correction_cells(section: dict[str, Any] | None) -> list[str]:
    if section is None:
        return ["-", "-"]
    attempt, change = section["attempts"][-1], overall(section)
    return [_interval((attempt["accuracy"], *attempt["interval"])), _points(change["delta"], change["delta_interval"])]


def _judging_header(table: list[RoundRow], part: str) -> list[str]:
    """The columns of a judge, where any line has them."""
    sections = [line.judgings[part] for line in table if part in line.judgings]
    return [*_agreement_columns(sections), *(["entropy"] if sections else [])]


def _agreement_columns(sections: Sequence[dict[str, Any]]) -> list[str]:
    """How these agree with what is known: on pairs, and with gold scores."""
    columns = {
        "pairs": any("pairs" in section for section in sections),
        "pearson": any("pearson" in section and section["exact"]["value"] is not None for section in sections),
    }
    return [name for name, is_there in columns.items() if is_there]


def _judging_cell(section: dict[str, Any] | None, column: str) -> str:
    if section is None:
        return "-"
    if column == "entropy":
        return "-" if section["entropy_bits"] is None else f"{section['entropy_bits']:.2f} bits"
    if column == "pearson":
        return _pearson(section)
    accuracy = section["pairs"]["accuracy"] if "pairs" in section else None
    if accuracy is None or accuracy["value"] is None:
        return "-"
    low, high = accuracy["interval"]
    return _interval((accuracy["value"], low, high))


def _pearson(section: dict[str, Any]) -> str:
    found = section.get("pearson", {"value": None})
    if found["value"] is None:
        return "-"
    interval = "" if found["interval"] is None else f" [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"
    return f"{found['value']:.3f}{interval}"


def _points(difference: float, interval: Sequence[float]) -> str:
    return f"{100 * difference:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _interval(score: tuple[float, float, float] | None) -> str:
    return "-" if score is None else f"{score[0]:.1%} [{score[1]:.1%}, {score[2]:.1%}]"


def format_result(result: dict[str, Any]) -> list[str]:
    """Before and after on the test split, one line per part; with several attempts the last one and its delta, of a judge
    Pearson's correlation with gold and the accuracy on pairs, too."""
    lines: list[tuple[str, list[str]]] = []
    order = ("base", "last", "best", *sorted(result.get("nominees", ())))  # stored results are sorted by key
    test = {name.replace("_", " "): result["test"][name] for name in order}
    for part in ("greedy", "sampled"):
        if part not in test["base"]:
            continue
        cells = [f"{name} {_interval((t[part]['accuracy'], *t[part]['interval']))}" for name, t in test.items()]
        lines.append((part, cells))
        sections = {name: t["correction"][part] for name, t in test.items() if "correction" in t}
        if sections:
            pairs = [(name, *_correction_cells(section)) for name, section in sections.items()]
            last = overall(next(iter(sections.values())))["to"]
            lines.append((f"{part} t{last}", [f"{name} {accuracy}" for name, accuracy, _ in pairs]))
            lines.append((f"{part} delta", [f"{name} {delta}" for name, _, delta in pairs]))
        judged = {name: t["judging"][part] for name, t in test.items() if part in t.get("judging", {})}
        for column in _agreement_columns(list(judged.values())):
            cells = [f"{name} {_judging_cell(section, column)}" for name, section in judged.items()]
            lines.append((f"{part} {column}", cells))
    width = max((len(label) for label, _ in lines), default=0)
    return [f"test {label:{max(width, 8)}s} " + "   ".join(cells) for label, cells in lines]


def seconds_by_step(notes: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds per step, summed over the notes of all attempts."""
    total: dict[str, float] = defaultdict(float)
    for note in notes:
        if "seconds" in note and "step" in note:
            total[note["step"]] += note["seconds"]
    return dict(total)
