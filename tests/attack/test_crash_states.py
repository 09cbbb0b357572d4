"""G1 to G6: whatever a loss of power may leave on disk, the same command goes on from it to the same bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from crash_states import CrashState
from planted_faults import BEFORE_POWER_LOSS, names_of_the_dead_trusted, torn_tail_left
from recorded_disk import Names
from recovery import Breakage, Judge, Recording, distinct_states, record, states_after_claims

from promises import Counted
from reasonrun.ledger.faults import Faults
from reasonrun.ledger.files import Files
from toy_run import toy_dir

pytestmark = pytest.mark.attack

SEED = 0
NUM_LOSSY = 3000
"""Losses of power that are recovered, drawn from some 4,500; every kill is."""
PROMISES = ("G2", "G3", "G4", "G5", "G6")


def fresh(scratch: Path, name: str) -> Path:
    folder = scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def is_log(name: str) -> bool:
    return name.endswith("wal.jsonl")


def broken(judge: Judge, recording: Recording, states: Iterable[CrashState]) -> list[str]:
    """What the first state that breaks a promise breaks, with what it takes to see it again."""
    for state in states:
        found = judge.violations(recording, state)
        if found:
            return [f"seed {SEED}, after {state.num_operations} operations, {state.how}:", *found]
    return []


def test_every_state_that_a_crash_may_leave_is_recovered(
    undisturbed: Recording, judge: Judge, counted: Counted
) -> None:
    states = distinct_states(undisturbed, SEED, is_log)
    lossy = [state for state in states if not state.is_kill]
    states = [*(state for state in states if state.is_kill), *random.Random(SEED).sample(lossy, NUM_LOSSY)]
    assert not (found := broken(judge, undisturbed, states)), "\n".join(found)
    for promise in PROMISES:
        counted(promise, "crash states", len(states))


def test_what_a_killed_attempt_left_in_memory_is_on_disk_before_the_next_builds_on_it(
    undisturbed: Recording, judge: Judge, scratch: Path, counted: Counted
) -> None:
    num_states = 0
    for kill_at in changes_of_names(undisturbed):
        recording = record(fresh(scratch, "killed"), kill_at=kill_at)
        states = states_after_claims(recording, kill_at)
        assert not (found := broken(judge, recording, states)), "\n".join(found)
        num_states += len(states)
    assert num_states > 300
    for promise in ("G3", "G5", "G6"):
        counted(promise, "losses of power after a kill", num_states)


def changes_of_names(recording: Recording) -> list[int]:
    """Lengths of the record right after a rename, a new name or a removal."""
    operations = recording.operations[:-2]  # the last change is that of the run's own seal
    return [length for length, operation in enumerate(operations, start=1) if isinstance(operation, Names)]


def second_crashes(
    judge: Judge, first: Recording, num_first: int, num_second: int, breakage: Breakage
) -> list[str] | int:
    """Crash, recover, crash again at ``num_second`` points of the recovery. What broke, or how many states held."""
    rng = random.Random(SEED)
    damaged = [state for state in distinct_states(first, SEED, is_log) if not state.is_kill]
    # Half of them with a torn log: recovery cuts it, and what it does there is the most delicate thing it does.
    torn = [state for state in damaged if b"\n" in (log := state.files.get(LOG, b"")) and not log.endswith(b"\n")]
    num_states = 0
    for state in [*rng.sample(torn, num_first // 2), *rng.sample(damaged, num_first - num_first // 2)]:
        root = fresh(judge.scratch, "second")
        state.write(root)
        earlier = [claim for claim in first.claims(state) if claim.kind not in ("logged", "clock")]
        recording = record(root, earlier=earlier, breakage=breakage)
        states = distinct_states(recording, SEED, lambda name: False)
        chosen = rng.sample(states, min(num_second, len(states)))
        if found := broken(judge, recording, chosen):
            return [f"recovering from: {state.num_operations} operations, {state.how}", *found]
        num_states += len(chosen)
    return num_states


LOG = "run/steps/round-001/sample/wal.jsonl"


def test_a_crash_during_recovery_is_recovered_too(undisturbed: Recording, judge: Judge, counted: Counted) -> None:
    held = second_crashes(judge, undisturbed, 12, 50, lambda monkeypatch: None)
    assert isinstance(held, int), "\n".join(held)
    assert held >= 500
    for promise in PROMISES:
        counted(promise, "crash states of a recovery", held)


@pytest.mark.parametrize("command", ["redo", "prune", "amend"])
def test_a_crash_while_steps_are_taken_back_is_recovered(
    command: str, judge: Judge, scratch: Path, counted: Counted
) -> None:
    """The claims of the finished run are void: the command takes it back. What is made again has the same bytes."""
    identity = {"recipe": "toy", "num_units": 8}

    def take_back(run: Path) -> None:
        with toy_dir(run, Files(Faults()), identity, reopen=True) as opened:
            if command == "redo":
                assert "round-001/train" in opened.redo("round-001/sample")
            elif command == "prune":
                opened.redo("round-001/sample")
                opened.prune(["shared", "round-001/sample"])
            else:
                opened.amend(identity)

    root = fresh(scratch, "back")
    record(root)
    recording = record(root, first=take_back)
    states = distinct_states(recording, SEED, lambda name: False)
    chosen = random.Random(SEED).sample(states, min(400, len(states)))
    assert len(chosen) > 150
    assert not (found := broken(judge, recording, chosen)), "\n".join(found)
    for promise in ("G2", "G4", "G6"):
        counted(promise, f"crash states of {command}", len(chosen))


def count_caught(found: list[str], counted: Counted) -> None:
    """A mistake counts for every promise that the state which shows it breaks."""
    for promise in {line.split(":")[0] for line in found if line.startswith("G")}:
        counted(promise, "planted mistakes caught", 1)


@pytest.mark.parametrize("mistake", BEFORE_POWER_LOSS, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_caught(mistake: Breakage, judge: Judge, scratch: Path, counted: Counted) -> None:
    root = fresh(scratch, "broken")
    recording = record(root, breakage=mistake)
    states = distinct_states(recording, SEED, is_log)
    random.Random(SEED).shuffle(states)
    found = broken(Judge(judge.clean, scratch, mistake), recording, states)
    assert found, f"{mistake.__name__} broke nothing in {len(states)} states"
    print(f"{mistake.__name__}: {found[-1]}")
    count_caught(found, counted)


def test_a_torn_tail_that_stays_is_caught_by_a_second_crash(
    undisturbed: Recording, judge: Judge, scratch: Path, counted: Counted
) -> None:
    mistake = torn_tail_left
    found = second_crashes(Judge(judge.clean, scratch, mistake), undisturbed, 12, 60, mistake)
    assert not isinstance(found, int), f"nothing broke in {found} states"
    print(found)
    count_caught(found, counted)


def test_an_attempt_that_trusts_the_names_of_a_dead_one_is_caught(
    undisturbed: Recording, judge: Judge, scratch: Path, counted: Counted
) -> None:
    found: list[str] = []
    for kill_at in changes_of_names(undisturbed):
        recording = record(fresh(scratch, "killed"), kill_at=kill_at, breakage=names_of_the_dead_trusted)
        found = broken(judge, recording, states_after_claims(recording, kill_at))
        if found:
            break
    assert found
    print(found)
    count_caught(found, counted)
