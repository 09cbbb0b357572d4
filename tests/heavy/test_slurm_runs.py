"""Runs as jobs of a real Slurm: submitted, stopped, preempted, requeued, continued; workers as steps on another node."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from slurm_cluster import SlurmCluster, missing_programs

import reasonrun
from reasonrun.launchers.slurm import Slurm
from reasonrun.workers.pool import GenerationPool

sys.path.append(str(Path(__file__).parents[1] / "workers"))
import worker_stubs
from worker_stubs import expected_completions, make_checkpoint, make_request

pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(missing_programs()), reason=f"missing: {', '.join(missing_programs())}; see `make slurm`"),
]

SMALL = ["task.num_train=12", "task.num_dev=6", "task.num_test=6", "method.rounds=2", "evaluate.num_samples=2"]
SLOW = ["engine.seconds_per_unit=0.3", "engine.unit_rows=8"]  # 35 units
ALONE = "launcher.extra={exclusive: true, nodelist: n1}"
Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as running:
        yield running


@pytest.fixture(scope="module")
def command(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``command("train", …, env={…})`` in one folder."""
    folder = tmp_path_factory.mktemp("work")

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        import_path = {"PYTHONPATH": str(Path(reasonrun.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-P", "-m", "reasonrun.cli.main", *arguments],
            cwd=folder,
            env={**cluster.env, **import_path, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    run.folder = folder  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def undisturbed(command: Train) -> Path:
    """The same run without Slurm."""
    done = command("train", "smoke_star", *SMALL, "engine.unit_rows=8", "--run", "undisturbed")
    assert done.returncode == 0, done.stderr
    return command.folder / "undisturbed"  # type: ignore[attr-defined, no-any-return]


def submit(command: Train, name: str, *overrides: str) -> tuple[Path, str]:
    """The run directory and the job's number."""
    arguments = ["train", "smoke_star", *SMALL, *overrides, "launcher=slurm", "--run", name, "--json"]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    run: Path = command.folder / name  # type: ignore[attr-defined]
    assert Path(document["script"]) == run / "jobs" / "submit.sh"
    return run, document["job_id"]


def wait_for_text(log: Path, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count(text) < times:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.1)


def content(run: Path) -> dict[str, str]:
    """SHA-256 of all that the run is, besides its launcher: sealed rows, models, metrics, the result."""
    free = {"attempts", "derived", "quarantine", "lock", "jobs", "run.json"}
    paths = [p for p in sorted(run.rglob("*")) if p.is_file() and p.relative_to(run).parts[0] not in free]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_a_job_makes_the_run_that_the_same_command_makes_here(
    cluster: SlurmCluster, command: Train, undisturbed: Path
) -> None:
    name = "a folder (of mine)"
    run, job_id = submit(command, name, *SLOW, "launcher.setup=[echo prepared]", "launcher.memory_gib=1")
    again = command("train", "smoke_star", *SMALL, *SLOW, "launcher=slurm", "--run", name)
    assert again.returncode == 4 and f"Slurm job {job_id} is" in again.stderr and f"scancel {job_id}" in again.stderr
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    log = (run / "jobs" / f"{job_id}.log").read_text()
    assert log.startswith("prepared\n") and "model: " in log
    assert content(run) == content(undisturbed)
    over = command("train", "smoke_star", *SMALL, *SLOW, "launcher=slurm", "--run", name)
    assert over.returncode == 0 and "is finished; nothing to do" in over.stdout


def test_before_the_time_limit_the_run_stops_and_the_job_goes_on_later(
    cluster: SlurmCluster, command: Train, undisturbed: Path
) -> None:
    run, job_id = submit(command, "limited", *SLOW, "launcher.time_minutes=1", "launcher.signal_seconds=50")
    log = run / "jobs" / f"{job_id}.log"
    wait_for_text(log, "reasonrun: Slurm starts this job again")
    cluster.ask("scontrol", "update", f"JobId={job_id}", "TimeLimit=30")
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED", seconds=90) == "COMPLETED"
    assert cluster.fact(job_id, "Restarts") == "1"
    assert content(run) == content(undisturbed)


def test_a_preempted_run_goes_on_when_there_is_room_again(
    cluster: SlurmCluster, command: Train, undisturbed: Path
) -> None:
    run, job_id = submit(command, "preempted", *SLOW, ALONE)
    log = run / "jobs" / f"{job_id}.log"
    wait_for_text(log, "round-001/evaluate")
    urgent = cluster.ask(
        "sbatch", "--parsable", "-p", "urgent", "-w", "n1", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    )
    wait_for_text(log, "DUE TO PREEMPTION")
    cluster.wait_for(urgent, "COMPLETED")
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED", seconds=90) == "COMPLETED"
    assert cluster.fact(job_id, "Restarts") == "1"
    assert "stopping at the next boundary" in log.read_text() and "scontrol" not in log.read_text()
    assert content(run) == content(undisturbed)


def test_a_cancelled_job_stays_cancelled_and_a_new_one_goes_on(
    cluster: SlurmCluster, command: Train, undisturbed: Path
) -> None:
    run, job_id = submit(command, "cancelled", *SLOW)
    log = run / "jobs" / f"{job_id}.log"
    wait_for_text(log, "preflight/sample")
    cluster.ask("scancel", job_id)
    assert cluster.wait_for(job_id, "CANCELLED", "PENDING", "COMPLETED") == "CANCELLED"
    assert "stopping at the next boundary" in log.read_text()
    run, job_id = submit(command, "cancelled", "engine.unit_rows=8", "launcher.max_requeues=0")
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert content(run) == content(undisturbed)


def test_requeues_have_an_end(cluster: SlurmCluster, command: Train) -> None:
    run, job_id = submit(command, "bounded", *SLOW, "launcher.max_requeues=0")
    wait_for_text(run / "jobs" / f"{job_id}.log", "preflight/sample")
    cluster.ask("scancel", "--batch", "--signal=TERM", job_id)
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED", "PENDING") == "FAILED"
    assert cluster.fact(job_id, "ExitCode") == "75:0"
    assert "launcher.max_requeues=0" in (run / "jobs" / f"{job_id}.log").read_text()


def test_what_slurm_refuses_is_said_with_what_it_allows(cluster: SlurmCluster, command: Train, tmp_path: Path) -> None:
    arguments = ["train", "smoke_star", *SMALL, "launcher=slurm", "--run", "refused"]
    done = command(*arguments, "launcher.partition=gpus")
    assert done.returncode == 3
    assert "Slurm has no partition 'gpus'" in done.stderr and "one of: main, urgent" in done.stderr
    done = command(*arguments, "launcher.memory_gib=64")
    assert done.returncode == 3 and "memory_gib" in done.stderr, done.stderr
    conf = Path(cluster.env["SLURM_CONF"]).read_text()
    away = tmp_path / "slurm.conf"
    away.write_text(
        "\n".join(line for line in conf.splitlines() if "SlurmctldPort" not in line)
        + "\nSlurmctldPort=1\nMessageTimeout=2\n"
    )
    done = command(*arguments, env={"SLURM_CONF": str(away)})
    assert done.returncode == 3 and "Slurm does not answer" in done.stderr and "launcher=local" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_on_two_nodes_answer_what_one_worker_here_answers(cluster: SlurmCluster, command: Train) -> None:
    arguments = ["eval", "arith", "--num-problems", "6", "engine.unit_rows=3"]
    here = command(*arguments, "--run", "here")
    assert here.returncode == 0, here.stderr
    nodes = ["launcher=slurm", "launcher.num_nodes=2", "launcher.num_workers=2"]
    done = command(*arguments, *nodes, "--run", "nodes", "--json")
    assert done.returncode == 0, done.stderr
    job_id = json.loads(done.stdout)["job_id"]
    there: Path = command.folder / "nodes"  # type: ignore[attr-defined]
    assert cluster.wait_for(job_id, "COMPLETED", "FAILED", seconds=120) == "COMPLETED", _log(there, job_id)
    assert content(there) == content(command.folder / "here")  # type: ignore[attr-defined]


def _log(run: Path, job_id: str) -> str:
    return (run / "jobs" / f"{job_id}.log").read_text()


@pytest.fixture
def in_job(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This process as if it were the supervisor in a job of two nodes."""
    job_id = cluster.ask("sbatch", "--parsable", "-N2", "-o", "/dev/null", "--wrap", "sleep 200")
    cluster.wait_for(job_id, "RUNNING")
    own = {"REASONRUN_SLURM_JOB": job_id, "SLURM_JOB_ID": job_id, "SLURM_JOB_NUM_NODES": "2"}
    place = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}
    for name, value in {**own, **place, "SLURM_CONF": cluster.env["SLURM_CONF"]}.items():
        monkeypatch.setenv(name, value)
    yield job_id
    cluster.ask("scancel", job_id)


def test_a_worker_whose_srun_is_killed_ends_and_is_replaced(in_job: str, cluster: SlurmCluster, tmp_path: Path) -> None:
    settings = Slurm.Settings(num_nodes=2, num_workers=2, devices=(5,))
    placement = Slurm(settings).placement()
    assert placement.through[0] == () and "n2" in placement.through[1]
    started: list[int] = []
    with GenerationPool(
        "worker_stubs.Stub",
        worker_stubs.Stub.Settings(seconds=0.001).model_dump_json(),
        num_workers=2,
        attempt_dir=tmp_path,
        record_worker=lambda pid, pgid: started.append(pgid),
        device_env=placement.device_env,
        through=placement.through,
    ) as pool:
        pool.load(make_checkpoint())
        there = _processes_of("n2")
        assert there and all(process.environ()["CUDA_VISIBLE_DEVICES"] == "5" for process in there)
        units = [(number, [make_request(10 * number, n=300)]) for number in range(20)]
        answers = {}
        for number, completions in pool.generate(units):
            answers[number] = completions
            if len(answers) == 3:
                os.killpg(started[1], 9)
        assert answers == {number: expected_completions(requests) for number, requests in units}
        psutil.wait_procs(there, timeout=20)
        assert not any(process.is_running() for process in there)
        pool.load(make_checkpoint("w2"))  # waits for the one in its place
        assert pool.num_starts == 3
        assert _processes_of("n2")
    deadline = time.monotonic() + 20
    while (steps := cluster.ask("squeue", "--steps", "-h", "-j", in_job, "-o", "%j")) != "batch":
        assert time.monotonic() < deadline, steps
        time.sleep(0.2)


def _processes_of(node: str) -> list[psutil.Process]:
    """Worker processes in steps on a node of the cluster of this test."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ() if "reasonrun.workers.main" in process.cmdline() else {}
        except psutil.Error:
            continue
        own = env.get("SLURM_CONF") == os.environ["SLURM_CONF"]
        if own and env.get("SLURMD_NODENAME") == node and process.name() != "srun":
            found.append(process)
    return found
