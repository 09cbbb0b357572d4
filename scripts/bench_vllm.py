"""vLLM through the product and alone, on the same prompts with the same settings of the process; one JSON line.

python scripts/bench_vllm.py throughput --model smollm2   # P1: tokens/s of lab.sample against vllm.LLM.generate
python scripts/bench_vllm.py turnaround --model smollm2   # P8: new weights in place against a new engine
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from reasonrun.cli.progress import SilentProgress
from reasonrun.engines.vllm import VLLM
from reasonrun.lab import Lab
from reasonrun.ledger.run_dir import RunDir
from reasonrun.model_folder import ModelFolder
from reasonrun.models import resolve
from reasonrun.probing import probe_ids
from reasonrun.recipe import load
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Checkpoint, Sampling
from reasonrun.running import RunOptions, inputs, make_context
from reasonrun.workers.pool import GenerationPool

# What the engine itself sets on the CPU, so that both sides run vLLM alike.
ALONE = """
import json, os, sys, time
given = json.loads(sys.stdin.readline())
os.environ.update(given["env"])
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
llm = LLM(**given["arguments"])
prompts = [TokensPrompt(prompt_token_ids=ids) for ids in given["prompts"]]
parameters = [SamplingParams(temperature=1.0, max_tokens=given["max_new_tokens"], seed=seed, detokenize=False)
              for seed in range(len(prompts))]
print("ready", file=sys.stderr, flush=True)
os.write(given["answer_fd"], b"ready\\n")
for line in sys.stdin:
    begin = time.perf_counter()
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - begin
    found = {"tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "seconds": seconds}
    os.write(given["answer_fd"], (json.dumps(found) + "\\n").encode())
    llm.reset_prefix_cache()
"""


class Alone:
    """``vllm.LLM`` in a process of its own."""

    def __init__(self, engine: VLLM.Settings, model: Checkpoint, prompts: list[list[int]], max_new_tokens: int) -> None:
        read_fd, write_fd = os.pipe()
        self.process = subprocess.Popen(
            [engine.interpreter or sys.executable, "-c", ALONE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_fd,),
            text=True,
        )
        self.answers = os.fdopen(read_fd)
        arguments = {
            "model": model.path,
            "dtype": "float32" if engine.dtype == "auto" else engine.dtype,
            "enforce_eager": engine.enforce_eager,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 8192,
            "disable_log_stats": True,
        }
        env = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": f"{engine.cpu_cache_gib:g}",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        self._ask(
            {
                "arguments": arguments,
                "env": env,
                "prompts": prompts,
                "max_new_tokens": max_new_tokens,
                "answer_fd": write_fd,
            }
        )
        assert self.answers.readline() == "ready\n"

    def _ask(self, given: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()

    def generate(self) -> dict[str, float]:
        self._ask("go")
        return dict(json.loads(self.answers.readline()))


def throughput(model: str, num_prompts: int, max_new_tokens: int, repeats: int) -> dict[str, Any]:
    """P1: by turns, so that both meet the same machine; the first of each warms its engine up and is left out."""
    recipe = load(
        "eval",
        [
            "task.name=arith",
            f"model={model}",
            "engine=vllm",
            "engine.enforce_eager=true",
            f"task.num_dev={num_prompts}",
        ],
    )
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(directory=Path(folder))
        with RunDir.open(
            Path(folder) / "run", identity={"recipe": recipe.resolved}, command="bench", attempt={}
        ) as run_dir:
            context = make_context(recipe, run_dir, SilentProgress(), options, *inputs(recipe))
            with closing(context.host):
                lab = Lab(context)
                alone: Alone | None = None
                problems = lab.problems("dev")
                for number in range(repeats + 1):
                    begin = time.perf_counter()
                    sampled = lab.sample(
                        lab.base,
                        problems,
                        n=4,
                        sampling=Sampling(temperature=1.0, max_new_tokens=max_new_tokens),
                        name=f"sample-{number}",
                    )
                    seconds = time.perf_counter() - begin
                    rows = list(sampled)
                    if alone is None:
                        alone = Alone(recipe.engine, lab.base, [list(row.prompt_ids) for row in rows], max_new_tokens)
                        alone.generate()
                        continue
                    tokens = sum(len(row.completion_ids) for row in rows)
                    theirs = alone.generate()
                    found.append(
                        {"lab": tokens / seconds, "alone": theirs["tokens"] / theirs["seconds"], "tokens": tokens}
                    )
                assert alone is not None
                alone.process.kill()
    ratios = [row["lab"] / row["alone"] for row in found]
    rounded = [{key: round(value, 1) for key, value in row.items()} for row in found]
    return {"model": model, "ratio": round(statistics.median(ratios), 3), "tokens_per_second": rounded}


def turnaround(model: str, repeats: int) -> dict[str, Any]:
    """P8: seconds from the order to load other weights until they are proved, in place and in a new engine."""
    policy = resolve(ModelSettings(name=model))
    probe = probe_ids(int(ModelFolder(Path(policy.path)).config["vocab_size"]))
    engine = VLLM.Settings(enforce_eager=True)

    def timed(pool: GenerationPool, checkpoint: Checkpoint) -> float:
        begin = time.perf_counter()
        pool.load(checkpoint, probe)
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as folder:
        other = policy.model_copy(update={"path": f"{folder}/other", "weights": "other"})
        shutil.copytree(policy.path, other.path)
        restarts, reloads = [], []
        for _ in range(repeats):
            pool = GenerationPool(
                "reasonrun.engines.vllm.VLLM",
                engine.model_dump_json(),
                num_workers=1,
                attempt_dir=Path(folder),
                record_worker=lambda pid, pgid: None,
                python=engine.interpreter,
            )
            with pool:
                restarts.append(timed(pool, policy))
                reloads += [timed(pool, other), timed(pool, policy)]
    restart, reload = statistics.median(restarts), statistics.median(reloads)
    return {
        "model": model,
        "ratio": round(restart / reload, 1),
        "restart_seconds": [round(value, 2) for value in restarts],
        "reload_seconds": [round(value, 2) for value in reloads],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "turnaround"))
    parser.add_argument("--model", default="smollm2", choices=("tiny", "smollm2"))
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.what == "throughput":
        print(json.dumps(throughput(args.model, args.num_prompts, args.max_new_tokens, args.repeats)))
    else:
        print(json.dumps(turnaround(args.model, args.repeats)))


if __name__ == "__main__":
    main()
