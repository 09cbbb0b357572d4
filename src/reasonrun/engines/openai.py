"""The policy behind a server that speaks vLLM's dialect of the OpenAI completions: token ids in, token ids out.

The server is somebody else's process, so nothing here starts, sizes or ends it. Weights that were trained here reach it only
where it is told to read them (``reload``); whether it has them is then proved like any engine's. A server that knows words
only cannot be an engine: what is trained are ids. It can be a judge or a teacher (``models.judge.endpoint``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from reasonrun.engines._answers import check_length, finished, seed_of
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed, Stopped
from reasonrun.generation import Completion, Request
from reasonrun.records import Checkpoint
from reasonrun.rendering import Renderer
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

if TYPE_CHECKING:
    import openai

A = TypeVar("A")
_MAX_SAID = 300
# What a server would otherwise take from the model's generation_config.json.
_NEUTRAL = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Served:
    """Generates and scores through a server. See the module docstring."""

    in_process: ClassVar[bool] = False

    class Settings(SettingsBase):
        """Recipe fields of ``engine: openai``."""

        name: Literal["openai"] = "openai"
        url: str = setting("http://localhost:8000/v1", Effect.OPERATIONAL, "Base of the API; vLLM's own unless given.")
        model: str = setting("", Effect.OPERATIONAL, "What the server calls the model; empty takes its first.")
        api_key_env: str | None = setting(
            None,
            Effect.OPERATIONAL,
            "Environment variable that holds the key; null for a server that asks for none.",
            pattern=r"^[A-Za-z_]\w*$",
        )
        reload: bool = setting(
            False,
            Effect.OPERATIONAL,
            "Have the server read trained weights from the run directory, which it must see under the same path (vLLM started"
            " with VLLM_SERVER_DEV_MODE=1).",
        )
        max_parallel: int = setting(64, Effect.OPERATIONAL, "Requests under way at the same time.", ge=1, le=1024)
        timeout_seconds: float = setting(600.0, Effect.OPERATIONAL, "Longest wait for one answer.", gt=0)
        max_retries: int = setting(
            5, Effect.OPERATIONAL, "How often a request that failed is tried again, with growing pauses.", ge=0
        )
        unit_rows: int = setting(512, Effect.OPERATIONAL, "Completions per unit of work, which a kill can cost.", ge=1)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.num_tokens_made = 0
        self._client: openai.OpenAI | None = None
        self._key = ""
        self._model = ""
        self._max_model_len = 0
        self._renderer: Renderer | None = None
        self._weights = ""

    def load(self, checkpoint: Checkpoint) -> None:
        """Have the server answer with ``checkpoint``; without ``reload`` it is believed to have the first one's weights.

        Raises:
            EnvironmentProblem: the package or the key is missing, the server is not there or does not know the model.
            RecipeError: these are other weights, and ``reload`` is off.
        """
        renderer = Renderer.load(checkpoint.path)
        if self._client is None:
            self._connect(renderer.context_length)
        # A server may still have what an earlier attempt, or another run, had it read.
        if self._weights != checkpoint.weights and (self.settings.reload or self._weights or checkpoint.step):
            self._reload(checkpoint)
        self._renderer, self._weights = renderer, checkpoint.weights

    def update(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Raises RecipeError: single tensors do not reach a server."""
        raise RecipeError(
            "an on-policy trainer samples with engine openai, which cannot take single tensors",
            hint="use engine=hf or engine=vllm",
        )

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """All completions of all requests, each as soon as it is there; longest prompts first.

        Raises:
            ValueError: an empty prompt.
            RecipeError: a prompt and ``max_new_tokens`` are longer than the context.
            Stopped: the server could not be reached or was too busy, again and again.
            RunFailed: it refuses a request.
        """
        renderer = self._loaded()
        for request in requests:
            check_length(len(request.prompt_ids), request.sampling.max_new_tokens, renderer, self._max_model_len)
        ordered = sorted(requests, key=lambda request: -len(request.prompt_ids))
        rows = ((request, index) for request in ordered for index in range(request.n))
        yield from self._in_parallel(self._complete, rows)

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of each (prompt ids, completion ids).

        Raises as ``generate`` does.
        """
        renderer = self._loaded()
        for prompt_ids, completion_ids in sequences:
            # A server scores while it makes another token.
            check_length(len(prompt_ids), len(completion_ids) + 1, renderer, self._max_model_len)
        asked = ((number, *pair) for number, pair in enumerate(sequences) if pair[1])
        found = dict(self._in_parallel(self._score, asked))
        return [found.get(number, []) for number in range(len(sequences))]

    def sleep(self) -> None:
        """Nothing here holds a device."""

    def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _connect(self, context_length: int) -> None:
        try:
            import openai
        except ImportError as error:
            raise EnvironmentProblem(
                "engine openai needs the package openai; it is not installed.", hint="pip install 'reasonrun[endpoint]'"
            ) from error
        variable = self.settings.api_key_env
        self._key = os.environ.get(variable, "") if variable else "none"
        if not self._key:
            raise EnvironmentProblem(
                f"engine.api_key_env: the environment variable {variable} is not set.", hint=f"export {variable}=…"
            )
        self._client = openai.OpenAI(
            base_url=self.settings.url,
            api_key=self._key,
            timeout=self.settings.timeout_seconds,
            max_retries=self.settings.max_retries,
        )
        served = self._explained(lambda: list(self._openai().models.list()), first=True)
        names = [model.id for model in served]
        self._model = self.settings.model or (names[0] if names else "")
        if self._model not in names:
            raise EnvironmentProblem(
                f"the server at {self.settings.url} has no model {self._model!r}; it has: {', '.join(names) or 'none'}",
                hint="set engine.model to one of these",
            )
        described = (next(model for model in served if model.id == self._model).model_extra or {}).get("max_model_len")
        self._max_model_len = described if isinstance(described, int) else context_length

    def _reload(self, checkpoint: Checkpoint) -> None:
        if not self.settings.reload:
            raise RecipeError(
                f"the server at {self.settings.url} answers with the weights that it was started with, and"
                f" {checkpoint.step or checkpoint.path} has others",
                hint="set engine.reload=true for a vLLM server that sees the run directory and was started with"
                " VLLM_SERVER_DEV_MODE=1; or go on with engine=vllm or engine=hf: what is committed stays",
            )
        body = {"method": "reload_weights", "kwargs": {"weights_path": checkpoint.path}}
        root = self.settings.url.rstrip("/").removesuffix("/v1")
        self._weights = ""
        self._explained(lambda: self._openai().post(f"{root}/collective_rpc", cast_to=object, body=body))
        self._explained(lambda: self._openai().post(f"{root}/reset_prefix_cache", cast_to=object))

    def _complete(self, request: Request, index: int) -> Completion:
        sampling = request.sampling
        choice = self._choice(
            prompt=list(request.prompt_ids),
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(request, index),
            stop=list(sampling.stop) or None,
            logprobs=0 if sampling.logprobs else None,
            extra_body={
                "top_k": sampling.top_k,
                "stop_token_ids": list(self._loaded().eos_ids),
                "return_token_ids": True,
                "add_special_tokens": False,
                **_NEUTRAL,
            },
        )
        told = choice.model_extra or {}
        ids = told.get("token_ids")
        if not isinstance(ids, list):
            raise EnvironmentProblem(
                f"the server at {self.settings.url} answers with words, without their token ids, which training needs",
                hint="serve the model with a current vLLM (`vllm serve`); or use engine=vllm or engine=hf",
            )
        self.num_tokens_made += len(ids)
        logps = choice.logprobs.token_logprobs if sampling.logprobs else None
        cut_off = choice.finish_reason == "length"
        return finished(request, index, ids, self._loaded(), cut_off=cut_off, stop=told.get("stop_reason"), logps=logps)

    def _score(self, number: int, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> tuple[int, list[float]]:
        choice = self._choice(
            prompt=[*prompt_ids, *completion_ids],
            max_tokens=1,
            temperature=0.0,
            extra_body={"prompt_logprobs": 0, "add_special_tokens": False},
        )
        rows = (choice.model_extra or {}).get("prompt_logprobs")
        if not isinstance(rows, list):
            raise EnvironmentProblem(
                f"the server at {self.settings.url} does not score given tokens (prompt_logprobs)",
                hint="serve the model with a current vLLM (`vllm serve`); or use engine=vllm or engine=hf",
            )
        told = zip(rows[len(prompt_ids) :], completion_ids, strict=True)
        return number, [float(row[str(token)]["logprob"]) for row, token in told]

    def _choice(self, **body: Any) -> Any:
        client = self._openai()
        return self._explained(lambda: client.completions.create(model=self._model, **body)).choices[0]

    def _in_parallel(self, ask: Callable[..., A], calls: Iterable[tuple[Any, ...]]) -> Iterator[A]:
        """Answers as they come. What is under way when one fails, or the caller leaves, is not waited for."""
        waiting: set[Future[A]] = set()
        todo = iter(calls)
        pool = ThreadPoolExecutor(self.settings.max_parallel)
        try:
            while True:
                while len(waiting) < self.settings.max_parallel and (call := next(todo, None)) is not None:
                    waiting.add(pool.submit(ask, *call))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _explained(self, ask: Callable[[], A], *, first: bool = False) -> A:
        """What ``ask`` returns; the client's errors as ones that say what to do."""
        import openai

        who = f"the server at {self.settings.url}"
        try:
            return ask()
        except openai.APIError as error:
            said = f"{type(error).__name__}: {' '.join(str(error).replace(self._key, '<key>').split())[:_MAX_SAID]}"
            if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
                hint = f"put a valid key into the environment variable {self.settings.api_key_env or '(engine.api_key_env)'}"
                raise EnvironmentProblem(f"{who} refuses the key. {said}", hint=hint) from None
            if isinstance(error, openai.NotFoundError):
                hint = (
                    "check engine.url, which ends with /v1; for engine.reload, start vLLM with VLLM_SERVER_DEV_MODE=1"
                )
                raise EnvironmentProblem(f"{who} does not know that. {said}", hint=hint) from None
            if first and isinstance(error, openai.APIConnectionError):
                hint = "start it (`vllm serve MODEL`), or check engine.url"
                raise EnvironmentProblem(f"{who} cannot be reached. {said}", hint=hint) from None
            if isinstance(error, openai.APIConnectionError | openai.RateLimitError | openai.InternalServerError):
                raise Stopped(
                    f"{who} gave no answer, {self.settings.max_retries + 1} times. {said}",
                    hint="what is committed is safe; the same command continues this run when the server is back",
                ) from None
            raise RunFailed(f"{who} refuses a request. {said}", hint="lower the length of prompts or answers") from None

    def _openai(self) -> openai.OpenAI:
        if self._client is None:
            raise RunFailed("the openai engine was asked to work before load()")
        return self._client

    def _loaded(self) -> Renderer:
        if self._renderer is None:
            raise RunFailed("the openai engine was asked to work before load()")
        return self._renderer
