"""Engine ``openai`` against a server on this machine that speaks vLLM's dialect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from reasonrun.engines.openai import Served
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed, Stopped
from reasonrun.generation import Request
from reasonrun.models import resolve
from reasonrun.randomness import row_seed
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Sampling
from reasonrun.rendering import Renderer

TINY = resolve(ModelSettings(name="tiny"))
RENDERER = Renderer.load(TINY.path)
IDS = RENDERER.encode("Step 1: 3 + 4 = 7")


class Server:
    """Answers every prompt with ``IDS``, or as ``odd`` says; keeps what it was asked."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.status = 200
        self.odd: dict[str, Any] = {}
        self.url = ""

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.posts.append((path, body))
        if path != "/v1/completions":
            return {}
        ids = list(IDS)[: body["max_tokens"]]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "finish_reason": "stop",
            "token_ids": ids,
            "stop_reason": None,
        }
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "token_logprobs": [-0.5] * len(ids),
                "tokens": [],
                "top_logprobs": [],
                "text_offset": [],
            }
        if body.get("prompt_logprobs") is not None:
            scored = [{str(token): {"logprob": -token / 10}} for token in body["prompt"][1:]]
            choice["prompt_logprobs"] = [None, *scored]
        return {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice | self.odd]}


@pytest.fixture
def server() -> Iterator[Server]:
    known = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(known.status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            models = [{"id": "m", "object": "model", "created": 0, "owned_by": "x", "max_model_len": 100}]
            self.reply({"object": "list", "data": models})

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            self.reply(known.answer(self.path, json.loads(self.rfile.read(length) or b"{}")))

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=lambda: http.serve_forever(poll_interval=0.01), daemon=True).start()
    known.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield known
    http.shutdown()
    http.server_close()


def engine_for(server: Server, **settings: Any) -> Served:
    return Served(Served.Settings(url=server.url, max_retries=0, **settings))


def ask(n: int = 1, prompt: tuple[int, ...] = (5, 6, 7), **sampling: Any) -> Request:
    parameters = Sampling(**{"max_new_tokens": 20, **sampling})
    return Request(key="r", problem_id="p", prompt_ids=prompt, n=n, seed=11, sampling=parameters)


def test_ids_go_in_and_come_out_with_a_seed_for_every_sample(server: Server) -> None:
    engine = engine_for(server)
    engine.load(TINY)
    rows = list(engine.generate([ask(3, temperature=0.7, top_k=5, stop=("+",), logprobs=True)]))
    assert sorted(row.index for row in rows) == [0, 1, 2] and {row.token_ids for row in rows} == {tuple(IDS)}
    assert rows[0].logps == (-0.5,) * len(IDS) and rows[0].text == RENDERER.decode(IDS)
    bodies = [body for _, body in server.posts]
    assert {body["seed"] for body in bodies} == {row_seed(11, i) >> 1 for i in range(3)}
    neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "stop_token_ids": list(RENDERER.eos_ids)}
    assert all(neutral.items() <= body.items() for body in bodies)
    told = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0.7, "top_k": 5, "stop": ["+"], "model": "m"}
    assert all(told.items() <= body.items() for body in bodies)
    assert engine.num_tokens_made == 3 * len(IDS)


def test_a_stop_string_and_the_limit_end_an_answer(server: Server) -> None:
    engine = engine_for(server)
    engine.load(TINY)
    server.odd = {"stop_reason": "+"}
    assert [(row.finish_reason, row.text) for row in engine.generate([ask(stop=("+",))])] == [
        ("stop_string", "Step 1: 3 ")
    ]
    server.odd = {"finish_reason": "length"}
    assert next(engine.generate([ask(max_new_tokens=2)])).finish_reason == "length"


def test_given_tokens_are_scored(server: Server) -> None:
    engine = engine_for(server)
    engine.load(TINY)
    assert engine.logprobs([((5,), (6, 7)), ((5,), ()), ((5, 9), (8,))]) == [[-0.6, -0.7], [], [-0.8]]


def test_trained_weights_reach_a_server_that_may_reload_only(server: Server) -> None:
    trained = TINY.model_copy(update={"weights": "w2", "step": "round-001/train"})
    engine = engine_for(server)
    engine.load(TINY)
    with pytest.raises(RecipeError, match=r"(?s)started with, and round-001/train has others.*engine\.reload=true"):
        engine.load(trained)
    with pytest.raises(RecipeError, match="started with"):  # a run that goes on in round 2
        engine_for(server).load(trained)
    engine = engine_for(server, reload=True)
    engine.load(TINY)
    engine.load(trained)
    engine.load(trained)
    body = {"method": "reload_weights", "kwargs": {"weights_path": TINY.path}}
    assert server.posts == [("/collective_rpc", body), ("/reset_prefix_cache", {})] * 2


def test_what_a_server_cannot_do_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblem, match="has no model 'x'; it has: m"):
        engine_for(server, model="x").load(TINY)
    with pytest.raises(EnvironmentProblem, match="MY_KEY is not set"):
        engine_for(server, api_key_env="MY_KEY").load(TINY)
    with pytest.raises(EnvironmentProblem, match=r"(?s)cannot be reached.*vllm serve"):
        Served(Served.Settings(url="http://127.0.0.1:9/v1", max_retries=0)).load(TINY)
    engine = engine_for(server)
    engine.load(TINY)
    with pytest.raises(RecipeError, match="exceed the 100 tokens"):
        list(engine.generate([ask(prompt=tuple(range(90)))]))
    with pytest.raises(ValueError, match="at least one token"):
        list(engine.generate([ask(prompt=())]))
    server.odd = {"token_ids": None, "prompt_logprobs": None}
    with pytest.raises(EnvironmentProblem, match=r"(?s)words, without their token ids.*vllm serve"):
        list(engine.generate([ask()]))
    with pytest.raises(EnvironmentProblem, match="does not score"):
        engine.logprobs([((5,), (6,))])
    server.status = 503
    with pytest.raises(Stopped, match="gave no answer, 1 times"):
        list(engine.generate([ask()]))
    server.status = 400
    with pytest.raises(RunFailed, match="refuses a request"):
        list(engine.generate([ask()]))
    monkeypatch.setenv("MY_KEY", "sk-canary-1")
    server.status = 401
    with pytest.raises(EnvironmentProblem, match="refuses the key") as refused:
        engine_for(server, api_key_env="MY_KEY").load(TINY)
    assert "canary" not in str(refused.value)
    with pytest.raises(RecipeError, match="cannot take single tensors"):
        engine.update([])


def test_asked_before_a_model_is_there(server: Server) -> None:
    with pytest.raises(RunFailed, match=r"before load\(\)"):
        engine_for(server).logprobs([((5,), (6,))])
