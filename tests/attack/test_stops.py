"""G9: TERM and INT in every step of a run end it at the next boundary, and a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from promises import Counted
from reasonrun.engines.scripted import Scripted
from reasonrun.ledger.catalogue import step_states
from reasonrun.ledger.run_dir import RunDir
from toy_server import final_bytes

pytestmark = pytest.mark.attack

TRAIN = ["train", "smoke_star", "task.num_train=12", "task.num_dev=6", "task.num_test=6", "method.rounds=1"]
LAST = "final-trainings=1/test-last"
SMALL = [*TRAIN, "evaluate.num_samples=2", "engine.unit_rows=8"]


Clean = tuple[list[str], dict[str, bytes]]


def train(run: Path, signals: list[signal.Signals], step: str = "", num_completions: int = 0) -> tuple[int, str]:
    """Run or continue in a child that gets ``signals`` in ``step``: when it has begun, or after so many completions.

    Returns:
        Exit code and what was printed. The names of the steps that there were when the signals came are in a file.
    """
    log = run.with_suffix(".log")
    pid = os.fork()
    if pid == 0:
        try:
            _child(run, signals, step, num_completions, log)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text("utf-8")


def _child(run: Path, signals: list[signal.Signals], step: str, num_completions: int, log: Path) -> None:
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr, sys.__stderr__ = (os.fdopen(number, "w", buffering=1) for number in (1, 2, 2))
    os.fsync = lambda descriptor: None  # a signal loses nothing that was written; flushing takes most of the time
    begin, complete, current, num_done = RunDir.step, Scripted._complete, "", 0

    def stop() -> None:
        run.with_suffix(".begun").write_text("\n".join(step_states(run)))
        while signals:  # once: the plan that a finished run is compared with begins the same steps
            os.kill(os.getpid(), signals.pop(0))

    def begin_and_stop(self: RunDir, name: str, fingerprint: Any) -> Any:
        nonlocal current, num_done
        begun = begin(self, name, fingerprint)
        current, num_done = name, 0
        if signals and name == step and not num_completions:
            stop()
        return begun

    def complete_and_stop(self: Scripted, *what: Any) -> Any:
        nonlocal num_done
        num_done += 1
        if signals and current == step and num_done == num_completions:
            stop()
        return complete(self, *what)

    RunDir.step, Scripted._complete = begin_and_stop, complete_and_stop  # type: ignore[method-assign]
    from reasonrun.cli.main import main

    sys.argv = ["reasonrun", *SMALL, "--run", str(run)]
    try:
        main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """The steps of an undisturbed run, and its bytes."""
    run = tmp_path_factory.mktemp("stops") / "run"
    assert train(run, [])[0] == 0
    return list(step_states(run)), final_bytes(run)


@pytest.mark.parametrize(
    ("signals", "code", "stride"),
    [
        ([signal.SIGTERM], 75, 1),
        ([signal.SIGINT], 130, 4),
        ([signal.SIGTERM, signal.SIGTERM], 75, 4),
        ([signal.SIGTERM, signal.SIGINT], 130, 4),
        ([signal.SIGINT, signal.SIGINT], 130, 2),
    ],
    ids=["TERM", "INT", "TERM TERM", "TERM INT", "INT INT"],
)
def test_a_stop_in_any_step_is_resumed_to_the_same_bytes(
    signals: list[signal.Signals],
    code: int,
    stride: int,
    clean: tuple[list[str], dict[str, bytes]],
    tmp_path: Path,
    counted: Counted,
) -> None:
    steps, expected = clean
    assert len(steps) > 20
    at_once = len(signals) == 2 and signals[1] == signal.SIGINT
    chosen = steps[::stride]
    for number, step in enumerate(chosen):
        run = tmp_path / str(number)
        ended, text = train(run, signals, step)
        if step == LAST and not at_once:  # nothing is left to stop at
            assert ended == 0 and final_bytes(run) == expected
            continue
        assert ended == code, f"{step}: exit {ended}\n{text}"
        assert f"the same command continues this run: reasonrun {' '.join(SMALL)} --run {run}" in text, text
        assert ("stopping at once" in text) == at_once, text
        assert "Traceback" not in text, text
        states = step_states(run)
        assert list(states) == run.with_suffix(".begun").read_text().split("\n"), f"{step}: another one was begun"
        assert states[step] == "begun" or not at_once, f"{step} was finished after a second Ctrl-C"
        assert not (run / "_OK.json").exists()
        ended, text = train(run, [])
        assert ended == 0, f"{step}: not resumed, exit {ended}\n{text}"
        assert final_bytes(run) == expected, f"other bytes after a stop in {step}"
    counted("G9", f"stops by {' and '.join(number.name for number in signals)}", len(chosen))


SAMPLING = {"preflight/sample": 16, "round-001/sample": 16, "round-001/evaluate/sampled": 12}
"""Rows of two units, or of all there are."""


@pytest.mark.parametrize("step", SAMPLING)
@pytest.mark.parametrize(
    ("signals", "code"), [([signal.SIGTERM], 75), ([signal.SIGINT] * 2, 130)], ids=["TERM", "INT INT"]
)
def test_a_stop_in_the_middle_of_a_unit_costs_at_most_that_unit(
    signals: list[signal.Signals], code: int, step: str, clean: Clean, tmp_path: Path, counted: Counted
) -> None:
    run = tmp_path / "run"
    ended, text = train(run, signals, step, num_completions=10)  # the second of the second unit of eight
    assert ended == code, text
    with open(run / "steps" / step / "wal.jsonl") as log:
        rows = [line for line in log if not line[9:].startswith("[-1,")]
    assert len(rows) == (SAMPLING[step] if code == 75 else 8)
    assert train(run, [])[0] == 0 and final_bytes(run) == clean[1]
    counted("G9", "stops in the middle of a unit", 1)
