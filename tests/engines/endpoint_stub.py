"""A server on this machine that speaks the chat-completions format: judges arithmetic, teaches it, or fails as told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEP = re.compile(r"^Step (\d+): (\d+) ([*+-]) (\d+) = (\d+)$", re.MULTILINE)


def is_right(step: re.Match[str]) -> bool:
    left, right, result = int(step[2]), int(step[4]), int(step[5])
    value = {"*": left * right, "+": left + right, "-": left - right}[step[3]]
    return value % 100 == result


def verdict(prompt: str) -> str:
    """What a judge says that recomputes every step of the last block."""
    said = []
    for step in STEP.finditer(prompt.rpartition("### Solution to check")[2]):
        said.append(f"Step {step[1]}: {'correct' if is_right(step) else 'incorrect'}")
        if not is_right(step):
            break
    return "I recomputed each step.\n\n### Final decision\n" + "; ".join(said)


@dataclass
class Reply:
    """One answer: a chat completion with ``content``, or ``body`` as it is."""

    content: str | None = None
    status: int = 200
    finish_reason: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    usage: bool = True
    seconds: float = 0.0

    def data(self, model: str) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.content or "no", "type": "x", "code": None}}).encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.content},
            "finish_reason": self.finish_reason,
        }
        answer: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
        answer["choices"] = [choice]
        if self.usage:
            answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        return json.dumps(answer).encode()


class Stub:
    """Answers with ``script`` while it lasts, then with what ``reply`` makes of a request's body."""

    def __init__(self, reply: Any = None) -> None:
        self.script: deque[Reply] = deque()
        self.reply = reply or (lambda body: Reply(verdict(body["messages"][-1]["content"])))
        self.asked: list[dict[str, Any]] = []  # bodies, in the order of arrival
        self.answered: list[dict[str, Any]] = []  # those that got a completion
        self.keys: set[str] = set()
        self.num_now = self.most_at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    def take(self, body: dict[str, Any], key: str) -> Reply:
        with self._lock:
            self.asked.append(body)
            self.keys.add(key)
            self.num_now += 1
            self.most_at_once = max(self.most_at_once, self.num_now)
            reply = self.script.popleft() if self.script else self.reply(body)
        time.sleep(reply.seconds)
        with self._lock:
            self.num_now -= 1
            if reply.status == 200 and reply.body is None:
                self.answered.append(body)
        return reply


@contextmanager
def serving(stub: Stub):
    """The stub on a free port; ``stub.url`` is its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = stub.take(body, self.headers.get("authorization", "").removeprefix("Bearer "))
            data = reply.data(body["model"]) if self.path == "/v1/chat/completions" else b"{}"
            self.send_response(reply.status if self.path == "/v1/chat/completions" else 404)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # a client that went away
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
