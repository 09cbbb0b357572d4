"""What runs on a node of the cluster: a worker process whose streams are moved by method calls, and its files.

Ray sends this module and ``node_files`` by value, and they import nothing else but the standard library: Ray's own
Python on the node need not have reasonrun.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from reasonrun.workers.on_ray.node_files import NodeFiles

_READ_BYTES = 1 << 20
_ANSWER_BYTES = 32 << 20
_HELD_BYTES = 64 << 20  # beyond it the worker waits until the relay has taken some
_DRAIN_SECONDS = 2.0  # for what a dead worker's children still write


class RemoteWorker(NodeFiles):
    """One process. The relay has one ``read`` and one ``write`` under way at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._out, self._err = bytearray(), bytearray()
        self._code: int | None = None
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error = ""

    def describe(self) -> dict[str, Any]:
        """Where this is."""
        import ray

        return {"host": socket.gethostname(), "node": ray.get_runtime_context().get_node_id()}

    def start(self, command: Sequence[str], env: Mapping[str, str], cwd: str) -> str:
        """Start the command; what is wrong with it, or nothing. An interpreter that is not here is replaced by Ray's."""
        program, *arguments = command
        if not os.access(program, os.X_OK):
            program = sys.executable
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | dict(env)
        if inherited := os.environ.get("PYTHONPATH"):
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), inherited]))
        folder = cwd if os.path.isdir(cwd) else None
        # The kernel ends the worker with the thread that started it, so that one stays.
        run = threading.Thread(target=self._run, args=([program, *arguments], environment, folder), daemon=True)
        run.start()
        self._started.wait()
        return self._error

    def _run(self, command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError as error:
            self._error = f"{command[0]} cannot be started on {socket.gethostname()}: {error.strerror}"
            return
        finally:
            self._started.set()
        process = self._process
        assert process.stdout is not None and process.stderr is not None
        pumps = [
            threading.Thread(target=self._pump, args=(stream.fileno(), held), daemon=True)
            for stream, held in ((process.stdout, self._out), (process.stderr, self._err))
        ]
        for pump in pumps:
            pump.start()
        code = process.wait()
        for pump in pumps:
            pump.join(_DRAIN_SECONDS)
        with self._changed:
            self._code = code if code >= 0 else 128 - code
            self._changed.notify_all()

    def _pump(self, fd: int, held: bytearray) -> None:
        while chunk := os.read(fd, _READ_BYTES):
            with self._changed:
                self._changed.wait_for(lambda: len(held) < _HELD_BYTES)
                held.extend(chunk)
                self._changed.notify_all()

    def read(self, seconds: float) -> tuple[bytes, bytes, int | None]:
        """What the worker has written to its two streams, as soon as there is any, and its exit code at the very end."""
        with self._changed:
            self._changed.wait_for(lambda: self._out or self._err or self._code is not None, seconds)
            taken = []
            for held in (self._out, self._err):
                taken.append(bytes(held[:_ANSWER_BYTES]))
                del held[:_ANSWER_BYTES]
            self._changed.notify_all()
            at_end = not (self._out or self._err)
            return taken[0], taken[1], self._code if at_end else None

    def write(self, data: bytes) -> None:
        """Give the worker bytes to read; waits while its pipe is full. A worker that is gone reads nothing."""
        assert self._process is not None and self._process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._process.stdin.fileno(), view) :]
        except BrokenPipeError:
            pass

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the worker's first process."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.Signals(number))
