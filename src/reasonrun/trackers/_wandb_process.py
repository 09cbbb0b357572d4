"""The exporter as a command: ``python -m reasonrun.trackers.wandb RUN_DIR``.

With ``--follow PID`` (how a run starts it) the first line on standard input says what to do, and the end of standard
input, or of that process, says that the run is over.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reasonrun.errors import EnvironmentProblem, ReasonrunError, RecipeError
from reasonrun.trackers._wandb_export import Job, follow
from reasonrun.trackers._wandb_mark import Mark
from reasonrun.trackers._wandb_privacy import Scrubber, secret_values
from reasonrun.trackers.wandb import Wandb, end_tree, is_installed, resolve_mode, tell


def main(arguments: list[str] | None = None) -> int:
    """Export a run; the exit code. A user's mistake is told in one line, W&B's own errors with their traceback."""
    scrubber = Scrubber(secret_values(os.environ))
    try:
        args = _parser().parse_args(arguments)
        run_dir: Path = args.run_dir.resolve()
        order = json.loads(sys.stdin.buffer.readline()) if args.follow else _order(run_dir, args, scrubber)
        settings = Wandb.Settings.model_validate(order["settings"])
        is_over = _watch(args.follow, settings.finish_seconds) if args.follow else lambda: True
        mode = resolve_mode(settings)
        if mode == "disabled":
            tell("W&B is switched off (mode: disabled); nothing is exported")
            return 0
        if not is_installed():
            raise EnvironmentProblem("The package wandb is not installed.", hint="pip install 'reasonrun[wandb]'")
        job = Job(
            run_dir=run_dir,
            project=settings.project,
            entity=settings.entity,
            mode="online" if mode == "online" else "offline",
            num_sample_rows=settings.num_sample_rows,
            config=order["config"],
            scrubber=scrubber,
        )
        tell(_summary(run_dir, follow(job, is_over)))
        return 0
    except ReasonrunError as error:
        tell(str(error))
        return error.exit_code
    except Exception:  # the recording boundary of this process: whatever W&B raises ends the export, never the run
        tell(scrubber.text(traceback.format_exc()))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reasonrun.trackers.wandb", description=__doc__)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--follow", type=int, default=0, help=argparse.SUPPRESS)
    for name in ("project", "entity", "mode"):
        parser.add_argument(f"--{name}", default=None, help=f"{name}, instead of what the run's recipe says")
    return parser


def _order(run_dir: Path, args: argparse.Namespace, scrubber: Scrubber) -> dict[str, Any]:
    """What to export for a run that nobody follows: its own recipe, changed by the command line."""
    if not (run_dir / "metrics.jsonl").is_file():
        raise RecipeError(f"{run_dir} holds no metrics.jsonl", hint="name a run directory, such as runs/star_arith")
    path = run_dir / "run.json"
    stored = json.loads(path.read_bytes()) if path.is_file() else {}
    recipe = stored.get("identity", {}).get("recipe", {})
    trackers = [t for t in recipe.get("trackers", ()) if isinstance(t, dict) and t.get("name") == "wandb"]
    given = {name: value for name in ("project", "entity", "mode") if (value := getattr(args, name)) is not None}
    try:
        settings = Wandb.Settings.model_validate({**(trackers[0] if trackers else {"name": "wandb"}), **given})
    except ValidationError as error:
        lines = "\n  ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"the W&B settings of {run_dir} are wrong:\n  {lines}") from None
    return {"settings": settings.model_dump(mode="json"), "config": scrubber.recipe(recipe)}


def _watch(parent: int, finish_seconds: float) -> Callable[[], bool]:
    """Tells when the run is over: standard input ended, or its process did. From then on time is limited."""
    over = threading.Event()

    def wait_for_end() -> None:
        # Not through sys.stdin, whose lock, held by a thread, aborts an interpreter that ends.
        while os.read(sys.stdin.fileno(), 1):
            pass
        over.set()

    def end_in_time() -> None:
        # Another child of the run's process may hold the pipe open, so its death is looked for as well.
        while not over.wait(1.0):
            if os.getppid() != parent:
                over.set()
        threading.Event().wait(finish_seconds)
        end_tree(os.getpid())
        os._exit(1)

    for target in (wait_for_end, end_in_time):
        threading.Thread(target=target, daemon=True).start()
    return over.is_set


def _summary(run_dir: Path, mark: Mark) -> str:
    done = f"W&B run {mark.run_id}: {mark.num_rows} rows of {run_dir / 'metrics.jsonl'} are exported"
    if mark.mode != "offline":
        return done
    folders = [str(folder) for folder in sorted(run_dir.glob(f"wandb/offline-run-*-{mark.run_id}"))]
    one_run = ["--id", mark.run_id] if len(folders) > 1 else []
    return f"{done}\n  to upload them: {shlex.join(['wandb', 'sync', *one_run, *folders])}"
