"""Engines and trainers that behave, crash, hang, talk and fail on demand. Worker processes import this module."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from reasonrun import errors
from reasonrun.contracts import TrainEvents
from reasonrun.generation import Completion, Request
from reasonrun.records import Checkpoint, Sampling
from reasonrun.rendering import Renderer
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import TrainJob, TrainResult


def make_request(number: int, n: int = 2) -> Request:
    return Request(
        key=f"request-{number}",
        problem_id=f"problem-{number}",
        prompt_ids=(number, number + 1),
        n=n,
        seed=number,
        sampling=Sampling(),
    )


def make_checkpoint(weights: str = "w1") -> Checkpoint:
    return Checkpoint(path=f"/models/{weights}", weights=weights, tokenizer="t")


def expected_completions(requests: Sequence[Request], weights: str = "w1") -> list[Completion]:
    """What ``Stub`` answers, in order."""
    return [
        Completion(
            request=request.key,
            index=index,
            token_ids=(request.seed, index, 7),
            text=f"{weights} says {request.key}/{index}",
            finish_reason="stop",
        )
        for request in requests
        for index in range(request.n)
    ]


class Stub:
    """Answers from the request and the weights' name; everything else is trouble that the settings ask for."""

    class Settings(SettingsBase):
        log_path: str = ""  # gets a line "<pid> <first key>" before each unit
        seconds: float = 0.0  # before each completion
        noise: bool = False
        marker_path: str = ""  # where it exists, trouble keys make no trouble; the first trouble creates it
        trouble: str = ""
        trouble_keys: tuple[str, ...] = ()
        drop_last: bool = False
        child_pid_path: str = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.weights = ""
        if settings.noise:
            make_noise()
        if settings.trouble == "construction":
            raise ValueError("the stub cannot be built")
        if settings.trouble == "slow construction":
            time.sleep(60)
        if settings.child_pid_path:
            child = subprocess.Popen(["sleep", "300"])
            with open(settings.child_pid_path, "a") as file:
                file.write(f"{child.pid}\n")

    def load(self, checkpoint: Checkpoint) -> None:
        if self.settings.trouble == "load":
            os._exit(3)
        self.weights = checkpoint.weights

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        if self.settings.log_path:
            with open(self.settings.log_path, "a") as log:
                log.write(f"{os.getpid()} {requests[0].key}\n")
        completions = expected_completions(requests, self.weights)
        for completion in completions[:-1] if self.settings.drop_last else completions:
            if completion.request in self.settings.trouble_keys:
                self._make_trouble()
            if self.settings.noise:
                make_noise()
            time.sleep(self.settings.seconds)
            yield completion

    def _make_trouble(self) -> None:
        marker_path = self.settings.marker_path
        if marker_path and Path(marker_path).exists():
            return
        if marker_path:
            Path(marker_path).touch()
        make_trouble(self.settings.trouble)

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        shift = len(self.weights)  # so that weights can be told apart
        return [[-float(sum(prompt_ids) + token_id + shift - 2) for token_id in ids] for prompt_ids, ids in sequences]

    def sleep(self) -> None:
        self.weights = "asleep"

    def close(self) -> None:
        if self.settings.log_path:
            with open(self.settings.log_path, "a") as log:
                log.write(f"{os.getpid()} closed\n")


def make_noise() -> None:
    """Write to standard output in every way there is, even what looks like a message."""
    print('{"kind":"generated","call":1,"completions":[]}', flush=True)
    os.write(1, b"\xff\x00 raw bytes, no line end")
    subprocess.run([sys.executable, "-S", "-c", "print('from a child')"], check=True)


def make_trouble(kind: str) -> None:
    match kind:
        case "exit":
            print("last words of the engine", file=sys.stderr)
            os._exit(9)
        case "exception":
            raise ValueError("the stub is broken")
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            hang_in_python()
        case "hang with the lock":
            hang_with_the_lock()
        case "memory":
            raise errors.OutOfMemory("out of memory.", hint="less at a time")
        case "finding":
            raise errors.Finding("nothing to learn", evidence={"wrong": 3, "share": 0.5}, hint="more samples")
        case "own error":
            raise OwnError("the stub's own", hint="look there")


class OwnError(errors.RecipeError):
    """A plug-in's own refinement, which the supervisor does not know."""


def hang_in_python() -> None:
    time.sleep(600)


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(600)  # keeps the interpreter's lock, so that no other thread of the worker runs


class Answers42:
    """A real engine in all but the model: the same answer to every prompt. Dies of one problem unless it was healed."""

    class Settings(SettingsBase):
        name: str = "worker_stubs.Answers42"
        unit_rows: int = 8
        log_path: str = setting("", Effect.OPERATIONAL, "Gets the keys of every call, a line each.")
        poison_path: str = setting("", Effect.OPERATIONAL, "Where it exists, prompts with this text end the worker.")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def load(self, checkpoint: Checkpoint) -> None:
        self.renderer = Renderer.load(checkpoint.path)

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        with open(self.settings.log_path, "a") as log:
            log.write(" ".join(request.key for request in requests) + "\n")
        poison_path = Path(self.settings.poison_path)
        for request in requests:
            if poison_path.exists() and poison_path.read_text() in self.renderer.decode(request.prompt_ids):
                make_trouble("exit")
            for index in range(request.n):
                ids = self.renderer.encode("42")
                yield Completion(request=request.key, index=index, token_ids=ids, text="42", finish_reason="length")

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        raise NotImplementedError

    def close(self) -> None: ...


class StubRanks:
    """Trains for ever in the processes that the job asks for; each appends its pid to the job's ``pids_path``."""

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        from reasonrun.trainers import launch

        if not launch.is_rank():
            return launch.train_in_processes("worker_stubs:StubRanks", job, events)
        with open(str(job.settings["pids_path"]), "a") as file:
            file.write(f"{os.getpid()}\n")
        events({"event": "log", "step": 1})
        while True:
            sum(range(1000))


class StubTrainer:
    """The job's settings say what to do: crash_at, crash_on_resume, trouble, checkpoint_every, seconds."""

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        make_noise()
        first = int(job.resume_from.rsplit("-", 1)[1]) if job.resume_from else 0
        wanted = job.settings
        for step in range(first + 1, job.num_steps + 1):
            may_crash = wanted.get("crash_on_resume") or not job.resume_from
            may_crash = may_crash and wanted.get("micro_batch_size") != 1
            if may_crash and step == wanted.get("crash_at"):
                make_trouble(str(wanted["trouble"]))
            time.sleep(float(str(wanted.get("seconds", 0))))
            events({"event": "log", "step": step, "loss": float("nan") if step == 1 else 1.0 / step})
            if step % int(str(wanted.get("checkpoint_every", 1000))) == 0:
                events({"event": "checkpoint", "step": step, "path": f"{job.out_dir}/checkpoint-{step}"})
        metrics = {"num_processes": float(job.num_processes), "pid": float(os.getpid())}
        metrics["is_sharded"] = float(job.sharding != "none")
        return TrainResult(num_steps=job.num_steps, num_tokens=1, num_padded_tokens=2, metrics=metrics)
