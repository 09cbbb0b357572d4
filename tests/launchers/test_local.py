"""How one machine's devices and cores are divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reasonrun.errors import RecipeError
from reasonrun.launchers import local
from reasonrun.launchers.local import Local


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str | None, int], None]:
    """Call it to set CUDA_VISIBLE_DEVICES and the number of cores."""

    def describe(visible: str | None, num_cores: int) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(num_cores)))
        monkeypatch.setattr(local, "_CPU_QUOTA_PATH", tmp_path / "none")

    return describe


def place(**settings: object) -> local.Placement:
    return Local(Local.Settings(**settings)).placement()  # type: ignore[arg-type]


def test_cores_are_shared_and_gpus_hidden_without_devices(machine: Callable[[str | None, int], None]) -> None:
    machine("", 7)
    placement = place(num_workers=3)
    assert placement.num_workers == 3
    assert placement.device_env == ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},) * 3
    assert placement.num_processes == 1
    assert placement.training_env == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "7"}


def test_devices_are_divided_in_order(machine: Callable[[str | None, int], None]) -> None:
    machine("4,5,GPU-aa,7", 16)
    placement = place(num_workers=2)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in placement.device_env] == ["4,5", "GPU-aa,7"]
    assert placement.num_processes == 4
    assert placement.training_env == {"CUDA_VISIBLE_DEVICES": "4,5,GPU-aa,7", "OMP_NUM_THREADS": "4"}


def test_named_devices_and_processes_win(machine: Callable[[str | None, int], None]) -> None:
    machine("0,1,2,3", 8)
    placement = place(devices=[2, 3], num_processes=1)
    assert placement.device_env[0]["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert placement.training_env["CUDA_VISIBLE_DEVICES"] == "2"
    assert place(devices="cpu").training_env["CUDA_VISIBLE_DEVICES"] == ""


def test_impossible_division_names_what_is_possible(machine: Callable[[str | None, int], None]) -> None:
    machine("0,1,2,3,4,5", 8)
    with pytest.raises(RecipeError, match=r"6 devices cannot be divided among 4 workers[\s\S]*allowed: 1, 2, 3, 6"):
        place(num_workers=4)
    with pytest.raises(RecipeError, match=r"7 training processes for 6 devices[\s\S]*1 to 6"):
        place(num_processes=7)


def test_users_thread_count_is_kept(
    machine: Callable[[str | None, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("", 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert place(num_workers=2).device_env == ({"CUDA_VISIBLE_DEVICES": ""},) * 2


@pytest.mark.parametrize(
    ("content", "num_cores"),
    [("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1), ("1600000 100000\n", 8)],
)
def test_container_quota_limits_the_cores(
    machine: Callable[[str | None, int], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    content: str,
    num_cores: int,
) -> None:
    machine("", 8)
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(local, "_CPU_QUOTA_PATH", tmp_path / "cpu.max")
    assert local.num_cores() == num_cores


def test_driver_lists_devices_where_the_environment_is_silent(
    machine: Callable[[str | None, int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(None, 8)
    query_path = tmp_path / "nvidia-smi"
    query_path.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    query_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert local.find_devices() == ["0", "1"]
    query_path.write_text("#!/bin/sh\necho no driver >&2; exit 9\n")
    assert local.find_devices() == []
