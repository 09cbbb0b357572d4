"""GPUs that are not there, or held by somebody, stop a run before a worker starts; ``nvidia-smi`` is a stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from reasonrun.cli.doctor import examine
from reasonrun.errors import EnvironmentProblem
from reasonrun.launchers import _devices
from reasonrun.launchers._devices import check_devices, query_devices
from reasonrun.launchers.local import Local

Describe = Callable[..., None]


@pytest.fixture
def describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Describe:
    """``describe([used MiB of each device], {(device, pid): MiB})``: what the driver says from now on."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        f"#!/bin/sh\ncase $1 in\n--query-gpu=index) cut -d, -f1 {tmp_path}/gpu;;\n--query-gpu*) cat {tmp_path}/gpu;;\n"
        f"*) cat {tmp_path}/apps;;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(_devices, "RELEASE_SECONDS", 0.2)

    def write(used: list[int | str], apps: dict[tuple[int, int], int | str] | None = None) -> None:
        gpus = [f"{i}, GPU-{i}{i}-aa, NVIDIA H200, 143771, {mib}\n" for i, mib in enumerate(used)]
        (tmp_path / "gpu").write_text("".join(gpus))
        lines = [f"GPU-{i}{i}-aa, {pid}, {mib}\n" for (i, pid), mib in (apps or {}).items()]
        (tmp_path / "apps").write_text("".join(lines))

    return write


@pytest.fixture
def start() -> Iterator[Callable[..., int]]:
    """``start(log_path, *more arguments)``: a sleeping process with that standard error; its pid."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(log_path: Path | None = None, *arguments: str) -> int:
        with open(log_path or os.devnull, "ab") as log:
            command = [sys.executable, "-c", "import time; time.sleep(600)", *arguments]
            processes.append(subprocess.Popen(command, stderr=log))
        return processes[-1].pid

    yield run
    for process in processes:
        process.kill()
        process.wait()


def make_attempt(folder: Path, supervisor: int, started: float) -> Path:
    """A run directory's attempt; the path of a worker's log in it."""
    attempt = folder / "runs" / "star" / "attempts" / "3"
    (attempt / "logs").mkdir(parents=True)
    record = {"pid": supervisor, "started": started, "host": os.uname().nodename}
    (attempt / "attempt.json").write_text(json.dumps(record))
    return attempt / "logs" / "generation-0.log"


def start_workers(**settings: Any) -> None:
    """What a run asks of its launcher first; starts no process."""
    recipe = SimpleNamespace(engine=Local.Settings(), classes={"engine": Local})
    place = SimpleNamespace(attempt_dir=Path("/nowhere"), record_worker=lambda pid, pgid: None)
    Local(Local.Settings(**settings)).generation(recipe=recipe, run_dir=place, interrupted=lambda: 0)


def test_leftover_worker_of_an_ended_run_is_named_and_killing_it_comes_first(
    describe: Describe, start: Callable[..., int], tmp_path: Path
) -> None:
    pid = start(make_attempt(tmp_path, supervisor=os.getpid(), started=time.time() - 10**6))
    describe([140_000, 300, 12], {(0, pid): 139_000})
    with pytest.raises(EnvironmentProblem) as caught:
        start_workers()
    assert caught.value.exit_code == 3
    message = caught.value.message
    assert message.startswith("devices are held")
    assert "launcher.devices asks for 0:" in message
    assert "device 0 (NVIDIA H200, 3.7 of 140.4 GiB free) is held by" in message
    assert f"process {pid}, running for 0 s: {sys.executable}" in message.replace("1 s", "0 s")
    assert f"(135.7 GiB), a leftover worker of {tmp_path}/runs/star" in message
    assert caught.value.hint == (
        f"kill {pid} ends what is left over; or launcher.devices=[1,2] takes what is free; or "
        "launcher.devices=cpu needs no GPU"
    )
    start_workers(devices=[1, "GPU-22"])
    start_workers(devices="cpu")


def test_worker_of_a_run_at_work_is_not_to_be_killed(
    describe: Describe, start: Callable[..., int], tmp_path: Path
) -> None:
    me = psutil.Process()
    pid = start(make_attempt(tmp_path, supervisor=me.pid, started=me.create_time()))
    describe([140_000], {(0, pid): "[N/A]"})
    with pytest.raises(EnvironmentProblem, match=rf"no GPU free[\s\S]*, a worker of {tmp_path}/runs/star") as caught:
        start_workers(devices=[0])
    assert "kill" not in str(caught.value)
    assert caught.value.hint.startswith("wait until")


def test_orphan_that_runs_a_worker_is_left_over_even_without_its_log(
    describe: Describe, start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = start(None, "-m", "reasonrun.workers.main")
    stranger = start()
    monkeypatch.setattr(psutil.Process, "ppid", lambda process: 1)
    describe([140_000], {(0, pid): 70_000, (0, stranger): 70_000})
    with pytest.raises(EnvironmentProblem) as caught:
        check_devices(["GPU-00-aa"], "launcher.devices")
    assert caught.value.hint.startswith(f"kill {pid} ends what is left over; or launcher.devices=cpu")


def test_holder_in_another_container_is_waited_for_and_then_said(describe: Describe) -> None:
    describe([140_000])
    with pytest.raises(EnvironmentProblem, match="processes that cannot be seen from here"):
        check_devices(["0"], "launcher.devices")
    describe([140_000], {(0, 2**22 + 5): 100})
    with pytest.raises(EnvironmentProblem, match=r"process 4194309 \(0\.1 GiB\), which cannot be seen"):
        check_devices(["0"], "launcher.devices")


def test_memory_that_comes_back_in_a_moment_stops_nobody(describe: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_devices, "RELEASE_SECONDS", 5.0)
    monkeypatch.setattr(_devices, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda s: describe([0])))
    describe([140_000])
    check_devices(["0"], "launcher.devices")


@pytest.mark.parametrize("used", [[71_000, 0], ["[N/A]", 0]], ids=["a little below half", "unknown"])
def test_device_that_is_shared_a_little_is_free(describe: Describe, used: list[int | str]) -> None:
    describe(used, {(0, os.getpid()): 71_000})
    start_workers(num_workers=2)


def test_devices_that_are_not_there(describe: Describe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    describe([0, 0])
    with pytest.raises(EnvironmentProblem, match=r"there is no device 2, GPU-77; [\s\S]*name some of 0, 1") as caught:
        start_workers(devices=[0, 2, "GPU-77"], num_workers=3)
    assert caught.value.exit_code == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,5")
    with pytest.raises(EnvironmentProblem, match="CUDA_VISIBLE_DEVICES: there is no device 5"):
        start_workers()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(_devices, "_DRIVER_PATHS", ())
    with pytest.raises(EnvironmentProblem, match=r"shows no GPU \(nvidia-smi is not on PATH\)[\s\S]*devices=cpu"):
        start_workers(devices=[0])
    monkeypatch.setattr(_devices, "_DRIVER_PATHS", ("/dev/null",))
    start_workers(devices=[0])  # a driver without its tool: nothing can be said


def test_checked_once_because_afterwards_our_own_workers_hold_the_device(describe: Describe) -> None:
    launcher = Local(Local.Settings(devices=(0,)))
    describe([0])
    place = SimpleNamespace(attempt_dir=Path("/nowhere"), record_worker=lambda pid, pgid: None)
    launcher.training("m.Trainer", recipe=SimpleNamespace(), run_dir=place, interrupted=lambda: 0)  # type: ignore[arg-type]
    describe([140_000], {(0, os.getpid()): 139_000})
    launcher.training("m.Trainer", recipe=SimpleNamespace(), run_dir=place, interrupted=lambda: 0)  # type: ignore[arg-type]


def test_doctor_shows_free_memory_and_holders(describe: Describe, start: Callable[..., int]) -> None:
    pid = start()
    describe([140_000, 300], {(0, pid): 139_000})
    gpus = {check.name: check for check in examine() if check.group == "devices"}
    assert (gpus["GPU 1"].state, gpus["GPU 1"].found) == ("ok", "NVIDIA H200, 140.1 of 140.4 GiB free")
    assert gpus["GPU 0"].state == "low"
    assert gpus["GPU 0"].found.startswith(f"NVIDIA H200, 3.7 of 140.4 GiB free (held); process {pid}, running for ")
    describe([])
    assert query_devices() == []
    assert [check.state for check in examine() if check.group == "devices"] == ["absent"]
