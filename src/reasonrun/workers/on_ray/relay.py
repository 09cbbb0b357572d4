"""Carries one worker into a Ray cluster: ``python -P -m reasonrun.workers.on_ray.relay OPTIONS COMMAND…``.

It runs beside the supervisor, which sees it as the worker itself. It finds a place in the cluster, has an actor there
start COMMAND, and connects its own standard streams to the command's. When it ends, so do the actor and the worker:
they belong to its Ray job. It ends with the worker's exit code, or with NODE_LOST.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import reasonrun
from reasonrun.errors import EnvironmentProblem, ReasonrunError, RunFailed
from reasonrun.settings import Settings
from reasonrun.workers import protocol
from reasonrun.workers.main import die_with_parent
from reasonrun.workers.on_ray import actor as actor_module
from reasonrun.workers.on_ray import cluster, node_files
from reasonrun.workers.on_ray.lines import Lines
from reasonrun.workers.on_ray.shipping import SharedPath, Shipping
from reasonrun.workers.spawning import NODE_LOST

_READ_BYTES = 4 << 20
_POLL_SECONDS = 10.0
_START_SECONDS = 120.0  # for an actor whose place is reserved
_CRASHED = 70  # sysexits.h EX_SOFTWARE
_PASSED_ON = re.compile(
    r"(PYTHONPATH|REASONRUN_|OMP_|MKL_|HF_|TRANSFORMERS_|TOKENIZERS_|VLLM_|NCCL_|TORCH|PYTORCH_|CUBLAS_|DO_NOT_TRACK)"
)
_SECRET = re.compile(r"TOKEN$|KEY|SECRET|PASSWORD|CREDENTIAL")


class Options(Settings):
    """What the launcher tells the relay."""

    address: str
    place: cluster.Place
    env: dict[str, str]
    shared_path: SharedPath
    cache_dir: str
    attempt_dir: str


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a worker on another node gets: settings of libraries, no secrets."""
    return {name: value for name, value in environ.items() if _PASSED_ON.match(name) and not _SECRET.search(name)}


class _Node:
    """Method calls of the actor."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    def ask(self, method: str, *arguments: Any) -> Any:
        return getattr(self._handle, method).remote(*arguments)

    def wait(self, asked: Any, seconds: float | None = None) -> Any:
        return self._ray.get(asked, timeout=seconds)

    def call(self, method: str, *arguments: Any) -> Any:
        return self.wait(self.ask(method, *arguments))


class Relay:
    """The life of one worker. ``output_fd`` is the supervisor's end, which libraries must not write to."""

    def __init__(self, options: Options, command: list[str], output_fd: int) -> None:
        self._options, self._command, self._output_fd = options, command, output_fd
        self._outcome: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._node: _Node | None = None
        threading.Thread(target=self._watch_signals, daemon=True).start()

    def run(self) -> int:
        """The exit code. Raises ReasonrunError."""
        ray = cluster.connect(self._options.address)
        group = cluster.find_place(ray, self._options.place)
        node, facts = self._start_actor(ray, group)
        options = self._options
        shipping = Shipping(node, options.shared_path, options.cache_dir, Path(options.attempt_dir))
        self._node = node
        if trouble := node.call("start", self._command, passed_on(os.environ) | options.env, os.getcwd()):
            raise EnvironmentProblem(trouble, hint="name a Python of the nodes with launcher.python")
        self._in_thread(lambda: self._move_input(node, shipping))
        self._in_thread(lambda: self._move_output(node, shipping))
        outcome = self._outcome.get()
        if isinstance(outcome, int):
            return outcome
        return self._explain(ray, facts, outcome)

    def _start_actor(self, ray: Any, group: Any) -> tuple[_Node, dict[str, Any]]:
        from ray import cloudpickle
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        for module in (actor_module, node_files):
            cloudpickle.register_pickle_by_value(module)
        resources = dict(self._options.place.resources)
        handle = (
            ray.remote(actor_module.RemoteWorker)
            .options(
                num_cpus=resources.pop("CPU", 0),
                num_gpus=resources.pop("GPU", 0),
                resources=resources,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            )
            .remote()
        )
        node = _Node(ray, handle)
        try:
            facts = node.wait(node.ask("describe"), _START_SECONDS)
        except ray.exceptions.RayError as error:
            # Between the reservation and now the node may have gone; another one is looked for by whoever starts us again.
            _say(f"the actor did not start: {error}")
            raise SystemExit(NODE_LOST) from None
        _say(f"{self._options.place.what} runs on {facts['host']}, node {facts['node']}")
        return node, cluster.node_of(ray, facts["node"])

    def _explain(self, ray: Any, node: dict[str, Any], error: BaseException) -> int:
        if isinstance(error, ray.exceptions.RayTaskError):
            cause = error.cause
            raise EnvironmentProblem(
                f"{node['NodeManagerHostname']}, a node of the Ray cluster: {type(cause).__name__}: {cause}",
                hint="launcher.cache_dir names another folder on the nodes" if isinstance(cause, OSError) else "",
            ) from None
        if not isinstance(error, ray.exceptions.RayError):
            raise error
        _say(str(error))
        if cluster.why_gone(ray, node, error) == "node lost":
            _say(f"the node {node['NodeManagerHostname']} ({node['NodeID']}) is gone")
            return NODE_LOST
        raise RunFailed(
            f"Ray ended {self._options.place.what}: {' '.join(str(error).split())[:400]}",
            hint="if its memory monitor did, ask for fewer workers on a node, or lower the engine's batch size",
        )

    def _in_thread(self, work: Callable[[], int | None]) -> None:
        def run() -> None:
            try:
                if (code := work()) is not None:
                    self._outcome.put(code)
            except BaseException as error:  # recording boundary: the main thread says what it means
                self._outcome.put(error)

        threading.Thread(target=run, daemon=True).start()

    def _move_input(self, node: _Node, shipping: Shipping) -> int:
        lines = Lines(b"load", b"train")
        while chunk := os.read(0, _READ_BYTES):
            pieces = [shipping.outgoing(piece) if wanted else piece for piece, wanted in lines.feed(chunk)]
            node.call("write", b"".join(pieces))
        return 0  # the supervisor has gone

    def _move_output(self, node: _Node, shipping: Shipping) -> int:
        lines = Lines(b"event", b"trained", b"failed")
        while True:
            out, err, code = node.call("read", _POLL_SECONDS)
            _write(2, err)
            for piece, wanted in lines.feed(out):
                _write(self._output_fd, shipping.incoming(piece) if wanted else piece)
            if code is not None:
                return int(code)

    def _watch_signals(self) -> None:
        while signal.sigwait({signal.SIGUSR1}):
            if self._node is None:
                faulthandler.dump_traceback(all_threads=True)
            else:
                self._node.ask("send_signal", int(signal.SIGUSR1))


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _say(text: str) -> None:
    print(f"reasonrun: {text}", file=sys.stderr, flush=True)


def _tell(output_fd: int, message: protocol.FromWorker) -> None:
    hello = protocol.Hello(version=reasonrun.__version__, python=sys.executable)
    _write(output_fd, protocol.encode(hello) + protocol.encode(message))


def main() -> NoReturn:
    die_with_parent(signal.SIGKILL, os.getppid(), lambda: os._exit(0))
    # Before any thread starts: all of them inherit it, and only the one that waits for the signal takes it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        code = Relay(Options.model_validate_json(sys.argv[1]), sys.argv[2:], output_fd).run()
    except cluster.NoRoomError as error:
        _tell(output_fd, protocol.NoRoom(message=error.message, hint=error.hint))
        code = error.exit_code
    except ReasonrunError as error:
        _tell(output_fd, protocol.describe_error(error))
        code = error.exit_code
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # recording boundary: the log is what the supervisor shows
        traceback.print_exc()
        code = _CRASHED
    sys.stderr.flush()
    # Not sys.exit: Ray's exit handlers wait for a cluster that may be gone. That we are gone is what ends the actor.
    os._exit(code)


if __name__ == "__main__":
    main()
