"""Records a toy run with what it claims to be safe, recovers crash states of it, and says which promises were broken."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash_states import CrashState, Moment, crash_states
from recorded_disk import Claim, Operation, ProcessGone, RecordedDisk

from reasonrun.ledger.faults import Faults
from reasonrun.ledger.files import Files, decode_json
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.seals import OK_NAME, read_seal, verify_files
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.ledger.wal import FLUSH_SECONDS, Wal
from toy_run import ROWS_PER_UNIT, toy_run
from toy_server import final_bytes

NUM_UNITS = 8
SECONDS_PER_UNIT = 0.7
"""What the clock of the log sees; with it, logs are flushed in the middle of a step."""

Breakage = Callable[[pytest.MonkeyPatch], None]


@dataclass
class Recording:
    """A run from an empty folder, or from what a crash left, to its end or to an injected fault."""

    operations: list[Operation]
    num_before: int
    earlier: list[Claim]

    def claims(self, state: CrashState) -> list[Claim]:
        """What had been declared safe when the crash came."""
        return self.earlier + [op for op in self.operations[: state.num_operations] if isinstance(op, Claim)]


def record(
    root: Path,
    *,
    first: Callable[[Path], None] = lambda run: None,
    kill_at: int = 0,
    earlier: Sequence[Claim] = (),
    breakage: Breakage = lambda monkeypatch: None,
) -> Recording:
    """Run the toy below ``root`` to its end; with ``kill_at``, it is killed after so many operations and runs again.
    ``first`` is another command, in the record before it.

    The process dies, the machine does not: what the first attempt left in the page cache alone is visible to the second
    and still not on disk.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = RecordedDisk(root, monkeypatch)
        breakage(monkeypatch)
        on_compute = _claiming(disk, monkeypatch)
        first(root / "run")
        if kill_at:
            disk.kill_at = kill_at
            with pytest.raises(ProcessGone):
                toy_run(root / "run", num_units=NUM_UNITS, files=Files(Faults()), on_compute=on_compute)
            disk.kill_at = 0
        toy_run(root / "run", num_units=NUM_UNITS, files=Files(Faults()), on_compute=on_compute)
    return Recording(disk.operations, disk.num_before, list(earlier))


def _claiming(disk: RecordedDisk, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Note every return of a call after which something must survive."""
    clock = [0.0]

    def on_compute(unit: int) -> None:
        clock[0] += SECONDS_PER_UNIT
        disk.claim("clock", clock[0])

    def after(owner: type, name: str, claim: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            result = real(self, *args, **options)
            claim(self, result, *args)
            return result

        monkeypatch.setattr(owner, name, call)

    def reached(run: RunDir, result: Any, *_: Any) -> None:
        if isinstance(result, Committed):  # this attempt builds on it, so it must stay
            disk.claim("step", result.name)

    def adopted(step: OpenStep, target: Path, source: Path, number: int) -> None:
        disk.claim("checkpoint", (number, {p.relative_to(target): p.read_bytes() for p in target.rglob("*.*")}))

    monkeypatch.setattr("reasonrun.ledger.wal.time", SimpleNamespace(monotonic=lambda: clock[0]))
    after(Wal, "flush", lambda wal, _: disk.claim("flushed", frozenset(wal.ordinals().tolist())))
    after(Wal, "append", lambda wal, _, rows: disk.claim("logged", ([ordinal for ordinal, _ in rows], clock[0])))
    after(OpenStep, "commit", lambda step, *_: disk.claim("step", step.name))
    after(OpenStep, "adopt_checkpoint", adopted)
    after(RunDir, "step", reached)
    after(RunDir, "finish", lambda run, *_: disk.claim("finished", True))
    return on_compute


def distinct_states(recording: Recording, seed: int, thorough: Callable[[str], bool]) -> list[CrashState]:
    """One state for each tree that a crash may leave: the latest, by which most had been declared safe."""
    by_key: dict[str, CrashState] = {}
    kills: set[str] = set()
    rng = random.Random(seed)
    for state in crash_states(recording.operations, rng, num_before=recording.num_before, thorough=thorough):
        key = state.key
        if state.is_kill or key not in kills:
            by_key[key] = state
        if state.is_kill:
            kills.add(key)
    return sorted(by_key.values(), key=lambda state: state.num_operations)


def states_after_claims(recording: Recording, kill_at: int) -> list[CrashState]:
    """For a run that was killed and went on: what is left when, after something was declared safe, names are lost that
    the killed attempt had changed without flushing them."""
    states: dict[str, CrashState] = {}
    for length, operation in enumerate(recording.operations, start=1):
        if length > kill_at and isinstance(operation, Claim) and operation.kind in ("step", "checkpoint", "finished"):
            moment = Moment(recording.operations[:length])
            loose = [number for number, _ in moment.loose_names]
            left_over = [number for number in loose if number < kill_at]
            for lost in [loose, left_over, *([number] for number in left_over[-4:])]:
                state = moment.state(frozenset(lost), how=f"killed after {kill_at}, then changes {lost[:8]} are lost")
                states[state.key] = state
    return sorted(states.values(), key=lambda state: state.num_operations)


@dataclass
class Judge:
    """Recovers states in a scratch folder and compares with an undisturbed run.

    Attributes:
        clean: every final file of an undisturbed run, by path.
        scratch: a folder on a fast disk.
        breakage: what is broken in the ledger while it recovers.
    """

    clean: dict[str, bytes]
    scratch: Path
    breakage: Breakage = lambda monkeypatch: None

    def violations(self, recording: Recording, state: CrashState) -> list[str]:
        """The promises that this state breaks, each with what was seen; empty when all hold."""
        root = self.scratch / "state"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        state.write(root)
        _keep_times(root / "run")
        claims = recording.claims(state)
        found = [*self.half_written(root / "run", claims), *self._lost(root / "run", claims)]
        computed: list[int] = []
        try:
            result = self._run(root, computed)
        except Exception as error:  # whatever it is, somebody would have to step in
            return [*found, f"G6: recovery needs a hand: {type(error).__name__}: {error}"]
        found += self._repeated(computed, claims, state.is_kill)
        found += _different(self.clean, final_bytes(root / "run"), "G2", "after recovery")
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        again: list[int] = []
        if self._run(root, again) != result or again:
            found.append(f"G1: the finished run works again, on units {again}")
        if before != {path: path.stat().st_mtime_ns for path in root.rglob("*")}:
            found.append("G1: the finished run writes again")
        return found

    def _run(self, root: Path, computed: list[int]) -> Any:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("os.fsync", lambda descriptor: None)
            self.breakage(monkeypatch)
            return toy_run(root / "run", num_units=NUM_UNITS, files=Files(Faults()), on_compute=computed.append)

    def half_written(self, run: Path, claims: Sequence[Claim]) -> Iterator[str]:
        """Whatever has a final name has its final content."""
        checkpoints = {number: files for kind, what in _pairs(claims, "checkpoint") for number, files in [what]}
        for name, content in final_bytes(run).items():
            path = Path(name)
            if path.suffix == ".tmp" or path.name == "wal.jsonl":
                continue
            if "checkpoints" in path.parts:
                after = path.parts[path.parts.index("checkpoints") + 1 :]
                known = checkpoints.get(int(after[0]), {}).get(Path(*after[1:]), content)
            else:
                known = self.clean.get(name, b"")
            if content != known:
                yield f"G4: {name} is half-written ({len(content)} of {len(known)} bytes)"
        for path in run.glob("attempts/*/attempt.json"):
            try:
                decode_json(path.read_bytes())
            except ValueError:
                yield f"G4: {path.relative_to(run)} is half-written"
        for seal in (run / "steps").rglob(OK_NAME):
            if seal.parent.parent.name != "checkpoints":
                yield from _unsound(seal.parent, "G4")

    def _lost(self, run: Path, claims: Sequence[Claim]) -> Iterator[str]:
        """Whatever was declared safe is there."""
        steps = {what for _, what in _pairs(claims, "step")}
        present = final_bytes(run)
        for step in sorted(steps):
            wanted = {name: data for name, data in self.clean.items() if name.startswith(f"steps/{step}/")}
            got = {name: data for name, data in present.items() if name in wanted}
            yield from _different(wanted, got, "G5", f"in the committed step {step}")
        if _pairs(claims, "finished"):
            yield from _different(
                self.clean, {name: present.get(name, b"") for name in self.clean}, "G5", "in a finished run"
            )
        saved = max((what[0] for _, what in _pairs(claims, "checkpoint")), default=0)
        if saved and not (run / "steps/round-001/train" / OK_NAME).exists():
            checkpoints = [path.parent for path in (run / "steps/round-001/train/checkpoints").glob("*/_OK.json")]
            newest = max(checkpoints, key=lambda path: int(path.name), default=run / "0")
            yield from [f"G5: checkpoint {saved} is lost"] if int(newest.name) < saved else _unsound(newest, "G5")

    def _repeated(self, computed: Sequence[int], claims: Sequence[Claim], is_kill: bool) -> Iterator[str]:
        """What recovery did again that had been safe: the log of calls joined to what was declared."""
        steps = {what for _, what in _pairs(claims, "step")}
        flushed = {ordinal for _, what in _pairs(claims, "flushed") for ordinal in what}
        logged = {ordinal: at for _, (ordinals, at) in _pairs(claims, "logged") for ordinal in ordinals}
        now = max((at for _, at in _pairs(claims, "clock")), default=0.0)
        saved = max((what[0] for _, what in _pairs(claims, "checkpoint")), default=0)
        for unit in computed:
            ordinals = range(unit * ROWS_PER_UNIT, (unit + 1) * ROWS_PER_UNIT)
            step = "round-001/train" if unit < 0 else "round-001/sample"
            if step in steps:
                yield f"G3: unit {unit} of the committed step {step} is done again"
            elif unit < 0 and -unit <= saved:
                yield f"G3: optimizer steps up to the saved checkpoint {saved} are done again"
            elif unit >= 0 and flushed >= set(ordinals):
                yield f"G5: unit {unit} was flushed and is done again"
            elif unit >= 0 and is_kill and logged.keys() >= set(ordinals):
                yield f"G3: unit {unit} was logged and is done again after a mere kill"
            elif unit >= 0 and logged.get(ordinals[0], now) < now - FLUSH_SECONDS - SECONDS_PER_UNIT:
                yield f"G5: unit {unit} was {now - logged[ordinals[0]]:.1f} s old and is lost"
        if computed and len(computed) != len(set(computed)):
            yield f"G3: recovery does units twice: {computed}"


def _keep_times(run: Path) -> None:
    """Give the caches the times that their notes remember: times survive without the bytes."""
    for note in run.glob("derived/*.json"):
        with suppress(ValueError, OSError):
            time = json.loads(note.read_bytes())["mtime_ns"]
            os.utime(note.with_suffix(".arrow"), ns=(time, time))


def _pairs(claims: Sequence[Claim], kind: str) -> list[tuple[str, Any]]:
    return [(claim.kind, claim.what) for claim in claims if claim.kind == kind]


def _unsound(folder: Path, promise: str) -> Iterator[str]:
    try:
        seal = read_seal(folder)
        if seal is not None:
            verify_files(folder, seal, Files(Faults()), deep=True)
    except Exception as error:
        yield f"{promise}: sealed and not whole: {error}"


def _different(wanted: dict[str, bytes], got: dict[str, bytes], promise: str, where: str) -> Iterator[str]:
    names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    if names:
        yield f"{promise}: other bytes {where}: {', '.join(names[:4])}"
