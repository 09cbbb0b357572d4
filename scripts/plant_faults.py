"""Break the program in one place at a time and see that the tests of the promise notice.

    python scripts/plant_faults.py               # all, some minutes
    python scripts/plant_faults.py G12 G17       # those of some promises

Works on a copy of the tracked files. First the tests must pass on the unbroken copy. Prints a line of a Markdown table for
each fault; exits 1 when one goes unnoticed. Faults of the ledger that only a loss of power shows are planted by the suite
itself (tests/attack/planted_faults.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """One plausible mistake: ``old`` becomes ``new`` in ``file``; ``tests`` are the arguments of pytest that must fail."""

    promise: str
    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "G1",
        "a finished run is worked on again",
        "running.py",
        "if run_dir.finished is not None and not further:",
        "if False:",
        "tests/test_running.py::test_a_run_ends_with_a_result_and_a_second_one_writes_nothing",
    ),
    Fault(
        "G2",
        "samples depend on the clock",
        "engines/scripted.py",
        "seed = row_seed(request.seed, index)",
        "seed = row_seed(request.seed, index) + time.time_ns() % 7",
        "tests/test_running.py::test_the_same_recipe_gives_the_same_bytes",
    ),
    Fault(
        "G3",
        "rows of the log are not recognised",
        "ledger/wal.py",
        "return 0 <= ordinal < len(self._offsets) and bool(self._offsets[ordinal] >= 0)",
        "return False",
        "tests/attack/test_fault_points.py -k kill",
    ),
    Fault(
        "G6",
        "the lock is always free",
        "ledger/lock.py",
        "    except BlockingIOError:\n        return False\n",
        "    except BlockingIOError:\n        return True\n",
        "tests/attack/test_lock_races.py",
    ),
    Fault(
        "G7",
        "changed fields of a recipe are not seen",
        "recipe.py",
        "    if old == new:\n        return []\n",
        "    return []\n",
        "tests/test_running.py::test_a_changed_recipe_stops_and_names_field_and_step",
    ),
    Fault(
        "G7",
        "changed code of a curation is not run again",
        "verbs/curating.py",
        "    num_again = changed = 0\n",
        "    return\n    num_again = changed = 0\n",
        "tests/test_lab.py::test_changed_code_that_chooses_other_rows_stops_and_equal_code_goes_on",
    ),
    Fault(
        "G7",
        "a changed recipe is applied at the next step",
        "verbs/context.py",
        "if self.recipe_changes and self.run_dir.committed(name) is None:",
        "if False:",
        "tests/test_running.py -k change",
    ),
    Fault(
        "G8",
        "a full disk is passed over",
        "ledger/files.py",
        "    while len(rest) > 0:\n        rest = rest[os.write(descriptor, rest) :]",
        "    while len(rest) > 0:\n        try:\n            rest = rest[os.write(descriptor, rest) :]\n"
        "        except OSError:\n            return",
        "tests/attack/test_system_calls.py -k 'full_disk or file_sizes'",
    ),
    Fault(
        "G9",
        "TERM is forgotten",
        "workers/signals.py",
        "self.exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED",
        "self.exit_code = INTERRUPTED if number == signal.SIGINT else 0",
        "tests/attack/test_stops.py -k TERM",
    ),
    Fault(
        "G9",
        "a second Ctrl-C waits for the boundary, too",
        "workers/signals.py",
        "            raise StopNow\n",
        "            return\n",
        "tests/attack/test_stops.py -k 'INT'",
    ),
    Fault(
        "G9",
        "a run looks for signals at its end only",
        "running.py",
        "        exit_code = options.interrupted()\n",
        '        exit_code = options.interrupted() if (options.directory / "steps/final-trainings=1").exists() else 0\n',
        "tests/attack/test_stops.py -k TERM",
    ),
    Fault(
        "G10",
        "workers do not die with their supervisor",
        "workers/main.py",
        'if not sys.platform.startswith("linux"):',
        "if True:",
        "tests/workers/test_supervisor_death.py",
    ),
    Fault(
        "G10",
        "a worker may be silent for ever",
        "workers/crew.py",
        "        limit = self.limits.stall_seconds\n",
        "        limit = 1e9\n",
        "tests/workers/test_generation_pool.py::test_hanging_worker_leaves_its_stacks_and_its_unit_to_another --timeout 60",
    ),
    Fault(
        "G11",
        "want of memory ends the sampling",
        "engines/_decoding.py",
        "    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (",
        "    return False and (",
        "tests/engines/test_hf.py -k memory",
    ),
    Fault(
        "G11",
        "want of memory ends the training",
        "trainers/objective.py",
        "    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)",
        "    return False and should_reduce_batch_size(error)",
        "tests/trainers/test_sft_guards.py -k memory",
    ),
    Fault(
        "G12",
        "a loss that is not finite is learnt from",
        "trainers/step_trainer.py",
        "if not bool(finite_N.all()):",
        "if False:",
        "tests/trainers/test_sft_guards.py::test_a_poisoned_row_stops_the_run_and_is_named",
    ),
    Fault(
        "G12",
        "a gradient that is not finite is stepped with",
        "trainers/step_trainer.py",
        "if not math.isfinite(norm):",
        "if False:",
        "tests/trainers/test_sft_guards.py::test_a_gradient_that_is_not_finite_is_never_stepped",
    ),
    Fault(
        "G13",
        "a base that solves nothing is trained all the same",
        "preflight.py",
        'if lacking and mode == "refuse":',
        "if False:",
        "tests/test_running.py -k preflight",
    ),
    Fault(
        "G14",
        "what could not be told counts as wrong",
        "grading/symbolic.py",
        "value = None if reason in _UNGRADED else",
        "value =",
        "tests/attack/test_hostile_maths.py::test_every_hostile_text_gets_a_verdict_within_its_caps",
    ),
    Fault(
        "G16",
        "a model that is here is asked of the Hub first",
        "models.py",
        "        return Path(snapshot_download(",
        '        __import__("huggingface_hub").HfApi().model_info(str(hub))\n        return Path(snapshot_download(',
        "tests/attack/test_no_network.py",
    ),
    Fault(
        "G17",
        "a method may lose rows",
        "verbs/curating.py",
        "    if missing or twice or foreign:\n",
        "    if False:\n",
        "tests/test_lab.py::test_curation_that_loses_a_row_is_stopped",
    ),
    Fault(
        "G17",
        "lines of a data file that cannot be read are left out",
        "question_files.py",
        "    return rows, stated_once(faults, len(rows) + len(faults))\n\n\ndef read_json(",
        "    return rows, []\n\n\ndef read_json(",
        "tests/attack/test_bad_data.py",
    ),
    Fault(
        "G18",
        "an attempt remembers its environment",
        "running.py",
        '"versions": versions(),',
        '"versions": {**versions(), **__import__("os").environ},',
        "tests/test_running.py::test_the_same_recipe_gives_the_same_bytes",
    ),
    Fault(
        "G18",
        "text of a model reaches the terminal as it is",
        "cli/main.py",
        "    typer.echo(printable(line))",
        "    typer.echo(line)",
        "tests/attack/test_what_leaves_a_run.py",
    ),
    Fault(
        "G19",
        "code comes with a model of the Hub",
        "models.py",
        '_DOWNLOADED = ("*.safetensors",',
        '_DOWNLOADED = ("*.py", "*.safetensors",',
        "tests/test_models.py::test_a_hub_model_comes_without_code_and_pickles",
    ),
    Fault(
        "G19",
        "pickled weights count as weights",
        "model_folder.py",
        'for path in self.path.glob("*.safetensors")}',
        'for path in [*self.path.glob("*.safetensors"), *self.path.glob("*.bin")]}',
        "tests/attack/test_hostile_models.py tests/test_models.py",
    ),
    Fault(
        "G20",
        "a plan counts one problem too few",
        "verbs/sampling.py",
        "    rows = job.extent.times(job.n)\n",
        "    rows = job.extent.times(job.n - 1)\n",
        "tests/attack/test_numbers_lead_to_rows.py -k 'plan and star'",
    ),
    Fault(
        "G21",
        "every answer counts as right",
        "verbs/grading.py",
        'counts["#correct"] += score.correct',
        'counts["#correct"] += 1',
        "tests/attack/test_numbers_lead_to_rows.py -k 'count and star'",
    ),
    Fault(
        "G21",
        "a token too many is reported",
        "verbs/sampling.py",
        '        "num_completion_tokens": num_tokens,\n',
        '        "num_completion_tokens": num_tokens + 1,\n',
        "tests/attack/test_numbers_lead_to_rows.py -k star",
    ),
    Fault(
        "G22",
        "a new field has no default",
        "records.py",
        "    grader: str  # grader id with version, such as number-1\n",
        "    grader: str\n    certainty: float\n",
        "tests/cli/test_golden_runs.py",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("promises", nargs="*", help="such as G12; all when none is given")
    wanted = parser.parse_args().promises
    chosen = [fault for fault in FAULTS if not wanted or fault.promise in wanted]
    with tempfile.TemporaryDirectory(prefix="reasonrun-planted-") as folder:
        copy = Path(folder) / "copy"
        _copy(copy)
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            if failure := _failure(copy, tests):
                sys.exit(f"without any fault planted, {tests} fails: {failure}")
        print("| promise | planted | noticed by |\n|---|---|---|", flush=True)
        unnoticed = [fault for fault in chosen if not _plant(copy, fault)]
    sys.exit(f"{len(unnoticed)} faults went unnoticed" if unnoticed else 0)


def _copy(target: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name)


def _plant(copy: Path, fault: Fault) -> bool:
    path = copy / "src" / "reasonrun" / fault.file
    sound = path.read_text("utf-8")
    if sound.count(fault.old) != 1:
        sys.exit(f"{fault.file} holds {sound.count(fault.old)} times, not once: {fault.old}")
    path.write_text(sound.replace(fault.old, fault.new), "utf-8")
    try:
        failure = _failure(copy, fault.tests)
    finally:
        path.write_text(sound, "utf-8")
    print(f"| {fault.promise} | {fault.what} | {failure or '**nothing**'} |", flush=True)
    return bool(failure)


def _failure(copy: Path, tests: str) -> str:
    """The first test that fails; empty when all pass."""
    command = f"{sys.executable} -m pytest -x -m '' -p no:cacheprovider {tests}"
    env = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, shell=True, cwd=copy, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) ([^\[\n]+?)(?:\[| - |$)", done.stdout, flags=re.MULTILINE)
    if done.returncode != 1 or not found:
        sys.exit(f"{command}\n{done.stdout}{done.stderr}")
    file, _, test = found[1].removeprefix("tests/").partition("::")
    return f"`{file}`: {test.removeprefix('test_').replace('_', ' ')}"


if __name__ == "__main__":
    main()
