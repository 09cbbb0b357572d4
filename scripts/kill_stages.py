"""Kill a real run once in each of its stages and compare weights and curated rows with an undisturbed run.

    python scripts/kill_stages.py

Hugging Face engine, SFT trainer and the carried model on the CPU. The supervisor is killed with SIGKILL while it
samples, grades, trains, takes over a checkpoint and evaluates; after each kill the same command continues. Prints one
JSON line; exits 1 when a byte differs or a stage was never hit.
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

OVERRIDES = [
    "task.num_train=40",
    "task.num_dev=20",
    "task.num_test=20",
    "method.rounds=1",
    "method.num_samples=8",
    "method.steps_start=8",
    "method.sft.checkpoint_every=2",
    "method.sft.batch_size=8",
    "evaluate.num_samples=2",
    "engine.unit_rows=16",
]
STAGES = {
    "evaluate": "round-001/evaluate/greedy",
    "sample": "round-001/sample",
    "grade": "round-001/grade",
    "train": "round-001/train",
}
UNCOMPARED = {"attempts", "derived", "quarantine", "lock"}


def content(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    kept = [path for path in files if path.relative_to(directory).parts[0] not in UNCOMPARED]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def start(directory: Path, fault: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "reasonrun.cli.main", "train", "star_arith", *OVERRIDES, "--run", str(directory)]
    env = {**os.environ, **({"REASONRUN_FAULT": fault} if fault else {})}
    log = (directory.parent / f"{directory.name}.log").open("ab")
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def kill_inside(directory: Path, step: str) -> bool:
    """Start the run and kill its supervisor while ``step`` is at work. Whether it was still unfinished then."""
    process = start(directory)
    folder = directory / "steps" / step
    while process.poll() is None:
        begun = (folder / "step.json").exists() and not (folder / "_OK.json").exists()
        if begun and (any(folder.glob("wal*.jsonl")) or not step.endswith(("sample", "greedy"))):
            time.sleep(1.0 if step.endswith("train") else 0.0 if step.endswith("grade") else 0.2)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return not (folder / "_OK.json").exists()
        time.sleep(0.0005)
    return False


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory(prefix="reasonrun-stages-") as folder:
        clean, killed = Path(folder) / "clean", Path(folder) / "killed"
        if start(clean).wait() != 0:
            raise SystemExit((Path(folder) / "clean.log").read_text())
        hit = {stage: kill_inside(killed, step) for stage, step in STAGES.items()}
        process = start(killed, fault="ckpt.mid_file:kill")
        hit["mid-checkpoint"] = process.wait() == -signal.SIGKILL
        final = start(killed).wait()
        expected, found = content(clean), content(killed)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        weights = [name for name in expected if name.endswith(".safetensors")]
        line = {"hit": hit, "exit": final, "files": len(expected), "weights": len(weights), "differ": differ[:10]}
        print(json.dumps({"equal": not differ and final == 0, **line}))
        if differ or final or not all(hit.values()):
            print((Path(folder) / "killed.log").read_text()[-3000:], file=sys.stderr)
            raise SystemExit(1)


if __name__ == "__main__":
    main()
