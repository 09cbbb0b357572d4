"""What a worker does: takes calls from the supervisor one at a time, answers them, and shows that it is alive."""

from __future__ import annotations

import faulthandler
import importlib
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import reasonrun
from reasonrun.contracts import Engine, Trainer
from reasonrun.errors import EnvironmentProblem, ReasonrunError, RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.probing import probe_pair
from reasonrun.workers import protocol

HEARTBEAT_SECONDS = 1.0
_CRASHED = 70  # sysexits.h EX_SOFTWARE


class Channel:
    """The worker's end of the two pipes. Takes them off file descriptors 0 and 1, which libraries write to."""

    def __init__(self) -> None:
        self._input = os.fdopen(os.dup(0), "rb")
        self._output_fd = os.dup(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self.inbox: queue.SimpleQueue[protocol.ToWorker] = queue.SimpleQueue()

    def send(self, message: protocol.FromWorker) -> None:
        """Write one message; blocks while the supervisor does not read."""
        line = memoryview(protocol.encode(message))
        with self._lock:
            while line:
                line = line[os.write(self._output_fd, line) :]

    def watch(self) -> None:
        """Put what the supervisor writes into ``inbox``, from a thread; when it has gone, end the whole group."""
        threading.Thread(target=self._read, name="supervisor-watch", daemon=True).start()

    def _read(self) -> None:
        try:
            for line in self._input:
                self.inbox.put(protocol.decode_for_worker(line))
        except protocol.ProtocolError:
            traceback.print_exc()
            os._exit(_CRASHED)
        os.killpg(os.getpgrp(), signal.SIGKILL)


class Progress:
    """Counts what the plug-in has made. Heartbeats carry the count; the supervisor acts when it stands still."""

    def __init__(self) -> None:
        self.num_done = 0
        self.plugin: Any = None

    def total(self) -> int:
        """Tokens or events so far; an engine that counts ``num_tokens_made`` itself shows progress inside a batch."""
        return self.num_done + int(getattr(self.plugin, "num_tokens_made", 0))


def serve() -> NoReturn:
    """Serve until ``Exit`` or until the supervisor has gone. Never returns."""
    started = time.monotonic()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    channel = Channel()
    channel.send(protocol.Hello(version=reasonrun.__version__, python=sys.executable))
    channel.watch()
    progress = Progress()
    beat = threading.Thread(target=_beat, args=(channel, progress, started), name="heartbeat", daemon=True)
    beat.start()
    server = _Server(channel, progress, started)
    code = 0
    try:
        while server.answer(channel.inbox.get()):
            pass
    except BaseException:  # recording boundary: the log is what the supervisor shows
        traceback.print_exc()
        code = _CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a library's exit handler or non-daemon thread may wait forever.
    os._exit(code)


def _beat(channel: Channel, progress: Progress, started: float) -> None:
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        channel.send(protocol.Heartbeat(num_done=progress.total(), seconds=time.monotonic() - started))


class _Server:
    """Dispatches messages to the plug-in."""

    def __init__(self, channel: Channel, progress: Progress, started: float) -> None:
        self._channel, self._progress, self._started = channel, progress, started
        self._engine: Engine | None = None
        self._trainer: Trainer | None = None

    def answer(self, message: protocol.ToWorker) -> bool:
        """Carry one message out; False after ``Exit``."""
        try:
            return self._answer(message)
        except ReasonrunError as error:
            self._channel.send(protocol.describe_error(error))
            return True

    def _answer(self, message: protocol.ToWorker) -> bool:
        match message:
            case protocol.Setup():
                self._set_up(message)
            case protocol.Exit():
                if self._engine is not None:
                    self._engine.close()
                return False
            case protocol.Train():
                self._train(message)
            case protocol.Load() | protocol.Sleep() | protocol.Generate() | protocol.Logprobs():
                self._ask_engine(message)
        return True

    def _set_up(self, setup: protocol.Setup) -> None:
        cls = find_class(setup.class_path)
        if setup.role == "training":
            self._trainer = self._progress.plugin = cls()
        else:
            self._engine = self._progress.plugin = cls(cls.Settings.model_validate_json(setup.settings))
        self._channel.send(protocol.Ready(seconds=time.monotonic() - self._started))

    def _ask_engine(self, message: protocol.Load | protocol.Sleep | protocol.Generate | protocol.Logprobs) -> None:
        if self._engine is None:
            raise RunFailed(f"a worker was asked to {message.kind} before it had an engine")
        match message:
            case protocol.Load():
                began = time.monotonic()
                self._engine.load(message.checkpoint)
                probed = _probed(self._engine, message.probe)
                seconds = time.monotonic() - began
                self._channel.send(protocol.Loaded(call=message.call, seconds=seconds, probe_logps=probed))
            case protocol.Sleep():
                self._engine.sleep()
                self._channel.send(protocol.Slept(call=message.call))
            case protocol.Generate():
                completions = self._generate(self._engine, message.requests)
                self._channel.send(protocol.Generated(call=message.call, completions=tuple(completions)))
            case protocol.Logprobs():
                logps = self._engine.logprobs(message.sequences)
                rows = tuple(tuple(float(logp) for logp in row) for row in logps)
                self._progress.num_done += sum(len(row) for row in rows)
                self._channel.send(protocol.Scored(call=message.call, logps=rows))

    def _generate(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        completions = []
        for completion in engine.generate(requests):
            completions.append(completion)
            self._progress.num_done += len(completion.token_ids) + 1
        return completions

    def _train(self, message: protocol.Train) -> None:
        if self._trainer is None:
            raise RunFailed("a worker was asked to train before it had a trainer")

        def report(event: dict[str, Any]) -> None:
            self._progress.num_done += 1
            self._channel.send(protocol.Event(call=message.call, event=event))

        result = self._trainer.train(message.job, report)
        self._channel.send(protocol.Trained(call=message.call, result=result))


def _probed(engine: Engine, probe: Sequence[int]) -> tuple[float, ...]:
    """The log-probabilities of the probe; none when nobody asks, or from an engine that cannot score."""
    if not probe:
        return ()
    try:
        return tuple(float(logp) for logp in engine.logprobs([probe_pair(probe)])[0])
    except NotImplementedError:
        return ()


def find_class(class_path: str) -> Any:
    """The class behind a dotted path. Raises EnvironmentProblem when this interpreter cannot import it."""
    module_name, _, class_name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise EnvironmentProblem(
            f"the worker's interpreter {sys.executable} cannot load {class_path}: {error}",
            hint="install what is missing there, or name another interpreter with launcher.python",
        ) from error
