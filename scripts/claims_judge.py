"""The tables and claims of the self-rationalizing judge on `arith_judge`, from the summaries of a sweep.

    reasonrun sweep self_rationalize_arith,self_rationalize_arith_m1,self_rationalize_arith_majority,\\
        self_rationalize_arith_meta_judge,self_rationalize_arith_rft_chosen,self_rationalize_arith_score_only,\\
        self_rationalize_arith_score_only_inference seed=0,1,2,3,4 --out runs/judge
    python scripts/claims_judge.py runs/judge

Test split, last checkpoint, greedy and at temperature 1. Means over seeds with 95 % t intervals; differences between arms
are paired by seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reasonrun.metrics import mean_interval_over_seeds

FIRST = "self_rationalize_arith"
ARMS = ("", "_sft", "_m1", "_majority", "_meta_judge", "_rft_chosen", "_score_only", "_score_only_inference")
LABELS = {FIRST: "correct, m = 2", f"{FIRST}_m1": "correct, m = 1"}
PARTS = ("greedy", "sampled")
Section = dict[str, Any]

PERCENT: dict[str, Callable[[Section], float]] = {
    "exact": lambda table: table["exact"]["value"],
    "within 1": lambda table: table["within_1"]["value"],
}
PLAIN: dict[str, Callable[[Section], float]] = {
    "Pearson": lambda table: table["pearson"]["value"] or 0.0,  # a constant judge agrees with nothing
    "Spearman": lambda table: table["spearman"]["value"] or 0.0,
    "Kendall": lambda table: table["kendall"]["value"] or 0.0,
    "entropy": lambda table: table["entropy_bits"],
    "tokens": lambda table: table["mean_num_tokens"],
    "unread %": lambda table: 100 * table["unread_share"],
}
DRAWS: dict[str, Callable[[Section], float]] = {
    "one draw": lambda table: table["exact"]["value"],
    "agreement": lambda table: table["draws"]["agreement"]["value"],
    "self-consistency": lambda table: table["draws"]["self_consistency"]["value"],
    "best of 4": lambda table: table["draws"]["best_of_n"]["value"],
    "any of 4": lambda table: table["draws"]["oracle"]["value"],
}


def section(summary: dict[str, Any], which: str, part: str) -> Section:
    found: Section = summary["test"][which]["judging"][part]
    return found


def cell(values: list[float], *, scale: float = 100, digits: int = 1, signed: bool = False) -> str:
    mean, low, high = (scale * value for value in mean_interval_over_seeds(values))
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{mean:{form}}" if len(set(values)) == 1 else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def rows_of(arms: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]], str]]:
    """(label, runs, which checkpoint): the base once, the judge of gold judgements in both styles, then every arm."""
    rows = [("base", arms[FIRST][:1], "base"), ("sft", arms[FIRST], "seed_judge")]
    score_only = arms.get(f"{FIRST}_score_only")
    rows += [("sft, score only", score_only, "seed_judge")] if score_only else []
    return rows + [(LABELS.get(name, name.removeprefix(f"{FIRST}_")), runs, "last") for name, runs in arms.items()]


def print_table(arms: dict[str, list[dict[str, Any]]], part: str) -> None:
    print(f"\n| arm | seeds | {' | '.join([*PERCENT, *PLAIN])} |\n|{'---|' * (len(PERCENT) + len(PLAIN) + 2)}")
    for label, runs, which in rows_of(arms):
        tables = [section(run, which, part) for run in runs]
        cells = [cell([value(table) for table in tables]) for value in PERCENT.values()]
        for name, value in PLAIN.items():
            digits = 1 if name in ("tokens", "unread %") else 2
            cells.append(cell([value(table) for table in tables], scale=1, digits=digits))
        print(f"| {label} | {len(runs) if which != 'base' else '-'} | {' | '.join(cells)} |")


def print_draws(arms: dict[str, list[dict[str, Any]]]) -> None:
    """What several draws of one judge are worth."""
    print(f"\n| arm | {' | '.join(DRAWS)} |\n|{'---|' * (len(DRAWS) + 1)}")
    for label, runs, which in rows_of(arms):
        tables = [section(run, which, "sampled") for run in runs]
        print(f"| {label} | {' | '.join(cell([value(table) for table in tables]) for value in DRAWS.values())} |")


def print_difference(
    one: list[dict[str, Any]], which: str, other: list[dict[str, Any]], other_which: str, what: str
) -> None:
    by_seed = {run["seed"]: run for run in other}
    pairs = [(run, by_seed[run["seed"]]) for run in one if run["seed"] in by_seed]
    for part in PARTS:
        shown = []
        for name, value, scale, digits in (("exact", PERCENT["exact"], 100, 1), ("Pearson", PLAIN["Pearson"], 1, 3)):
            gaps = [value(section(a, which, part)) - value(section(b, other_which, part)) for a, b in pairs]
            shown.append(f"{name} {cell(gaps, scale=scale, digits=digits, signed=True)}")
        print(f"- {what}, {part}: {', '.join(shown)} ({len(pairs)} seeds)")


def print_differences(arms: dict[str, list[dict[str, Any]]]) -> None:
    first = arms[FIRST]
    print_difference(first, "last", first, "seed_judge", "m = 2 against sft")
    for name, runs in arms.items():
        label = LABELS.get(name, name.removeprefix(f"{FIRST}_"))
        if name == FIRST:
            continue
        print_difference(runs, "last", runs, "seed_judge", f"{label} against sft asked in the same style")
        print_difference(first, "last", runs, "last", f"m = 2 against {label}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep, or one that holds its summaries/")
    folder = parser.parse_args().folder
    arms: dict[str, list[dict[str, Any]]] = {}
    order = [FIRST + arm for arm in ARMS]
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "summaries").glob("*.json"))]
    for summary in sorted(summaries, key=lambda one: (order.index(one["recipe"]), one["seed"])):
        if summary["recipe"] == f"{FIRST}_sft":
            continue  # the judge that every other run begins with, and measures, too
        if summary["exit_code"] == 0:
            arms.setdefault(summary["recipe"], []).append(summary)
        else:
            print(f"not in the tables: {summary['recipe']} seed {summary['seed']}, exit {summary['exit_code']}")
    if FIRST not in arms:
        raise SystemExit(f"{folder} holds no finished run of {FIRST}")
    for part in PARTS:
        print(f"\n{part}")
        print_table(arms, part)
    print("\nexact, by what is made of several draws")
    print_draws(arms)
    print()
    print_differences(arms)
    for name, runs in arms.items():
        found = [finding for run in runs for finding in run["findings"]]
        print(f"- findings of {name}: {len(found)}: {'; '.join(found) or 'none'}")


if __name__ == "__main__":
    main()
