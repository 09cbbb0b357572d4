"""What supervisor and worker say to each other: one JSON object a line over two pipes that nothing else writes to.

The supervisor writes ``Setup``, then calls (``Load``, ``Sleep``, ``Generate``, ``Logprobs``, ``Train``), then ``Exit``. A worker
writes ``Hello`` before anything else, ``Heartbeat`` all the time, and one answer per call, with the call's number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

import reasonrun
from reasonrun import errors
from reasonrun.generation import Completion, Request
from reasonrun.records import Checkpoint, Record
from reasonrun.training import TrainJob, TrainResult

WorkerRole = Literal["generation", "training"]
M = TypeVar("M")


class WorkerCrash(errors.RunFailed):
    """A worker process ended, or was ended, without an answer.

    Args:
        reason: why it ended, as a clause: "was killed by signal 9 (SIGKILL)".
        log_path: the worker's log.
        log_tail: the last lines of that log since this process started.
        from_outside: what it was doing cannot have ended it.
        displaced: the machine under it is gone, or has no room for it; ``from_outside``, too.
    """

    def __init__(
        self,
        worker: str,
        reason: str,
        *,
        log_path: Path,
        log_tail: str,
        hint: str = "",
        from_outside: bool = False,
        displaced: bool = False,
    ) -> None:
        indented = "\n".join(f"  | {line}" for line in log_tail.splitlines())
        message = f"worker {worker} {reason}; its log is {log_path}"
        super().__init__(f"{message}, and ends with:\n{indented}" if indented else message, hint=hint)
        self.log_path = log_path
        self.log_tail = log_tail
        self.from_outside = from_outside
        self.displaced = displaced


class ProtocolError(Exception):
    """A line that is no message of this protocol."""


class WireRecord(Record):
    """Base of all messages: a metric may be infinite or not a number, and must arrive as such."""

    model_config = ConfigDict(ser_json_inf_nan="constants")


class Setup(WireRecord):
    """What the worker is: the plug-in class by dotted path and, for an engine, the JSON of its ``Settings``."""

    kind: Literal["setup"] = "setup"
    role: WorkerRole
    class_path: str
    settings: str = "{}"


class Load(WireRecord):
    """``probe``: tokens whose log-probabilities the answer brings, as evidence of the weights."""

    kind: Literal["load"] = "load"
    call: int
    checkpoint: Checkpoint
    probe: tuple[int, ...] = ()


class Sleep(WireRecord):
    """Give the device's memory back and keep the process; the next ``Load`` wakes it."""

    kind: Literal["sleep"] = "sleep"
    call: int


class Generate(WireRecord):
    kind: Literal["generate"] = "generate"
    call: int
    requests: tuple[Request, ...]


class Logprobs(WireRecord):
    """``sequences`` are (prompt ids, completion ids) pairs."""

    kind: Literal["logprobs"] = "logprobs"
    call: int
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Train(WireRecord):
    kind: Literal["train"] = "train"
    call: int
    job: TrainJob


class Exit(WireRecord):
    kind: Literal["exit"] = "exit"


class Hello(WireRecord):
    """The first line of every worker. Its form never changes, so that two versions can tell that they differ."""

    kind: Literal["hello"] = "hello"
    version: str
    python: str


class Ready(WireRecord):
    """Setup is done; ``seconds`` since the process started."""

    kind: Literal["ready"] = "ready"
    seconds: float


class Loaded(WireRecord):
    kind: Literal["loaded"] = "loaded"
    call: int
    seconds: float
    probe_logps: tuple[float, ...] = ()


class Slept(WireRecord):
    kind: Literal["slept"] = "slept"
    call: int


class Generated(WireRecord):
    kind: Literal["generated"] = "generated"
    call: int
    completions: tuple[Completion, ...]


class Scored(WireRecord):
    kind: Literal["scored"] = "scored"
    call: int
    logps: tuple[tuple[float, ...], ...]


class Event(WireRecord):
    """What a trainer reports on the way."""

    kind: Literal["event"] = "event"
    call: int
    event: dict[str, Any]


class Trained(WireRecord):
    kind: Literal["trained"] = "trained"
    call: int
    result: TrainResult


class Failed(WireRecord):
    """A ``ReasonrunError`` raised inside the worker, which lives on."""

    kind: Literal["failed"] = "failed"
    error: str  # name of the class in reasonrun.errors
    message: str
    hint: str = ""
    exit_code: int
    evidence: dict[str, int | float] = Field(default_factory=dict)


class NoRoom(WireRecord):
    """No machine has room for the worker. Written by what carries it to one, which then ends."""

    kind: Literal["no_room"] = "no_room"
    message: str
    hint: str = ""


class Heartbeat(WireRecord):
    """``num_done`` counts tokens (generation) or trainer events (training) since the process started."""

    kind: Literal["heartbeat"] = "heartbeat"
    num_done: int
    seconds: float


ToWorker = Setup | Load | Sleep | Generate | Logprobs | Train | Exit
FromWorker = Hello | Ready | Loaded | Slept | Generated | Scored | Event | Trained | Failed | NoRoom | Heartbeat
_TO_WORKER: TypeAdapter[ToWorker] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")])
_FROM_WORKER: TypeAdapter[FromWorker] = TypeAdapter(Annotated[FromWorker, Field(discriminator="kind")])


def encode(message: ToWorker | FromWorker) -> bytes:
    """One line. Text may hold lone surrogates, numbers may be infinite: both survive."""
    try:
        if _is_finite(message):
            return message.model_dump_json().encode() + b"\n"
    except PydanticSerializationError:
        # pydantic's encoder refuses lone surrogates; the standard one takes them, ten times slower.
        pass
    # Not escaped: two escapes in a row would be read as one character beyond the basic plane.
    return json.dumps(message.model_dump(), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _is_finite(message: ToWorker | FromWorker) -> bool:
    # A nested record has its own configuration, with which pydantic writes an infinite number as null.
    if not isinstance(message, Generated):
        return True
    return math.isfinite(sum(sum(completion.logps or ()) for completion in message.completions))


def decode_for_worker(line: bytes) -> ToWorker:
    """The message of a line that the supervisor wrote. Raises ProtocolError."""
    return _decode(_TO_WORKER, line)


def decode_from_worker(line: bytes) -> FromWorker:
    """The message of a line that a worker wrote. Raises ProtocolError, EnvironmentProblem on another version."""
    if line.startswith(b'{"kind":"hello"'):
        check_version(line)
    return _decode(_FROM_WORKER, line)


def _decode(adapter: TypeAdapter[M], line: bytes) -> M:
    try:
        return adapter.validate_json(line)
    except ValidationError:
        pass
    try:
        return adapter.validate_python(json.loads(line.decode("utf-8", "surrogatepass")))
    except ValueError as error:
        raise ProtocolError(f"no message of the worker protocol: {line[:200]!r}: {error}") from error


def check_version(line: bytes) -> None:
    """Raise EnvironmentProblem when the worker that wrote this hello runs another reasonrun than the supervisor."""
    hello = json.loads(line)
    if hello["version"] != reasonrun.__version__:
        raise errors.EnvironmentProblem(
            f"the worker's interpreter {hello['python']} has reasonrun {hello['version']}, "
            f"this one has {reasonrun.__version__}; they must be the same",
            hint=f"{hello['python']} -m pip install --no-deps reasonrun=={reasonrun.__version__}",
        )


def describe_error(error: errors.ReasonrunError) -> Failed:
    """The message that carries ``error`` to the supervisor: its nearest class that both sides know."""
    known = next(cls for cls in type(error).__mro__ if getattr(errors, cls.__name__, None) is cls)
    return Failed(
        error=known.__name__,
        message=error.message,
        hint=error.hint,
        exit_code=error.exit_code,
        evidence=error.evidence if isinstance(error, errors.Finding) else {},
    )


def rebuild_error(failed: Failed) -> errors.ReasonrunError:
    """The error that was raised inside the worker: same class, message, hint, evidence and exit code."""
    cls: type[errors.ReasonrunError] = getattr(errors, failed.error, errors.RunFailed)
    if issubclass(cls, errors.Finding):
        return cls(failed.message, evidence=failed.evidence, hint=failed.hint)
    if issubclass(cls, errors.Stopped):
        return cls(failed.message, exit_code=failed.exit_code, hint=failed.hint)
    return cls(failed.message, hint=failed.hint)
