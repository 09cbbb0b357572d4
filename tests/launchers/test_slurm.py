"""What is submitted to Slurm, and what a user is told where there is none. With a real one: tests/heavy/test_slurm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

import reasonrun
from reasonrun.errors import EnvironmentProblem, RecipeError, RunConflict
from reasonrun.launchers import _slurm_queue as queue
from reasonrun.launchers._slurm_script import Job, script_text
from reasonrun.launchers.slurm import Slurm
from reasonrun.recipe import load
from reasonrun.report.run_record import check_is_run
from reasonrun.running import run_directory

SMALL = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "method.rounds=1"]


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No job of Slurm around the tests."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SUBMITIT", "REASONRUN_SLURM"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``commands(sbatch="shell lines", …)`` makes the PATH these commands and what is in ``beside``; gives their folder."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(beside: str = "", **bodies: str) -> Path:
        for name, body in bodies.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{beside}")
        return folder

    return make


def text(
    tmp_path: Path,
    *,
    once: tuple[str, ...] = (),
    command: tuple[str, ...] = ("reasonrun", "train", "a b"),
    **settings: object,
) -> str:
    """The script for these settings."""
    pytest.importorskip("submitit")
    job = Job(command=command, once=once, name="mine", jobs=tmp_path / "100%" / "jobs", cwd=tmp_path)
    return script_text(job, Slurm.Settings.model_validate(settings))


def parameters(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}


def test_what_nobody_said_is_left_to_the_cluster(tmp_path: Path) -> None:
    assert parameters(text(tmp_path)) == {
        f"--chdir={tmp_path}",
        "--job-name=mine",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--open-mode=append",
        f"--output={tmp_path}/100%%/jobs/%j.log",  # a % of a folder's name is no pattern
        "--requeue",
        "--signal=B:TERM@120",
    }


def test_every_setting_is_a_parameter_or_a_line(tmp_path: Path) -> None:
    script = text(
        tmp_path,
        partition="gpu",
        account="lab",
        qos="long",
        time_minutes=90,
        num_nodes=2,
        num_workers=4,
        gpus_per_node=8,
        cpus_per_task=32,
        memory_gib=200,
        signal_seconds=300,
        max_requeues=7,
        setup=("module load cuda", "ulimit -c 0"),
        extra={"gres": "gpu:a100:4", "exclusive": True, "nice": 5},
    )
    assert parameters(script) > {
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--time=90",
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=32",
        "--mem=200G",
        "--signal=B:TERM@300",
        "--gres=gpu:a100:4",
        "--exclusive",
        "--nice=5",
    }
    assert script.index("module load cuda\nulimit -c 0") < script.index("\ncommand=(reasonrun train 'a b')\n")
    assert "-ge 7 ]" in script


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_nodes": 2, "num_workers": 3}, "3 generation workers cannot be divided among 2 nodes"),
        ({"extra": {"signal": "USR1@10"}}, "launcher.signal_seconds says when"),
        ({"extra": {"mem": "4G"}}, "launcher.memory_gib is its field"),
        ({"extra": {"--gres": "gpu:1"}}, "no long name of a parameter of sbatch"),
        ({"extra": {"comment": "it's"}}, "text without a quote"),
        ({"extra": {"comment": "a\n#SBATCH --wrap=x"}}, "text without a quote"),
        ({"time_minutes": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Slurm.Settings.model_validate(settings)


RUNS = 'printf "%s\\n" "$*" >>"$CALLS"'  # what was called, line by line
COMMAND = """\
trap 'echo told >>"$CALLS"; sleep 0.2; exit 75' TERM
echo "began $*" >>"$CALLS"
[ "$1" = wait ] && { for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.3; done; }
exit "$2"
"""


@pytest.mark.parametrize(
    ("arguments", "state", "restarts", "status", "called"),
    [
        (("end", "0"), "RUNNING", "", 0, ["began end 0 --redo x"]),
        (("end", "5"), "RUNNING", "1", 5, ["began end 5"]),  # what is for the first start alone is left out
        (("end", "75"), "RUNNING", "1", 75, ["began end 75", "requeue 9"]),
        (("end", "75"), "RUNNING", "2", 75, ["began end 75"]),  # often enough
        (("end", "75"), "COMPLETING", "1", 75, ["began end 75"]),  # cancelled, or requeued by Slurm
        (("wait", "0"), "RUNNING", "1", 75, ["began wait 0", "told", "requeue 9"]),
    ],
)
def test_the_script_waits_for_the_run_and_requeues_on_75_alone(
    tmp_path: Path,
    commands: Callable[..., Path],
    arguments: tuple[str, ...],
    state: str,
    restarts: str,
    status: int,
    called: list[str],
) -> None:
    folder = commands("/usr/bin:/bin", run=COMMAND, squeue=f"echo {state}", scontrol=RUNS)
    script = tmp_path / "submit.sh"
    script.write_text(text(tmp_path, command=(str(folder / "run"), *arguments), once=("--redo", "x"), max_requeues=2))
    calls = tmp_path / "calls"
    env = {**os.environ, "CALLS": str(calls), "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": restarts}
    job = subprocess.Popen(["bash", str(script)], env=env, stderr=subprocess.PIPE, text=True)
    if arguments[0] == "wait":
        while not calls.exists() or "began" not in calls.read_text():
            assert job.poll() is None
        job.terminate()
        job.terminate()  # Slurm may repeat itself
    _, said = job.communicate(timeout=20)
    lines = calls.read_text().splitlines()
    assert (job.returncode, list(dict.fromkeys(lines))) == (status, called), said


def test_without_submitit_or_slurm_the_message_says_what_to_install(
    tmp_path: Path, commands: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Slurm(Slurm.Settings())
    commands()
    with pytest.raises(EnvironmentProblem, match=r"sbatch is not on the PATH[\s\S]*login node[\s\S]*launcher=local"):
        launcher.submit(["train"], folder=tmp_path, program=["reasonrun"])
    commands(sbatch="exit 1", squeue="exit 1")
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    with pytest.raises(EnvironmentProblem, match=r"submitit[\s\S]*pip install 'reasonrun\[slurm\]'"):
        launcher.submit(["train"], folder=tmp_path, program=["reasonrun"])
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("sbatch: error: invalid partition specified: huge\nsbatch: error: Invalid partition name specified",
         r"no partition 'huge'\n  launcher.partition is one of: a, b"),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
         r"Slurm does not answer: Batch[\s\S]*scontrol ping"),
        ("sbatch: error: ClusterName needs to be specified\nsbatch: fatal: Unable to process configuration file",
         "Slurm does not answer: ClusterName"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         r"refused the job: Batch[\s\S]*\n  launcher.account"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", r"\n  launcher.qos"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
         r"\n  launcher.time_minutes"),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "memory_gib"),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit", r"QOSMax[\s\S]*sbatch --test-only"),
        ("", "it said nothing"),
    ],
)  # fmt: skip
def test_a_refusal_ends_with_the_cheapest_next_step(
    tmp_path: Path, commands: Callable[..., Path], said: str, told: str
) -> None:
    commands(sbatch=f"printf '{said}' >&2; exit 1", sinfo="echo b; echo a")
    with pytest.raises(EnvironmentProblem, match=told) as problem:
        queue.submit("#!/bin/bash\n", tmp_path / "jobs", tmp_path, "huge")
    assert problem.value.exit_code == 3
    assert (tmp_path / "jobs" / "submit.sh").read_text() == "#!/bin/bash\n"  # to be tried by hand


def test_a_job_that_waits_is_not_submitted_twice(tmp_path: Path, commands: Callable[..., Path]) -> None:
    run = tmp_path / "mine"
    commands(sbatch="echo '12;cluster'", squeue="exit 1")
    submission = queue.submit("#!/bin/bash\n", run / "jobs", run, None)
    assert (submission.job_id, submission.log) == ("12", run / "jobs" / "12.log")
    with pytest.raises(RecipeError, match=r"has not begun[\s\S]*squeue -j 12"):
        check_is_run(run)
    queue.refuse_second(run / "jobs", run)  # Slurm knows it no more
    commands(squeue="echo 'PENDING mine'")
    with pytest.raises(RunConflict, match=r"Slurm job 12 is PENDING[\s\S]*scancel 12"):
        queue.refuse_second(run / "jobs", run)
    commands(squeue="echo 'RUNNING of-somebody-else'")
    queue.refuse_second(run / "jobs", run)


def test_workers_are_spread_over_the_nodes_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    launcher = Slurm(Slurm.Settings(num_nodes=2, num_workers=4, devices=(0, 1, 2, 3)))
    with pytest.raises(EnvironmentProblem, match="launcher=local"):
        launcher.placement()
    own = {"REASONRUN_SLURM_JOB": "7", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "gpu-04"}
    for name, value in {**own, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu-[03-04]"}.items():
        monkeypatch.setenv(name, value)
    placement = launcher.placement()
    assert placement.num_workers == 4
    assert [env["CUDA_VISIBLE_DEVICES"] for env in placement.device_env] == ["0,1", "2,3"] * 2
    assert placement.training_env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert placement.through[:2] == ((), ())
    for number, (carrier, visible) in enumerate(zip(placement.through[2:], ["0,1", "2,3"], strict=True), start=2):
        assert {"gpu-03", f"generation-{number}", f"CUDA_VISIBLE_DEVICES={visible}"} < set(carrier)
    assert launcher.submit(["train"], folder=Path("x"), program=["reasonrun"]) is None  # the job's own command runs
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # a job of somebody else's within this one's environment
    with pytest.raises(EnvironmentProblem):
        launcher.placement()


def test_a_launcher_does_not_change_which_run_it_is() -> None:
    directories = {run_directory(load("smoke_star", given), None) for given in ([], ["launcher=slurm"])}
    assert directories == {Path("runs/smoke_star")}


def test_check_and_plan_need_no_slurm_and_train_says_what_is_missing(tmp_path: Path) -> None:
    def reasonrun_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "reasonrun.cli.main", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(reasonrun.__file__).parents[1]), "PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    recipe = ["smoke_star", *SMALL, "launcher=slurm", "launcher.partition=gpu"]
    assert reasonrun_cli("check", *recipe).returncode == 0
    assert reasonrun_cli("plan", *recipe).returncode == 0
    done = reasonrun_cli("train", *recipe, "--json")
    assert done.returncode == 3 and "sbatch" in json.loads(done.stdout)["message"]
    bad = reasonrun_cli("check", *recipe, "launcher.extra={array: 3}")
    assert bad.returncode == 2 and "a run is one job" in bad.stderr
    assert list(tmp_path.iterdir()) == []
