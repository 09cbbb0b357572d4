"""Units reach workers and come back once each, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from process_checks import group_runs
from worker_stubs import expected_completions, make_checkpoint, make_request

from reasonrun.errors import Finding, RecipeError, RunFailed, Stopped
from reasonrun.generation import Completion, Request
from reasonrun.probing import Proof
from reasonrun.workers import process, protocol
from reasonrun.workers.pool import GenerationPool, Limits
from reasonrun.workers.protocol import WorkerCrash

MakePool = Callable[..., GenerationPool]


def make_units(num_units: int) -> list[tuple[int, list[Request]]]:
    """Unit ``i`` holds requests 10 i and 10 i + 1."""
    return [(number, [make_request(10 * number), make_request(10 * number + 1)]) for number in range(num_units)]


def expect(units: list[tuple[int, list[Request]]], weights: str = "w1") -> dict[int, object]:
    return {number: expected_completions(requests, weights) for number, requests in units}


def collect(answers: Iterator[tuple[int, object]]) -> dict[int, object]:
    pairs = list(answers)
    assert len(pairs) == len({number for number, _ in pairs})
    return dict(pairs)


def test_every_unit_once_over_two_workers_and_two_models(make_pool: MakePool, started: list[int]) -> None:
    pool = make_pool(num_workers=2, noise=True)
    units = make_units(6)
    pool.load(make_checkpoint())
    assert collect(pool.generate(units)) == expect(units)
    assert (pool.num_starts, pool.num_loads) == (2, 2)
    pool.load(make_checkpoint())
    assert pool.num_loads == 2  # the weights are in place already
    pool.load(make_checkpoint("w2"))
    assert collect(pool.generate(units)) == expect(units, "w2")
    assert (pool.num_starts, pool.num_loads) == (2, 4)
    assert len(set(started)) == 2
    assert 0 < pool.start_seconds < 60


def test_closed_pool_starts_again_with_the_model_it_had(make_pool: MakePool, tmp_path: Path) -> None:
    log_path = tmp_path / "calls"
    pool = make_pool(log_path=str(log_path))
    pool.load(make_checkpoint())
    pool.close()
    assert log_path.read_text().endswith("closed\n")  # an orderly end, not a kill
    assert collect(pool.generate(make_units(1))) == expect(make_units(1))
    assert pool.num_starts == 2


@pytest.mark.promise("G3", "pools under ten kills")
def test_no_unit_is_lost_or_asked_needlessly_under_ten_kills(make_pool: MakePool, tmp_path: Path) -> None:
    log_path = tmp_path / "calls"
    log_path.touch()
    pool = make_pool(num_workers=2, seconds=0.03, log_path=str(log_path))
    units = make_units(40)
    pool.load(make_checkpoint())
    answers: dict[int, object] = {}
    killed: list[str] = []
    for number, completions in pool.generate(units):
        assert number not in answers
        answers[number] = completions
        if len(killed) < 10 and len(answers) % 3 == 0:
            pid, key = _stop_a_busy_worker(log_path, {f"request-{10 * n}" for n in answers} | set(killed))
            # In turn the working process and the one that guards it.
            os.kill(pid if len(killed) % 2 else psutil.Process(pid).ppid(), signal.SIGKILL)
            killed.append(key)
    assert answers == expect(units)
    assert len(killed) == 10
    calls = Counter(line.split()[1] for line in log_path.read_text().splitlines())
    asked_again = calls - Counter(requests[0].key for _, requests in units)
    assert asked_again <= Counter(killed)  # a kill costs the unit that it hit and no other
    assert asked_again.total() >= 7  # the others were hit in the moment after their answer
    assert pool.num_starts == 2 + 10


def _stop_a_busy_worker(log_path: Path, spared: set[str]) -> tuple[int, str]:
    """Suspend a worker that has begun a unit whose key is not spared; its pid and that key."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, key = _last_call(log_path, None)
        if key in spared:
            time.sleep(0.005)
            continue
        os.kill(pid, signal.SIGSTOP)
        # It may have gone on between the reading and the signal.
        if _last_call(log_path, pid)[1] == key:
            return pid, key
        os.kill(pid, signal.SIGCONT)
    raise AssertionError("no worker began a unit")


def _last_call(log_path: Path, pid: int | None) -> tuple[int, str]:
    calls = [line.split() for line in log_path.read_text().splitlines()]
    return next((int(by), key) for by, key in reversed(calls) if pid in (None, int(by)))


@pytest.mark.parametrize("trouble", ["hang", "hang with the lock"])
@pytest.mark.promise("G10", "hanging workers")
def test_hanging_worker_leaves_its_stacks_and_its_unit_to_another(
    make_pool: MakePool, tmp_path: Path, trouble: str
) -> None:
    marker_path = tmp_path / "hung-once"
    pool = make_pool(
        trouble=trouble,
        trouble_keys=("request-10",),
        marker_path=str(marker_path),
        limits=Limits(stall_seconds=1.2),
    )
    pool.load(make_checkpoint())
    assert collect(pool.generate(make_units(3))) == expect(make_units(3))
    assert marker_path.exists()
    assert pool.num_starts == 2
    where = {"hang": "hang_in_python", "hang with the lock": "hang_with_the_lock"}[trouble]
    assert f"in {where}" in (tmp_path / "attempt/logs/generation-0.log").read_text()


@pytest.mark.promise("G10", "slow workers")
def test_slow_worker_that_makes_tokens_is_left_alone(make_pool: MakePool) -> None:
    # Four completions of 0.7 s take longer than the limit, none of them does.
    pool = make_pool(seconds=0.7, limits=Limits(stall_seconds=2.2))
    pool.load(make_checkpoint())
    assert collect(pool.generate(make_units(1))) == expect(make_units(1))
    assert pool.num_starts == 1


def test_time_in_which_the_supervisor_did_not_look_is_not_held_against_a_worker(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(seconds=0.2, limits=Limits(stall_seconds=100))
    pool.load(make_checkpoint())
    answers = {}
    offset_seconds = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + offset_seconds, sleep=time.sleep)
    monkeypatch.setattr(process, "time", clock)
    for number, completions in pool.generate(make_units(3)):
        answers[number] = completions
        offset_seconds += 1000  # as after a suspended laptop, or a caller that was busy
    assert answers == expect(make_units(3))
    assert pool.num_starts == 1


@pytest.mark.parametrize(
    ("trouble", "status", "tail"),
    [("exit", "ended with status 9", "last words of the engine"), ("exception", "status 70", "the stub is broken")],
)
@pytest.mark.promise("G10", "crashing workers")
def test_request_that_ends_its_workers_is_named_after_everything_else_is_answered(
    make_pool: MakePool, tmp_path: Path, trouble: str, status: str, tail: str
) -> None:
    log_path = tmp_path / "calls"
    pool = make_pool(num_workers=2, trouble=trouble, trouble_keys=("request-11",), log_path=str(log_path))
    pool.load(make_checkpoint())
    answered: list[Completion] = []
    with pytest.raises(RunFailed) as caught:
        for _, completions in pool.generate(make_units(5)):
            answered += completions
    for part in ["request-11 of problem problem-11 (of unit 1; ended 4 workers)", status, tail, "generation-"]:
        assert part in str(caught.value)
    assert "request-10 of" not in str(caught.value)
    requests = [request for _, requests in make_units(5) for request in requests if request.key != "request-11"]
    assert sorted(answered, key=_place) == sorted(expected_completions(requests), key=_place)
    calls = [line.split()[1] for line in log_path.read_text().splitlines()]
    assert calls.count("request-10") == 2 + 1  # with the bad one twice, then alone
    assert calls.count("request-11") == 2
    assert calls.count("request-20") == 1
    assert collect(pool.generate(make_units(1))) == expect(make_units(1))  # the pool works on


def _place(completion: Completion) -> tuple[str, int]:
    return completion.request, completion.index


@pytest.mark.promise("G10", "hanging workers")
def test_engine_that_never_answers_is_given_up_soon(make_pool: MakePool, tmp_path: Path) -> None:
    keys = tuple(request.key for _, requests in make_units(20) for request in requests)
    pool = make_pool(trouble="exit", trouble_keys=keys)
    pool.load(make_checkpoint())
    with pytest.raises(RunFailed, match=r"ended 6 times without answering[\s\S]*last words of the engine"):
        list(pool.generate(make_units(20)))
    assert pool.num_starts == 6


def test_sigkill_is_explained(make_pool: MakePool) -> None:
    pool = make_pool(trouble="sigkill", trouble_keys=("request-0",))
    pool.load(make_checkpoint())
    with pytest.raises(RunFailed, match=r"killed by signal 9 \(SIGKILL\)[\s\S]*memory ran out[\s\S]*batch size"):
        list(pool.generate(make_units(1)))


def test_error_for_the_user_keeps_class_evidence_and_exit_code(make_pool: MakePool) -> None:
    pool = make_pool(trouble="finding", trouble_keys=("request-0",))
    pool.load(make_checkpoint())
    with pytest.raises(Finding) as caught:
        list(pool.generate(make_units(2)))
    assert caught.value.evidence == {"wrong": 3, "share": 0.5}
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("nothing to learn", "more samples", 5)


def test_error_of_a_plug_in_arrives_as_the_class_it_refines(make_pool: MakePool) -> None:
    pool = make_pool(trouble="own error", trouble_keys=("request-0",))
    pool.load(make_checkpoint())
    with pytest.raises(RecipeError) as caught:
        list(pool.generate(make_units(1)))
    assert type(caught.value) is RecipeError
    assert (caught.value.hint, caught.value.exit_code) == ("look there", 2)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("construction", "ended with status 70[\\s\\S]*the stub cannot be built"),
        ("load", "ended with status 3"),
        ("slow construction", r"did not start within 0\.6 s"),
    ],
)
@pytest.mark.promise("G10", "hanging workers")
def test_worker_that_never_gets_ready_is_given_up(make_pool: MakePool, trouble: str, reason: str) -> None:
    limits = Limits(start_seconds=0.6 if trouble == "slow construction" else 60)
    pool = make_pool(trouble=trouble, limits=limits)
    with pytest.raises(WorkerCrash, match=reason):
        pool.load(make_checkpoint())
    assert pool.num_starts == 3


def test_missing_completion_is_noticed(make_pool: MakePool) -> None:
    pool = make_pool(drop_last=True)
    pool.load(make_checkpoint())
    with pytest.raises(RunFailed, match=r"missing \[\('request-1', 1\)\]"):
        list(pool.generate(make_units(1)))


def test_logprobs_keep_their_order_over_workers(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2)
    pool.load(make_checkpoint())
    sequences = [((number, 1), tuple(range(number % 4))) for number in range(150)]
    expected = [[-(number + 1.0 + token_id) for token_id in range(number % 4)] for number in range(150)]
    assert pool.logprobs(sequences) == expected
    assert pool.logprobs([]) == []


@pytest.mark.promise("G9", "stops of busy workers")
@pytest.mark.promise("G10", "stops of busy workers")
def test_stop_ends_busy_workers_at_once(make_pool: MakePool, started: list[int]) -> None:
    asked_to_stop: list[int] = []
    pool = make_pool(num_workers=2, seconds=30, interrupted=lambda: asked_to_stop[-1] if asked_to_stop else 0)
    pool.load(make_checkpoint())

    def units() -> Iterator[tuple[int, list[Request]]]:
        yield from make_units(1)
        asked_to_stop.append(130)
        yield from make_units(2)[1:]

    answers = pool.generate(units())
    began = time.monotonic()
    with pytest.raises(Stopped) as caught:
        next(answers)
    assert time.monotonic() - began < 1.5
    assert caught.value.exit_code == 130
    assert not any(group_runs(pgid) for pgid in started)


def test_plain_true_stops_with_the_code_of_term(make_pool: MakePool) -> None:
    pool = make_pool(interrupted=lambda: True)
    with pytest.raises(Stopped) as caught:
        pool.load(make_checkpoint())
    assert caught.value.exit_code == 75


def test_caller_that_leaves_early_can_come_back(make_pool: MakePool, started: list[int]) -> None:
    pool = make_pool(num_workers=2, seconds=0.02)
    pool.load(make_checkpoint())
    answers = pool.generate(make_units(6))
    next(answers)
    with pytest.raises(RuntimeError, match="one generate at a time"):
        next(pool.generate(make_units(1)))
    answers.close()  # type: ignore[attr-defined]
    assert not any(group_runs(pgid) for pgid in started)  # both had begun a unit
    assert collect(pool.generate(make_units(2))) == expect(make_units(2))


def test_worker_that_dies_while_idle_costs_no_unit_its_good_name(
    make_pool: MakePool, started: list[int], tmp_path: Path
) -> None:
    pool = make_pool(trouble="exit", trouble_keys=("request-0",), marker_path=str(tmp_path / "crashed-once"))
    pool.load(make_checkpoint())
    os.kill(started[0], signal.SIGKILL)
    while psutil.Process(started[0]).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    # The unit ends one worker itself; were the first one counted too, it would be set aside.
    assert collect(pool.generate(make_units(1))) == expect(make_units(1))
    assert pool.num_starts == 3


def test_every_load_is_proved(make_pool: MakePool, started: list[int]) -> None:
    """The stub's log-probability of token 4 after 3 is -7, and one less for each letter more in the weights' name."""
    pool = make_pool(num_workers=2)
    pool.load(make_checkpoint(), (3, 4))
    assert pool.prove(Proof(policy="round-001/train", logps=(-7.0,))) == 0
    os.killpg(started[0], signal.SIGKILL)
    assert collect(pool.generate(make_units(3))) == expect(
        make_units(3)
    )  # the worker that was restarted is proved, too
    with pytest.raises(RunFailed, match=r"generation-[01] does not answer with the weights of round-001/train"):
        pool.prove(Proof(policy="round-001/train", logps=(-9.0,)))
    assert not any(group_runs(pgid) for pgid in started)


def test_a_worker_that_loads_other_weights_after_a_restart_is_found(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool()
    pool.load(make_checkpoint(), (3, 4))
    pool.prove(Proof(policy="p", logps=(-7.0,)))
    send = process.WorkerProcess.send

    def mislead(worker: process.WorkerProcess, message: protocol.ToWorker) -> None:
        other = {"checkpoint": make_checkpoint("other")} if isinstance(message, protocol.Load) else {}
        send(worker, message.model_copy(update=other))

    monkeypatch.setattr(process.WorkerProcess, "send", mislead)
    pool._crew.end_all()
    with pytest.raises(RunFailed, match="does not answer with the weights of p"):
        collect(pool.generate(make_units(1)))


def test_workers_sleep_and_are_woken_by_a_load(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2)
    pool.load(make_checkpoint())
    pool.sleep()
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        collect(pool.generate(make_units(1)))
    pool.load(make_checkpoint())
    assert collect(pool.generate(make_units(2))) == expect(make_units(2))
    assert (pool.num_starts, pool.num_loads) == (2, 4)
