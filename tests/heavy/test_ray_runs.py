"""A STaR round on a real Ray with two nodes: the same bytes as at home, with a node lost, without a shared path."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import reasonrun

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(240)]

RECIPE = """
defaults: [{model: tiny}, {engine: hf}, {launcher: local}, _self_]
task: {name: arith, num_train: 40, num_dev: 8, num_test: 8}
method:
  name: star
  rounds: 1
  num_samples: 4
  steps_start: 4
  sft: {checkpoint_every: 2, batch_size: 8}
evaluate: {num_samples: 1}
engine: {unit_rows: 8}
preflight: "off"
"""
GEN = ["launcher=ray", "launcher.resources={gen: 1}", "launcher.place_seconds=10"]
ENV = {
    **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
    "PYTHONPATH": str(Path(reasonrun.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Cluster:
    """The cluster's process."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("ray_cluster.py")
        self.process = subprocess.Popen(
            [sys.executable, script],
            env=ENV,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        answer = self._answer()
        self.address, self.nodes = answer["address"], answer["nodes"]

    def order(self, command: str) -> None:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        self.nodes = self._answer()["nodes"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise AssertionError("the cluster has ended")

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=30)
        self.process.kill()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray")
    started = Cluster()
    yield started
    started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ray")
    (made / "round.yaml").write_text(RECIPE)
    return made


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "reasonrun.cli.main",
        "train",
        "round.yaml",
        *overrides,
        "--run",
        str(folder / name),
    ]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=ENV, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    assert process.wait(200) == 0, (folder / f"{name}.log").read_text()[-3000:]


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every committed table and every weight file."""
    files = [path for path in (run_dir / "steps").rglob("*") if path.suffix in (".parquet", ".safetensors")]
    return {str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, str]:
    """The digests of the same round on this machine's own workers."""
    finish(start(folder, "local"), folder, "local")
    found = digests(folder / "local")
    assert any("star_rows" in name for name in found) and any(name.endswith(".safetensors") for name in found)
    return found


def wait_until_sampling(run_dir: Path) -> None:
    sample = run_dir / "steps/round-001/sample"
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in sample.glob("wal*.jsonl")):
        assert time.monotonic() < deadline and not (sample / "_OK.json").exists()
        time.sleep(0.02)


def node_of(run_dir: Path, worker: str) -> str:
    log = (run_dir / "attempts/1/logs" / f"{worker}.log").read_text()
    found = re.search(r"runs on \S+, node (\w+)", log)
    assert found, log
    return found[1]


def run_processes(run_dir: Path) -> list[psutil.Process]:
    """The processes of a run, wherever they hang in the tree: relays, and workers of its attempt."""
    relays = [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]
    return [p for p in relays if "on_ray" in " ".join(p.info["cmdline"])]


def remote_workers(cluster: Cluster) -> list[psutil.Process]:
    """Workers that actors of the cluster have started, and the actors."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            "reasonrun.workers.main any" in line or line.startswith("ray::RemoteWorker")
        ):
            with contextlib.suppress(psutil.Error):
                if process.username() == psutil.Process().username():
                    found.append(process)
    return found


def seconds_until(condition: Callable[[], bool], limit: float) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - began


def test_nothing_at_the_address_and_no_room_end_with_3(cluster: Cluster, folder: Path) -> None:
    assert start(folder, "nobody", "launcher=ray", "launcher.address=127.0.0.1:1").wait(60) == 3
    said = (folder / "nobody.log").read_text()
    assert "nothing answers at launcher.address=127.0.0.1:1" in said and "ray start --head" in said
    small = [f"launcher.address={cluster.address}", "launcher.place_seconds=1", "launcher.gpus_per_worker=2"]
    assert start(folder, "full", "launcher=ray", *small).wait(60) == 3
    said = (folder / "full.log").read_text()
    assert "generation worker 1 of 1 asks for 1 CPU, 2 GPU, and no node" in said and "no node is large enough" in said
    assert "Traceback" not in said


def test_round_without_a_shared_path_is_the_local_one(cluster: Cluster, folder: Path, local: dict[str, str]) -> None:
    overrides = [*GEN, f"launcher.address={cluster.address}", "launcher.shared_path=no", "launcher.residency=exit"]
    finish(start(folder, "sent", *overrides, f"launcher.cache_dir={folder / 'cache'}"), folder, "sent")
    assert digests(folder / "sent") == local
    assert list((folder / "cache").glob("*/model.safetensors"))
    assert seconds_until(lambda: not remote_workers(cluster), 10) < 10


@pytest.mark.parametrize("where", ["cluster", "local"])
def test_killed_supervisor_leaves_nothing(cluster: Cluster, folder: Path, where: str) -> None:
    overrides = {
        "cluster": [*GEN, f"launcher.address={cluster.address}", "launcher.num_workers=2"],
        "local": ["launcher=ray", "launcher.address=local"],  # a Ray that belongs to the run, and goes with it
    }
    run_dir = folder / f"killed-{where}"
    process = start(folder, run_dir.name, *overrides[where])
    wait_until_sampling(run_dir)
    own_ray = [p for p in psutil.Process(process.pid).children(recursive=True) if "raylet" in " ".join(p.cmdline())]
    assert bool(own_ray) == (where == "local")
    assert len(remote_workers(cluster)) >= 6 and run_processes(run_dir)  # an actor, a guard and a worker each
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    def all_gone() -> bool:
        return not (remote_workers(cluster) or run_processes(run_dir) or any(p.is_running() for p in own_ray))

    assert seconds_until(all_gone, 20) < 5


def test_lost_node_costs_its_units_in_flight(cluster: Cluster, folder: Path, local: dict[str, str]) -> None:
    process = start(folder, "lost", *GEN, f"launcher.address={cluster.address}", "launcher.num_workers=2")
    wait_until_sampling(folder / "lost")
    victim = node_of(folder / "lost", "generation-1")
    assert victim in cluster.nodes and victim != node_of(folder / "lost", "generation-0")
    cluster.order(f"lose {cluster.nodes.index(victim)}")
    assert not (folder / "lost/steps/round-001/sample/_OK.json").exists()
    finish(process, folder, "lost")
    assert digests(folder / "lost") == local
    assert "is gone" in (folder / "lost/attempts/1/logs/generation-1.log").read_text()
    assert not list((folder / "lost").glob("quarantine/*"))
