"""The claims table of STaR on ``arith``: every arm, every seed, one summary file per finished run.

    python scripts/claims_star.py --out docs/results            # 5 seeds of star_arith, 3 of each control
    python scripts/claims_star.py --out /tmp/check --seeds 1    # one seed per arm

Runs that have a summary already are not repeated. ``--table`` prints the table from the summaries alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reasonrun.metrics import mean_interval_over_seeds
from reasonrun.models import resolve
from reasonrun.recipe import load

ARMS = {
    "star_arith": 5,
    "star_arith_no_filter": 3,
    "gold_sft_arith": 3,
    "star_arith_no_rationalize": 3,
}


def run(arm: str, seed: int, out: Path, runs: Path) -> None:
    summary = out / f"{arm}-seed{seed}.json"
    if summary.exists():
        return
    directory = runs / f"{arm}-seed{seed}"
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", arm, f"seed={seed}", "--run", str(directory)]
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 5):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    summary.write_text(json.dumps(summarise(arm, seed, directory, done.returncode), indent=1, sort_keys=True) + "\n")


def summarise(arm: str, seed: int, directory: Path, exit_code: int) -> dict[str, Any]:
    """The numbers of a run that the table and its readers need."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    identity = json.loads((directory / "run.json").read_text())["identity"]
    dev = [row for row in rows if row["verb"] == "evaluate" and row["split"] == "dev"]
    test = {row["step"].split("/")[-1]: row for row in rows if row["verb"] == "evaluate" and row["split"] == "test"}
    best = test.get("test-best", test.get("test-last"))
    curated = [row for row in rows if row["verb"] == "curate"]
    return {
        "command": f"reasonrun train {arm} seed={seed}",
        "arm": arm,
        "seed": seed,
        "exit_code": exit_code,
        "recipe": identity["recipe"],
        "base_weights": resolve(load(arm).model).weights,
        "dev_greedy": [row["greedy"]["accuracy"] for row in dev],
        "dev_sampled": [row["sampled"]["accuracy"] for row in dev],
        "kept_share": [row["kept_share"] for row in curated],
        "hinted": [row["sources"].get("hinted", 0) for row in curated],
        "test_base": test.get("test-base"),
        "test_last": test.get("test-last"),
        "test_best": best,
        "num_optimizer_steps": sum(row["num_steps"] for row in rows if row["verb"] == "train"),
        "generated_tokens": sum(row["num_completion_tokens"] for row in rows if row["verb"] == "sample"),
    }


def table(out: Path) -> list[str]:
    """Markdown: mean over seeds with 95 % t intervals, of the test split at the last checkpoint, and the gain on base."""
    lines = [
        "| arm | seeds | test T=1 base | test T=1 last | gain | test greedy base | test greedy last | gain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        found = [json.loads(path.read_text()) for path in sorted(out.glob(f"{arm}-seed*.json"))]
        found = [one for one in found if one["test_last"]]
        if not found:
            continue
        cells = [arm, str(len(found))]
        for part in ("sampled", "greedy"):
            base = [one["test_base"][part]["accuracy"] for one in found]
            last = [one["test_last"][part]["accuracy"] for one in found]
            gain = [b - a for a, b in zip(base, last, strict=True)]
            cells += [interval(base), interval(last), interval(gain, signed=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def interval(values: list[float], *, signed: bool = False) -> str:
    mean = sum(values) / len(values)
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    if len(values) < 2 or len(set(values)) == 1:
        return text
    _, low, high = mean_interval_over_seeds(values)
    return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument("--seeds", type=int, default=0, help="at most this many seeds of an arm; 0 is the table's own")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for seed in range(max(ARMS.values())):
            for arm, num_seeds in ARMS.items():
                if seed < min(num_seeds, args.seeds or num_seeds):
                    run(arm, seed, args.out, args.runs)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
