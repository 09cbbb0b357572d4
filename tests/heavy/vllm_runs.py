"""Pools of workers that test vLLM against transformers, and engines with planted faults."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reasonrun.engines.hf import HuggingFace
from reasonrun.engines.vllm import VLLM
from reasonrun.generation import Completion, Request
from reasonrun.models import resolve, weights_digest
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Checkpoint, Sampling
from reasonrun.rendering import Renderer
from reasonrun.tasks.arith import Arith
from reasonrun.workers.pool import GenerationPool

TINY = resolve(ModelSettings(name="tiny"))
RENDERER = Renderer.load(TINY.path)
TASK = Arith(Arith.Settings(num_train=1, num_dev=500, num_test=1))
Rows = dict[tuple[str, int], Completion]


class Stale(VLLM):
    """Keeps the weights that it has, whatever it is told to load."""

    def _reload(self, **weights: Any) -> None:
        pass


def make_pool(engine: type, folder: Path, started: list[int] | None = None, **settings: Any) -> GenerationPool:
    """One worker with this engine; vLLM's has the interpreter that a run would choose."""
    if issubclass(engine, VLLM):
        settings = {"enforce_eager": True, "cpu_cache_gib": 1, **settings}
    chosen = engine.Settings(**settings)  # type: ignore[attr-defined]
    groups = [] if started is None else started
    return GenerationPool(
        f"{engine.__module__}.{engine.__qualname__}",
        chosen.model_dump_json(),
        num_workers=1,
        attempt_dir=folder,
        record_worker=lambda pid, pgid: groups.append(pgid),
        python=getattr(chosen, "interpreter", None),
        name=engine.__name__,
    )


def ask(num_problems: int, *, n: int = 1, prompt_tail: Sequence[int] = (), **sampling: Any) -> list[Request]:
    """One request for each of the first ``num_problems`` of ``arith``."""
    parameters = Sampling(**{"max_new_tokens": 64, **sampling})
    return [
        Request(
            key=problem.id,
            problem_id=problem.id,
            prompt_ids=(*RENDERER.render(TASK.messages(problem, "plain")), *prompt_tail),
            n=n,
            seed=1000 + number,
            sampling=parameters,
        )
        for number, problem in enumerate(TASK.problems("dev")[:num_problems])
    ]


def rows_of(pool: GenerationPool, requests: Sequence[Request]) -> Rows:
    """Completions by request and sample index."""
    return {(row.request, row.index): row for _, unit in pool.generate([(0, requests)]) for row in unit}


def correct(rows: Rows) -> list[bool]:
    """Verdicts of the task's own grader, in the order of the problems."""
    grader = TASK.grader()
    problems = TASK.problems("dev")
    found = [(p, rows[p.id, 0]) for p in problems if (p.id, 0) in rows]
    return [grader.grade(p, row.text, truncated=row.finish_reason == "length").value == 1.0 for p, row in found]


def perturbed(folder: Path, scale: float, *, tied: bool = True) -> Checkpoint:
    """``tiny`` with other weights, and beside them what transformers computes from those.

    Not ``tied``: the output layer has weights of its own, which a server on the CPU can reload.
    """
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    from reasonrun.trainers.execution import _probe_logps
    from reasonrun.trainers.folders import write_model

    model = AutoModelForCausalLM.from_pretrained(TINY.path, dtype="auto")
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + scale * torch.randn_like(parameter))
    shutil.rmtree(folder, ignore_errors=True)
    write_model(model, Path(TINY.path), folder, _probe_logps(model, model.dtype))
    (folder / "config.json").write_text(model.config.to_json_string())
    return TINY.model_copy(update={"path": str(folder), "weights": weights_digest(folder), "step": folder.name})


@contextmanager
def serving(model: Checkpoint, folder: Path) -> Iterator[str]:
    """A vLLM server with this model; its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(VLLM.Settings().interpreter), "-m", "vllm.entrypoints.openai.api_server", "--model", model.path),
        *("--port", str(port), "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32"),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
    ]
    env = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[
                    -3000:
                ]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


__all__ = [
    "RENDERER",
    "TASK",
    "TINY",
    "VLLM",
    "HuggingFace",
    "Stale",
    "ask",
    "correct",
    "make_pool",
    "perturbed",
    "rows_of",
    "serving",
]
