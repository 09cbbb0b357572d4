"""How often two runs find the same first wrong step: the same errors, located in two ways.

    reasonrun sweep step_dpo_arith method.localize.kind=mc_rollout,programmatic --out runs/locators \\
        task.multiplications=1 task.min_steps=2 method.rectify.check=none
    python scripts/locator_agreement.py runs/locators/*mc_rollout* runs/locators/*programmatic*

Both runs must have collected the same solutions (the same seed and settings of ``method.collect``).
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from reasonrun.ledger.files import Files
from reasonrun.ledger.seals import read_seal
from reasonrun.ledger.steps import Committed
from reasonrun.metrics import wilson_interval

NO_ERRORS = {"correct", "over_cap", "evidence"}  # left out, but not for want of a first wrong step


def rows(run: Path, step: str, table: str) -> list[dict[str, object]]:
    path = run / "steps" / step
    seal = read_seal(path)
    if seal is None:
        raise SystemExit(f"{run} has no committed step {step}")
    found = Committed(step, path, seal, Files()).table_paths(table)
    return [row for part in found for row in pq.read_table(part).to_pylist()]


def located(run: Path, step: str) -> tuple[dict[str, int], Counter[str], set[str]]:
    """First wrong steps by rollout, the reasons of those without one, and all errors that were looked into."""
    places = {row["rollout_ids"][0]: row["num_steps"] + 1 for row in rows(run, step, "rows")}
    missing = {row["rollout_id"]: row["reason"] for row in rows(run, step, "left_out")}
    missing = {
        rollout: reason
        for rollout, reason in missing.items()
        if reason not in NO_ERRORS and not reason.startswith("ungraded")
    }
    return places, Counter(missing.values()), set(places) | set(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--step", default="round-001/localize/locate")
    args = parser.parse_args()
    found = [located(run, args.step) for run in args.runs]
    if found[0][2] != found[1][2]:
        raise SystemExit("the runs did not look into the same errors")
    num_errors = len(found[0][2])
    if not found[0][0].keys() & found[1][0].keys():
        raise SystemExit(f"of {num_errors} errors none was placed by both runs")
    for run, (places, reasons, _) in zip(args.runs, found, strict=True):
        print(
            f"{run.name}: placed {len(places)} of {num_errors} errors ({len(places) / num_errors:.1%}); {dict(reasons)}"
        )
    first, second = found[0][0], found[1][0]
    both = sorted(first.keys() & second.keys())
    num_equal = sum(first[rollout] == second[rollout] for rollout in both)
    low, high = wilson_interval(num_equal, len(both))
    print(f"placed by both: {len(both)}; same step: {num_equal} ({num_equal / len(both):.1%} [{low:.1%}, {high:.1%}])")
    table = Counter((first[rollout], second[rollout]) for rollout in both)
    numbers = sorted({number for cell in table for number in cell})
    print(f"\nrows: {args.runs[0].name}; columns: {args.runs[1].name}\n")
    print("|  | " + " | ".join(f"step {n}" for n in numbers) + " |")
    print("|---" * (len(numbers) + 1) + "|")
    for row in numbers:
        print(f"| step {row} | " + " | ".join(str(table[row, column]) for column in numbers) + " |")


if __name__ == "__main__":
    main()
