"""G6: eight processes that want one run directory, again and again, and owners that die or whose pid lives on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from promises import Counted
from reasonrun.errors import RunConflict
from reasonrun.ledger.faults import Faults
from reasonrun.ledger.files import Files, encode_json
from reasonrun.ledger.lock import LOCK_NAME, Owner
from reasonrun.ledger.run_dir import RunDir
from reasonrun.process_facts import start_time

pytestmark = pytest.mark.attack

NUM_RACERS, NUM_RACES = 8, 20


class Racers:
    """Processes that open one run at the same moment; the winner holds it until it is killed or let go."""

    def __init__(self, run: Path) -> None:
        self._start, go = os.pipe()
        self._held, self._let_go = os.pipe()
        self._results, write = os.pipe()
        self.pids = [self._fork(run, go, write) for _ in range(NUM_RACERS)]
        os.close(self._start)
        os.close(write)
        time.sleep(0.02)  # let them come to the line
        os.close(go)
        with os.fdopen(self._results) as lines:
            self.lines = [json.loads(lines.readline()) for _ in self.pids]
        self.winners = [pid for pid, message in self.lines if not message]

    def _fork(self, run: Path, go: int, write: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.close(go)
            os.close(self._let_go)
            os.read(self._start, 1)
            self._race(run, write)
        finally:
            os._exit(0)

    def _race(self, run: Path, write: int) -> None:
        def report(message: str) -> None:
            os.write(write, json.dumps([os.getpid(), message]).encode() + b"\n")

        try:
            with RunDir.open(run, identity={}, command=f"racer {os.getpid()}", files=Files(Faults())):
                report("")
                os.read(self._held, 1)
        except RunConflict as conflict:
            report(str(conflict))
        except BaseException as error:
            report(f"not a conflict: {error!r}")

    def end(self, *, kill: bool) -> None:
        """Kill the winner, or let it go in peace; wait for all."""
        if kill:
            for pid in self.winners:
                os.kill(pid, signal.SIGKILL)
        os.close(self._let_go)
        os.close(self._held)
        for pid in self.pids:
            os.waitpid(pid, 0)


@pytest.mark.parametrize("end", ["let go", "killed", "killed, pid reused"])
def test_of_eight_racers_exactly_one_wins_twenty_times(end: str, tmp_path: Path, counted: Counted) -> None:
    """All races are for the same directory: nobody unlocks it by hand between them."""
    run = tmp_path / "run"
    for race in range(NUM_RACES):
        racers = Racers(run)
        racers.end(kill=end != "let go")
        assert len(racers.winners) == 1, f"race {race}: {racers.lines}"
        losers = [message for _, message in racers.lines if message]
        expected = f"in use by process {racers.winners[0]} on"
        assert all(expected in message and "--run NEW" in message for message in losers), f"race {race}: {losers}"
        if "reused" in end:  # the pid of the dead owner belongs to a process that began at another time
            started = start_time(os.getpid())
            assert started is not None
            owner = Owner(os.getpid(), started - 3600, os.uname().nodename, "dead", 0.0)
            assert owner.is_dead
            (run / LOCK_NAME).write_bytes(encode_json(vars(owner)))
    with RunDir.open(run, identity={}, command="after all", files=Files(Faults())) as opened:
        assert opened.attempt is not None and opened.attempt.number == NUM_RACES + 1
    counted("G6", f"races of {NUM_RACERS} ({end})", NUM_RACES)
