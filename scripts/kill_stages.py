"""Kill a real run once in each of its stages and compare weights and curated rows with an undisturbed run.

    python scripts/kill_stages.py [star_arith] [step_dpo_arith] [score_arith] [self_rationalize_arith]

Hugging Face engine, real trainers and the carried model on the CPU. The supervisor is killed with SIGKILL while it
samples, grades, localizes, rectifies, judges, pairs, trains, takes over a checkpoint and evaluates; after each kill the same
command continues. Prints one JSON line for each recipe; exits 1 when a byte differs or a stage was never hit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = ["task.num_train=40", "task.num_dev=20", "task.num_test=20", "evaluate.num_samples=2", "engine.unit_rows=16"]
OVERRIDES = {
    "star_arith": [
        "method.rounds=1",
        "method.num_samples=8",
        "method.steps_start=8",
        "method.sft.checkpoint_every=2",
        "method.sft.batch_size=8",
    ],
    "step_dpo_arith": [
        "method.localize.kind=mc_rollout",
        "method.num_steps=8",
        "method.dpo.checkpoint_every=2",
        "method.dpo.batch_size=8",
    ],
    "score_arith": [
        "method.stage1.rounds=1",
        "method.stage1.steps=6",
        "method.stage2.rounds=2",
        "method.stage2.steps=6",
        "method.rl.checkpoint_every=2",
        "method.rl.batch_size=16",
    ],
    "self_rationalize_arith": [
        "method.pairs.strategy=meta_judge",
        "method.num_items=[20,10]",
        "method.seed_judge.num_items=8",
        "method.num_steps=8",
        "method.seed_judge.num_steps=4",
        "method.pairs.margin=1",
        "method.sft.checkpoint_every=2",
        "method.dpo.checkpoint_every=2",
        "method.dpo.batch_size=8",
    ],
}
STAGES = {
    "star_arith": {
        "evaluate": "round-001/evaluate/greedy",
        "sample": "round-001/sample",
        "grade": "round-001/grade",
        "train": "round-001/train",
    },
    "step_dpo_arith": {
        "localize": "round-001/localize/probe-2/sample",
        "rectify": "round-001/rectify",
        "train": "round-001/train",
    },
    "score_arith": {
        "Stage I": "stage1-001/train",
        "Stage II": "stage2-001/train",
        "Stage II, carried on": "stage2-002/train",
    },
    "self_rationalize_arith": {
        "first judge": "seed/train",
        "judge": "round-001/judge",
        "read": "round-001/read",
        "rate": "round-001/rate/ask",
        "pairs": "round-001/pairs",
        "DPO": "round-001/train",
        "DPO of round 2": "round-002/train",
    },
}
SAMPLES = (
    "sample",
    "greedy",
    "rectify",
    "judge",
    "ask",
)  # steps with a log of rows, which is to hold some when the kill comes
FINDING = 5  # exit code of a run that finished with something to say
UNCOMPARED = {"attempts", "derived", "quarantine", "lock"}


def content(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    kept = [path for path in files if path.relative_to(directory).parts[0] not in UNCOMPARED]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def start(recipe: str, directory: Path, fault: str = "") -> subprocess.Popen[bytes]:
    overrides = [*SMALL, *OVERRIDES[recipe]]
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", recipe, *overrides, "--run", str(directory)]
    env = {**os.environ, **({"REASONRUN_FAULT": fault} if fault else {})}
    log = (directory.parent / f"{directory.name}.log").open("ab")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def kill_inside(recipe: str, directory: Path, step: str) -> bool:
    """Start the run and kill its supervisor while ``step`` is at work. Whether it was still unfinished then."""
    process = start(recipe, directory)
    folder = directory / "steps" / step
    while process.poll() is None:
        begun = (folder / "step.json").exists() and not (folder / "_OK.json").exists()
        if begun and (any(folder.glob("wal*.jsonl")) or not step.endswith(SAMPLES)):
            time.sleep(1.0 if step.endswith("train") else 0.2 if step.endswith(SAMPLES) else 0.0)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return not (folder / "_OK.json").exists()
        time.sleep(0.0005)
    return False


def check(recipe: str) -> bool:
    """Kill and continue a run of ``recipe`` in all its stages, and print how it compares with one left alone."""
    with tempfile.TemporaryDirectory(prefix="reasonrun-stages-") as folder:
        clean, killed = Path(folder) / "clean", Path(folder) / "killed"
        ended = start(recipe, clean).wait()
        if ended not in (0, FINDING):
            raise SystemExit((Path(folder) / "clean.log").read_text())
        hit = {stage: kill_inside(recipe, killed, step) for stage, step in STAGES[recipe].items()}
        process = start(recipe, killed, fault="ckpt.mid_file:kill")
        hit["mid-checkpoint"] = process.wait() == -signal.SIGKILL
        final = start(recipe, killed).wait()
        expected, found = content(clean), content(killed)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        weights = [name for name in expected if name.endswith(".safetensors")]
        line = {"hit": hit, "exit": final, "files": len(expected), "weights": len(weights), "differ": differ[:10]}
        print(json.dumps({"recipe": recipe, "equal": not differ and final == ended, **line}))
        if differ or final != ended:
            print((Path(folder) / "killed.log").read_text()[-3000:], file=sys.stderr)
        return not differ and final == ended and all(hit.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(OVERRIDES))
    recipes = parser.parse_args().recipes or list(OVERRIDES)
    outcomes = [check(recipe) for recipe in recipes]
    raise SystemExit(0 if all(outcomes) else 1)


if __name__ == "__main__":
    main()
