"""The vLLM engine: throughput for models that vLLM serves, in a process and, usually, an environment of its own.

Each sample is a request of its own with one seed, which shares the prompt's cache with its siblings. A sample depends on its
request; but unlike the Hugging Face engine's it may also depend, in rare ties, on what runs beside it, since sums are
rounded differently in another batch. New weights of the same architecture are copied in place.

The engine core runs in the worker's own process, so that whoever ends the worker ends the core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import JsonValue, field_validator

from reasonrun.engines._answers import check_length, finished, seed_of
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.model_folder import ModelFolder
from reasonrun.records import Checkpoint, Sampling
from reasonrun.rendering import Renderer
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

# Set by this engine from fields of its own, or what would make its answers something else.
_OWN_ARGUMENTS = {
    "enable_lora",
    "max_lora_rank",
    "enable_sleep_mode",
    "model",
    "tokenizer",
    "dtype",
    "seed",
    "max_model_len",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "enforce_eager",
    "enable_prefix_caching",
    "logprobs_mode",
    "disable_log_stats",
    "trust_remote_code",
}
_NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}


class VLLM:
    """Generates and scores with vLLM. See the module docstring."""

    in_process: ClassVar[bool] = False
    needs_own_process: ClassVar[bool] = True  # apart from a trainer, whose libraries it does not share

    class Settings(SettingsBase):
        """Recipe fields of ``engine: vllm``."""

        name: Literal["vllm"] = "vllm"
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
            "auto", Effect.NUMERIC, "Arithmetic of the model; auto is bfloat16 on a GPU, float32 on the CPU."
        )
        tensor_parallel_size: int = setting(
            0, Effect.NUMERIC, "GPUs that share one copy of the model; 0 takes all of the worker's.", ge=0
        )
        gpu_memory_utilization: float = setting(
            0.85, Effect.NUMERIC, "Share of the GPU's memory that weights and cache may take.", gt=0, le=1
        )
        cpu_cache_gib: float = setting(2.0, Effect.NUMERIC, "On the CPU: GiB of the cache.", gt=0)
        max_model_len: int = setting(0, Effect.NUMERIC, "Longest sequence in tokens; 0 takes the model's.", ge=0)
        enforce_eager: bool = setting(
            False, Effect.NUMERIC, "Skip compilation and graphs: starts sooner, generates more slowly."
        )
        max_lora_rank: int = setting(
            0,
            Effect.NUMERIC,
            "Serve trained adapters up to this rank beside the weights they were trained on; 0 takes merged weights.",
            ge=0,
        )
        sleep_level: Literal[0, 1, 2] = setting(
            0,
            Effect.OPERATIONAL,
            "For launcher.residency=sleep, on a GPU: 1 moves the weights to main memory, 2 drops them; 0 cannot sleep.",
        )
        python: str | None = setting(
            None,
            Effect.OPERATIONAL,
            "Python executable that has vLLM; null takes the environment that `make vllm` built, or the launcher's.",
        )
        arguments: dict[str, JsonValue] = setting(
            {}, Effect.NUMERIC, "Further arguments of vLLM's engine by its own names, such as quantization."
        )
        unit_rows: int = setting(1024, Effect.OPERATIONAL, "Completions per unit of work, which a kill can cost.", ge=1)

        @field_validator("arguments")
        @classmethod
        def _not_our_own(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
            if clash := sorted(_OWN_ARGUMENTS & arguments.keys()):
                raise ValueError(f"{', '.join(clash)} cannot be set here: the engine does, by fields of its own")
            return arguments

        @property
        def interpreter(self) -> str | None:
            """The Python executable of the workers; None leaves it to the launcher."""
            built = os.path.join(sys.prefix, "vllm", "bin", "python")
            return self.python or (built if os.path.exists(built) else None)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_tokens_made = 0
        self._engine: Any = None
        self._renderer: Renderer | None = None
        self._weights = ""
        self._adapter: Any = None
        self._asleep = False
        self._architecture: dict[str, Any] = {}

    def load(self, checkpoint: Checkpoint) -> None:
        """Make ``checkpoint`` answer. Weights of the architecture already there are copied over the loaded ones; of adapters
        that are served as such, only they are read.

        Raises:
            EnvironmentProblem: vLLM is not installed here, cannot serve the model, or has not enough memory.
            RecipeError: ``arguments`` or ``max_model_len`` is not what this model and vLLM allow.
        """
        self._renderer = Renderer.load(checkpoint.path)
        adapter = checkpoint.adapter if self.settings.max_lora_rank else None
        path, weights = (checkpoint.path, checkpoint.weights) if adapter is None else (adapter.base_path, adapter.base)
        self._load_weights(Path(path), weights)
        self._adapter = None if adapter is None else self._lora(adapter.path, checkpoint.weights)

    def _load_weights(self, path: Path, weights: str) -> None:
        if self._engine is not None and self._weights == weights and not self._asleep:
            return
        architecture = {key: value for key, value in ModelFolder(path).config.items() if key not in _NOT_ARCHITECTURE}
        self._weights = ""
        if self._engine is None or architecture != self._architecture:
            self.close()
            self._engine = self._start(str(path))
            self._architecture = architecture
        else:
            if self._asleep:
                self._engine.wake_up()
                self._asleep = False
            self._reload(weights_path=str(path))
        self._weights = weights

    def _reload(self, **weights: Any) -> None:
        self._engine.collective_rpc("reload_weights", kwargs=weights)
        self._engine.collective_rpc(_repack_tied_head)
        self._engine.reset_prefix_cache()  # it holds what the old weights made of prompts

    def _lora(self, path: str, weights: str) -> Any:
        from vllm.lora.request import LoRARequest

        # Its number is what vLLM's caches know an adapter by.
        return LoRARequest(weights, int(weights[:7], 16) + 1, path)

    def sleep(self) -> None:
        """Give the GPU's memory back and keep the process.

        Raises EnvironmentProblem where this engine cannot: on the CPU, or when it was started with ``sleep_level=0``.
        """
        if self._engine is None or self._asleep:
            return
        import torch

        if not torch.cuda.is_available() or not self.settings.sleep_level:
            raise EnvironmentProblem(
                "this vLLM engine cannot sleep: "
                + ("engine.sleep_level is 0" if torch.cuda.is_available() else "it has no GPU"),
                hint="set engine.sleep_level=1 (or 2, when main memory is short); or launcher.residency=exit, or resident on a"
                " CPU",
            )
        self._engine.sleep(level=self.settings.sleep_level)
        self._asleep = True

    def update(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Copy tensors by name over the loaded model's, as an on-policy trainer does before it samples."""
        self._loaded()
        self._weights, self._adapter = "", None  # no checkpoint's any more
        self._reload(weights_iterator=list(weights))

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """All completions of all requests, each as soon as it is finished; longest prompts first.

        Raises:
            ValueError: an empty prompt.
            RecipeError: a prompt and ``max_new_tokens`` are longer than the context.
        """
        engine, renderer = self._loaded()
        from vllm.inputs import TokensPrompt

        waiting: dict[str, tuple[Request, int]] = {}
        for request in sorted(requests, key=lambda request: -len(request.prompt_ids)):
            self._check_length(len(request.prompt_ids), request.sampling.max_new_tokens)
            for index in range(request.n):
                name = f"{request.key}-{index}"
                waiting[name] = (request, index)
                prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
                engine.add_request(name, prompt, _parameters(request, index, renderer), lora_request=self._adapter)
        try:
            for output in self._finished():
                request, index = waiting.pop(output.request_id)
                yield _completion(request, index, output.outputs[0], renderer)
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of each (prompt ids, completion ids).

        Raises:
            ValueError: an empty prompt, after which nothing has a probability.
            RecipeError: a sequence is longer than the context.
        """
        engine, _ = self._loaded()
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        scored: list[list[float]] = [[] for _ in sequences]
        for number, (prompt_ids, completion_ids) in enumerate(sequences):
            self._check_length(len(prompt_ids), len(completion_ids) + 1)  # vLLM scores while it makes another token
            if completion_ids:
                prompt = TokensPrompt(prompt_token_ids=[*prompt_ids, *completion_ids])
                # A cached prefix would have no log-probabilities.
                asked = SamplingParams(
                    max_tokens=1, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
                )
                engine.add_request(str(number), prompt, asked, lora_request=self._adapter)
        for output in self._finished():
            number = int(output.request_id)
            prompt_ids, completion_ids = sequences[number]
            rows = output.prompt_logprobs[len(prompt_ids) :]
            scored[number] = [row[token].logprob for row, token in zip(rows, completion_ids, strict=True)]
        return scored

    def close(self) -> None:
        """Give the model's memory back; processes of the engine end with it."""
        if self._engine is None:
            return
        self._engine.engine_core.shutdown()
        self._engine = self._adapter = None
        self._weights, self._asleep = "", False

    def _finished(self) -> Iterator[Any]:
        """Outputs as they finish; counts tokens on the way."""
        made: dict[str, int] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                num_tokens = len(output.outputs[0].token_ids)
                self.num_tokens_made += num_tokens - made.get(output.request_id, 0)
                made[output.request_id] = num_tokens
                if output.finished:
                    del made[output.request_id]
                    yield output

    def _start(self, path: str) -> Any:
        # Read when vLLM is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", f"{self.settings.cpu_cache_gib:g}")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores are the launcher's to divide
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine
        except ImportError as error:
            raise EnvironmentProblem(
                f"vLLM cannot be imported by {sys.executable}: {error}",
                hint="`make vllm` builds an environment for it, which the engine finds; or name the Python executable of one"
                " with engine.python; or take engine=hf, which needs nothing more",
            ) from error
        context_length = Renderer.load(path).context_length
        if self.settings.max_model_len > context_length:
            raise RecipeError(
                f"engine.max_model_len is {self.settings.max_model_len}, but the model in {path} reads {context_length} tokens",
                hint=f"allowed: 1 to {context_length}, or 0 for the model's own",
            )
        try:
            return LLMEngine.from_engine_args(EngineArgs(**self._arguments(path, context_length)))
        except TypeError as error:
            raise RecipeError(f"engine.arguments: {error}", hint="use names of vLLM's EngineArgs") from error
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise EnvironmentProblem(
                f"vLLM does not start with the model in {path}: {error}",
                hint="when memory is short, lower engine.max_model_len or engine.gpu_memory_utilization (on the CPU:"
                " engine.cpu_cache_gib); when it does not know the model, use engine=hf, which reads any causal model of"
                " transformers",
            ) from error

    def _arguments(self, path: str, context_length: int) -> dict[str, Any]:
        import torch

        settings, on_gpu = self.settings, torch.cuda.is_available()
        return {
            "model": path,
            "tokenizer": path,
            "dtype": ("bfloat16" if on_gpu else "float32") if settings.dtype == "auto" else settings.dtype,
            "seed": 0,
            "max_model_len": settings.max_model_len or None,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel_size or max(1, torch.cuda.device_count()),
            "enforce_eager": settings.enforce_eager,
            "enable_prefix_caching": True,
            "logprobs_mode": "raw_logprobs",  # of the model, at temperature 1 and without filters
            "disable_log_stats": True,
            "enable_sleep_mode": on_gpu and settings.sleep_level > 0,
            **({"enable_lora": True, "max_lora_rank": settings.max_lora_rank} if settings.max_lora_rank else {}),
            **({} if on_gpu else _whole_prompts(settings.max_model_len or context_length)),
            **settings.arguments,
        }

    def _check_length(self, num_prompt: int, num_new: int) -> None:
        engine, renderer = self._loaded()
        check_length(num_prompt, num_new, renderer, engine.model_config.max_model_len)

    def _loaded(self) -> tuple[Any, Renderer]:
        if self._engine is None or self._renderer is None:
            raise RunFailed("the vLLM engine was asked to work before load()")
        return self._engine, self._renderer


def _parameters(request: Request, index: int, renderer: Renderer) -> Any:
    from vllm import SamplingParams

    sampling: Sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(renderer.eos_ids),  # vLLM alone would not know those of config.json
        seed=seed_of(request, index),
        logprobs=0 if sampling.logprobs else None,
        detokenize=bool(sampling.stop),
    )


def _completion(request: Request, index: int, output: Any, renderer: Renderer) -> Completion:
    logps = None
    if request.sampling.logprobs:
        logps = [row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True)]
    cut_off = output.finish_reason == "length"
    return finished(request, index, output.token_ids, renderer, cut_off=cut_off, stop=output.stop_reason, logps=logps)


def _repack_tied_head(worker: Any) -> None:
    """Pack an output layer that shares the embedding's weights again.

    On the CPU vLLM 0.32 computes with a packed copy, and renews it for layers that have weights of their own in the
    checkpoint only: the output layer would go on with the old policy's.
    """
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if torch.cuda.is_available():
        return
    for layer in worker.get_model().modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def _whole_prompts(longest: int) -> dict[str, Any]:
    """On the CPU no prompt is read in pieces: vLLM 0.32 turns a seeded request's generator back after a piece, which
    torch's CPU generators cannot do."""
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, longest)}
