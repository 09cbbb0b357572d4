"""The symbolic grader's processes: deadlines, memory, crashes, order, and their end with the parent."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

import reasonrun
from reasonrun.errors import EnvironmentProblem
from reasonrun.grading.limits import refusal
from reasonrun.grading.number import NumberGrader
from reasonrun.grading.pool import SymbolicPool
from reasonrun.grading.rollouts import grade_rollouts
from reasonrun.grading.symbolic import SymbolicGrader
from reasonrun.records import Message, Problem

SLOW_SUM = r"\sum_{n=1}^{10000000} \frac{1}{n}"


def problem(reference: str) -> Problem:
    return Problem(
        id="p", task="t", split="dev", messages=(Message(role="user", content="How many?"),), reference=reference
    )


@pytest.fixture(scope="module")
def pool() -> Iterator[SymbolicPool]:
    """One worker, shared by the tests, with a short deadline."""
    with closing(SymbolicPool(num_workers=1, cpu_seconds=0.5, memory_mib=1024)) as one:
        yield one


def worker_pids(pool: SymbolicPool) -> list[int]:
    return [worker.process.pid for worker in pool._processes.workers]


def test_deadline_ends_the_pair_and_the_next_one_is_answered(pool: SymbolicPool) -> None:
    slow, quick = pool.submit("3", SLOW_SUM), pool.submit("x+1", "1+x")
    assert pool.wait(slow) == "deadline"
    assert pool.wait(quick) == "correct"


def test_gold_comes_first(pool: SymbolicPool) -> None:
    # math-verify takes a set as the answer where the gold is an inequality, but not the other way round
    assert pool.wait(pool.submit("x<5", r"(-\infty,5)")) == "correct"
    assert pool.wait(pool.submit(r"(-\infty,5)", "x<5")) == "wrong"
    assert pool.wait(pool.submit("x+1", "")) == "unparseable"
    assert pool.wait(pool.submit("", "x+1")) == "unreadable_reference"


def test_an_equal_question_is_asked_once(pool: SymbolicPool) -> None:
    first = pool.submit("x+2", "2+x")
    assert pool.submit("x+2", "2+x") is first
    assert pool.wait(first) == "correct"
    assert pool.submit("x+2", "2+x") is first
    assert pool.submit("2+x", "x+2") is not first


def test_a_killed_worker_costs_nothing_once_and_is_a_crash_when_it_repeats(pool: SymbolicPool) -> None:
    pool.wait(pool.submit("y+1", "1+y"))
    for num_kills, reason in ((1, "deadline"), (2, "crash")):
        ticket = pool.submit("3", SLOW_SUM + "+" * num_kills + "0")
        for kill in range(num_kills):
            while not (ticket.num_attempts == kill and any(w.ticket is ticket for w in pool._processes.workers)):
                pool.pump(0.05)
            os.kill(worker_pids(pool)[0], signal.SIGKILL)
        assert pool.wait(ticket) == reason


def test_a_crash_is_remembered_when_it_happens_again(pool: SymbolicPool) -> None:
    for num_asked in (1, 2):
        ticket = pool.submit("3", SLOW_SUM + "+1+1")
        for attempt in range(2):
            while not (ticket.num_attempts == attempt and any(w.ticket is ticket for w in pool._processes.workers)):
                pool.pump(0.05)
            os.kill(worker_pids(pool)[0], signal.SIGKILL)
        assert pool.wait(ticket) == "crash"
        assert (pool.submit("3", SLOW_SUM + "+1+1") is ticket) == (num_asked == 2)


@pytest.mark.promise("G14", "busy machines")
def test_a_slow_machine_is_no_stall_and_a_stopped_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reasonrun.grading.pool._STALL_FACTOR", 0)
    monkeypatch.setattr("reasonrun.grading.pool._STALL_SECONDS", 0.3)
    with closing(SymbolicPool(num_workers=1, cpu_seconds=1.0, memory_mib=1024)) as pool:
        assert pool.wait(pool.submit("3", SLOW_SUM)) == "deadline"  # and takes longer than 0.3 s
        ticket = pool.submit("x+1", "1+x")
        while not any(worker.ready for worker in pool._processes.workers):
            pool.pump(0.05)
        (pid,) = worker_pids(pool)
        os.kill(pid, signal.SIGSTOP)
        again = pool.submit("y+1", "1+y") if ticket.reason else ticket
        assert pool.wait(again) == "correct"
        assert worker_pids(pool) != [pid]


@pytest.mark.promise("G14", "memory caps")
def test_memory_is_capped_and_said_to_be_the_reason() -> None:
    with closing(SymbolicPool(num_workers=1, cpu_seconds=20.0, memory_mib=128)) as small:
        assert small.wait(small.submit("3", r"2^{900000000}")) == "memory"
        assert small.wait(small.submit("x", "x")) == "correct"


def test_no_worker_that_starts_is_an_environment_problem() -> None:
    with (
        closing(SymbolicPool(num_workers=1, cpu_seconds=1.0, memory_mib=24)) as hopeless,
        pytest.raises(EnvironmentProblem, match="no grading process starts"),
    ):
        hopeless.wait(hopeless.submit("x", "x+1"))


def test_order_is_kept_and_numbers_never_reach_the_pool() -> None:
    numbers = [(problem("72"), f"#### {n}", False) for n in range(60, 80)]
    with closing(SymbolicGrader()) as grader:
        scores = list(grader.grade_many(numbers))
        assert [score.correct for score in scores] == [n == 72 for n in range(60, 80)]
        assert grader._pool is None
    spec = SymbolicGrader.Settings(num_workers=1, cpu_seconds=0.5)
    mixed = [(problem("3"), rf"\boxed{{{SLOW_SUM}}}", False), *numbers, (problem("x+1"), r"\boxed{1+x}", False)]
    reasons = [score.reason for score in grade_rollouts(spec, mixed)]
    assert reasons == ["deadline", *["wrong"] * 12, "correct", *["wrong"] * 7, "correct"]


def test_grade_rollouts_takes_number_settings() -> None:
    items = [(problem("72"), "Answer: 72", False), (problem("72"), "Answer: 72", True)]
    scores = list(grade_rollouts(NumberGrader.Settings(markers=("Answer:",)), items))
    assert [(score.grader, score.reason) for score in scores] == [("number-1", "correct"), ("number-1", "truncated")]


def test_grader_crosses_processes_without_its_pool() -> None:
    grader = SymbolicGrader(SymbolicGrader.Settings(cpu_seconds=3.0))
    grader._started_pool()
    copy = pickle.loads(pickle.dumps(grader))
    assert copy.settings == grader.settings
    assert copy._pool is None


def test_workers_die_with_their_parent() -> None:
    program = (
        "import sys, time\n"
        "from reasonrun.grading.pool import SymbolicPool\n"
        "pool = SymbolicPool(num_workers=1, cpu_seconds=60.0, memory_mib=1024)\n"
        f"ticket = pool.submit('3', r'{SLOW_SUM}')\n"
        "while not any(worker.ticket for worker in pool._processes.workers):\n"
        "    pool.pump(0.1)\n"
        "print(pool._processes.workers[0].process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 5.0
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline and not _is_zombie(pid):
            os.kill(pid, 0)
            time.sleep(0.02)
    assert time.monotonic() < deadline


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(" * 3_000 + "1" + ")" * 3_000, "unparseable"),
        ("(" * 400 + "1" + ")" * 400, "unparseable"),
        ("7" * 200_000, "unparseable"),
        ("(10^9)!", "too_large"),
        ("100000!", "too_large"),
        ("9^9^9^9", "too_large"),
        ("10^{10^9}", "too_large"),
        ("2^{2^{3}}", None),
        ("10^{9999}", None),
        ("1^{10^9}", None),
        (r"\frac{20!}{10^{6}}", None),
        (r"e^{x^{2}}", None),
        (r"10^{9}\!x", None),
        ("1000!", None),
    ],
)
def test_filter_refuses_what_is_hopeless_and_nothing_else(text: str, reason: str | None) -> None:
    assert refusal(text) == reason
