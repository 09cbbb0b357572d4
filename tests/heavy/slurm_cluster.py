"""A Slurm of one machine: munged, slurmctld and two slurmd on loopback, as this user, with every file in one folder."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_START_SECONDS = 30.0

_CONF = """\
ClusterName=reasonrun
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,requeue_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
ReturnToService=2
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=4 RealMemory=2048 State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes={nodes} MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What ``scripts/install_slurm.sh`` would have to install."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class SlurmCluster:
    """Running daemons; leaving the ``with`` block cancels all jobs and ends them. ``env`` finds this Slurm."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path must be short
        self.env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.env if name.startswith(("SLURM_JOB", "SBATCH_"))]:
            del self.env[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._write_conf()
            key = self.folder / "munge.key"
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
            own = [f"--{kind}={self.folder}/munge.{kind}" for kind in ("socket",)]
            files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
            self._start("munged", "--foreground", "--force", *own, *files)
            self._await(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self._await(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D", "-p", "main") == "2", "slurmd")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) > 1:
            subprocess.run(["scancel", "-u", getpass.getuser()], env=self.env, check=False, timeout=60)
            self._settle()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *command: str) -> str:
        """Standard output of a Slurm command without its last newline; empty when it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.strip()

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED …, as scontrol says."""
        return self.fact(job_id, "JobState")

    def fact(self, job_id: str, name: str) -> str:
        """One ``Name=value`` of ``scontrol show job``; empty when there is none."""
        shown = self.ask("scontrol", "show", "job", job_id, "--oneliner").split()
        return next((word.partition("=")[2] for word in shown if word.startswith(f"{name}=")), "")

    def wait_for(self, job_id: str, *states: str, seconds: float = 60.0) -> str:
        """Wait until the job is in one of these states; the state. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job_id)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"job {job_id} is {state}, not {states}: {self.ask('scontrol', 'show', 'job', job_id)}"
                )
            time.sleep(0.2)
        return state

    def _settle(self) -> None:
        deadline = time.monotonic() + 20
        while self.ask("squeue", "-h", "-o", "%i") and time.monotonic() < deadline:
            time.sleep(0.2)

    def _write_conf(self) -> None:
        ports = _free_ports(1 + len(NODES))
        text = _CONF.format(
            folder=self.folder,
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            ctld_port=ports[0],
            nodes=",".join(NODES),
            node_ports=",".join(map(str, ports[1:])),
        )
        (self.folder / "state").mkdir()
        Path(self.env["SLURM_CONF"]).write_text(text)

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as out:
            daemon = subprocess.Popen(
                [shutil.which(program, path=_PATH) or program, *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _await(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not start within {_START_SECONDS:g} s{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        paths = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "".join(f"\n== {path.name}\n{path.read_text()[-2000:]}" for path in paths)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return sorted(each.getsockname()[1] for each in sockets)
    finally:
        for each in sockets:
            each.close()
