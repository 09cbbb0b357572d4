"""G2, G4, G8: errors of the operating system itself, injected into system calls, and disks that are really full."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from recovery import NUM_UNITS, Judge

from promises import Counted
from toy_server import ToyServer, final_bytes

pytestmark = pytest.mark.attack

CASES = {"write": range(1, 90, 4), "fsync": range(1, 90, 3), "rename": range(1, 26)}
"""Which calls fail, counted from the start of the run; the last ones lie beyond its end."""


@contextmanager
def injected(pid: int, call: str, error: str, number: int, log: Path) -> Iterator[None]:
    """Make the ``number``-th ``call`` of a stopped process fail, and let it go on."""
    what = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"]
    tracer = subprocess.Popen(["strace", "-o", str(log), *what, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    try:
        assert "attached" in tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        yield
    finally:
        tracer.communicate(timeout=30)


@pytest.fixture(scope="module")
def strace(tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: apt install strace")
    sleeper = subprocess.Popen(["sleep", "30"])
    tracer = subprocess.Popen(["strace", "-p", str(sleeper.pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    sleeper.kill()
    sleeper.wait()
    tracer.communicate(timeout=30)
    if "attached" not in first:
        pytest.skip(f"strace may not attach to a process here: {first.strip()}")


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("call", list(CASES))
@pytest.mark.usefixtures("strace")
def test_a_system_call_that_fails_damages_nothing(
    call: str, error: str, toy_server: ToyServer, judge: Judge, scratch: Path, counted: Counted
) -> None:
    num_injected = 0
    for number in CASES[call]:
        run, log = scratch / f"{call}-{number}", scratch / "strace.txt"
        pid = toy_server.start_stopped(run, num_units=NUM_UNITS, hushed=True)
        with injected(pid, call, error, number, log):
            ended = toy_server.wait()
        num_here = log.read_text().count("(INJECTED)")
        num_injected += num_here
        assert ended in (0, 1) and (ended == 0 or num_here), f"{call} {number}: exit {ended}"
        half = list(judge.half_written(run, []))
        assert not half, f"{error} at {call} {number}: {half}"
        assert toy_server.run(run, num_units=NUM_UNITS) == 0, f"not resumed after {error} at {call} {number}"
        assert final_bytes(run) == judge.clean, f"other bytes after {error} at {call} {number}"
        shutil.rmtree(run)
    assert num_injected >= 15
    for promise in ("G2", "G4", "G8"):
        counted(promise, f"{call} calls failed with {error}", num_injected)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of its own, and the function that gives it another size."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "reasonrun-attack", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {made.stderr.strip()}")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def test_a_full_disk_damages_nothing_and_the_run_goes_on_when_space_is_back(
    toy_server: ToyServer, judge: Judge, tmp_path: Path, counted: Counted
) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root; the limit on file sizes is tried in its place")
    page, num_full, num_pages = os.sysconf("SC_PAGE_SIZE"), 0, 0
    while True:
        num_pages += 1
        disk = tmp_path / f"disk-{num_pages}"
        with small_disk(disk, num_pages * page) as resize:
            ended = toy_server.run(disk / "run", num_units=NUM_UNITS, hushed=True)
            if ended == 0:
                break
            num_full += 1
            assert list(judge.half_written(disk / "run", [])) == [], f"{num_pages} pages"
            again = toy_server.run(disk / "run", num_units=NUM_UNITS, hushed=True)  # a full disk stays one
            assert list(judge.half_written(disk / "run", [])) == [] and again in (0, 1), f"{num_pages} pages"
            resize(1 << 24)
            assert toy_server.run(disk / "run", num_units=NUM_UNITS) == 0, f"not resumed on {num_pages} pages"
            assert final_bytes(disk / "run") == judge.clean
    assert num_full > 10
    for promise in ("G2", "G4", "G8"):
        counted(promise, "sizes of a full disk", num_full)


def test_a_limit_on_file_sizes_damages_nothing(
    toy_server: ToyServer, judge: Judge, tmp_path: Path, counted: Counted
) -> None:
    limits = (1, 100, 500, 700, 1000, 1500, 2000, 4000)
    for limit in limits:
        run = tmp_path / str(limit)
        assert toy_server.run(run, num_units=NUM_UNITS, max_file_bytes=limit, hushed=True) == 1
        assert list(judge.half_written(run, [])) == [], f"limit {limit}"
        assert toy_server.run(run, num_units=NUM_UNITS) == 0, f"not resumed after a limit of {limit} bytes"
        assert final_bytes(run) == judge.clean
    for promise in ("G2", "G4", "G8"):
        counted(promise, "limits on file sizes", len(limits))
