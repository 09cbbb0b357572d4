"""The tables and claims of SCoRe on `arith`, from the summaries of a sweep.

    reasonrun sweep score_arith,score_arith_no_stage1,score_arith_no_bonus,score_arith_single_turn,\\
        score_arith_naive_two_turn,score_arith_star_traces,score_arith_pair_sft seed=0,1,2,3,4 --out runs/score
    python scripts/claims_score.py runs/score

Test split, greedy and at temperature 1. Means over seeds with 95 % t intervals; differences between arms are paired by seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from reasonrun.correction import overall
from reasonrun.metrics import mean_interval_over_seeds

COLUMNS = (
    ("acc@t1", "accuracy_first"),
    ("acc@t2", "accuracy_last"),
    ("delta", "delta"),
    ("i→c", "incorrect_to_correct"),
    ("c→i", "correct_to_incorrect"),
    ("changed", "changed_share"),
    ("edit ratio", "edit_ratio"),
)
PARTS = ("greedy", "sampled")
ORDER = (
    "score_arith",
    "score_arith_no_stage1",
    "score_arith_no_bonus",
    "score_arith_naive_two_turn",
    "score_arith_single_turn",
    "score_arith_star_traces",
    "score_arith_pair_sft",
)


def tables_of(summary: dict[str, Any], which: str, part: str) -> dict[str, Any]:
    return overall(summary["test"][which]["correction"][part])


def cell(values: list[float], signed: bool = False) -> str:
    mean, low, high = (100 * value for value in mean_interval_over_seeds(values))
    sign = "+" if signed else ""
    return f"{mean:{sign}.1f}" if len(set(values)) == 1 else f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def print_table(arms: dict[str, list[dict[str, Any]]], part: str) -> None:
    print(f"\n| arm | seeds | {' | '.join(name for name, _ in COLUMNS)} |")
    print(f"|{'---|' * (len(COLUMNS) + 2)}")
    rows = [("base", next(iter(arms.values()))[:1], "base")]
    rows += [(name, runs, "last") for name, runs in arms.items()]
    rows.insert(1, ("score_arith, after Stage I", arms["score_arith"], "after_stage1"))
    for name, runs, which in rows:
        cells = [cell([tables_of(run, which, part)[key] for run in runs], key == "delta") for _, key in COLUMNS]
        print(f"| {name} | {len(runs) if which != 'base' else '-'} | {' | '.join(cells)} |")


def print_errors(arms: dict[str, list[dict[str, Any]]], part: str) -> None:
    """Delta over its standard error within each run: problems are the units."""
    for name, runs in arms.items():
        ratios = [
            table["delta"] / table["delta_se"] if table["delta_se"] else 0.0
            for table in (tables_of(run, "last", part) for run in runs)
        ]
        print(f"- {name}, {part}: delta / SE by seed {', '.join(f'{ratio:+.1f}' for ratio in ratios)}")


def print_differences(arms: dict[str, list[dict[str, Any]]], part: str) -> None:
    reference = {run["seed"]: tables_of(run, "last", part) for run in arms["score_arith"]}
    for name, runs in arms.items():
        if name == "score_arith":
            continue
        for label, key in (("delta", "delta"), ("acc@t2", "accuracy_last")):
            pairs = [
                tables_of(run, "last", part)[key] - reference[run["seed"]][key]
                for run in runs
                if run["seed"] in reference
            ]
            print(f"- {name} against score_arith, {part} {label}: {cell(pairs, True)} ({len(pairs)} seeds)")


def print_choices(arms: dict[str, list[dict[str, Any]]], part: str) -> None:
    """The last checkpoint, the best on dev, and that of the highest training reward, side by side."""
    for name, runs in arms.items():
        named = [which for which in ("last", "best", "by_training_reward") if which in runs[0]["test"]]
        shown = [
            f"{which.replace('_', ' ')} {cell([tables_of(run, which, part)['accuracy_last'] for run in runs])},"
            f" delta {cell([tables_of(run, which, part)['delta'] for run in runs], True)}"
            for which in named
        ]
        print(f"- {name}, {part} acc@t2: {'; '.join(shown)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep, or one that holds its summaries/")
    folder = parser.parse_args().folder
    arms: dict[str, list[dict[str, Any]]] = {}
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "summaries").glob("*.json"))]
    for summary in sorted(summaries, key=lambda one: (ORDER.index(one["recipe"]), one["seed"])):
        if summary["exit_code"] == 0:
            arms.setdefault(summary["recipe"], []).append(summary)
    for part in PARTS:
        print(f"\n{part}")
        print_table(arms, part)
        print()
        print_errors(arms, part)
        print_differences(arms, part)
        print_choices(arms, part)
    findings = {name: [finding for run in runs for finding in run["findings"]] for name, runs in arms.items()}
    print()
    for name, found in findings.items():
        print(f"- findings of {name}: {len(found)}: {'; '.join(found) or 'none'}")


if __name__ == "__main__":
    main()
