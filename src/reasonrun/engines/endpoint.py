"""A model behind an OpenAI-compatible server: chat completions over HTTP. The home of the ``openai`` package.

Runs in threads of the supervisor, because waiting for a network needs neither torch nor another process. It is no
``engine`` of a recipe: what is trained here cannot answer from there. Rows are sampled with a seed of their own where the
server takes one; that a server gives the same text twice is nothing that anybody promises.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from reasonrun.errors import EnvironmentProblem, ReasonrunError, RunFailed, Stopped
from reasonrun.generation import Completion, EndpointSettings, Request, Usage
from reasonrun.randomness import row_seed
from reasonrun.records import FinishReason

if TYPE_CHECKING:
    import openai

_MAX_SEED = 2**31  # some servers read it into 32 bits
_POLL_SECONDS = 0.1
_MAX_REPLY = 300


class _Call(NamedTuple):
    unit: int
    request: Request
    sample: int


class EndpointEngine:
    """One endpoint.

    Args:
        settings: where it is.
        role: the model's role, for messages.
        check_stop: called ten times a second while answers are awaited; raises to stop.

    Raises:
        EnvironmentProblem: the package or the key is missing.
    """

    def __init__(self, settings: EndpointSettings, *, role: str, check_stop: Callable[[], None] = lambda: None) -> None:
        self.settings, self._role, self._check_stop = settings, role, check_stop
        if find_spec("openai") is None:
            raise EnvironmentProblem(
                f"models.{role} is an endpoint, which needs the package openai; it is not installed.",
                hint="pip install 'reasonrun[endpoint]'",
            )
        variable = settings.api_key_env
        self._key = os.environ.get(variable, "") if variable else "none"
        if not self._key:
            raise EnvironmentProblem(
                f"models.{role}.endpoint: the environment variable {variable} is not set.",
                hint=f"export {variable}=…, or models.{role}.endpoint.api_key_env=null for a server that asks for none",
            )
        self._client: openai.OpenAI | None = None
        self._takes_seeds = True

    def generate(self, units: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Completion]]]:
        """Each completion as soon as it is there. A stop loses those under way, at most ``max_parallel``.

        After a failure nothing new is asked; what was under way is still handed out, then the failure is raised.

        Raises:
            Stopped: the server could not be reached or was too busy, again and again.
            EnvironmentProblem: it refuses the key, does not know the model, or does not speak chat completions.
            RunFailed: it refuses a request.
        """
        calls, client = _calls(units), self._openai()
        todo: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[_Call, Completion | Exception]] = queue.SimpleQueue()
        num_threads = num_waiting = 0
        failure: Exception | None = None
        try:
            while True:
                while failure is None and num_waiting < self.settings.max_parallel and (call := next(calls, None)):
                    todo.put(call)
                    num_waiting += 1
                    if num_threads < num_waiting:
                        # Daemons: a stopped run does not wait for a server that has not answered yet.
                        threading.Thread(target=self._work, args=(client, todo, done), daemon=True).start()
                        num_threads += 1
                if not num_waiting:
                    break
                answered = self._next(done)
                if answered is None:
                    continue
                num_waiting -= 1
                call, answer = answered
                if isinstance(answer, Completion):
                    yield call.unit, [answer]
                else:
                    failure = failure or answer
        finally:
            for _ in range(num_threads):
                todo.put(None)
        if failure is not None:
            raise self._explained(failure) from None  # the client's error holds the request, key included

    def _next(
        self, done: queue.SimpleQueue[tuple[_Call, Completion | Exception]]
    ) -> tuple[_Call, Completion | Exception] | None:
        try:
            return done.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            self._check_stop()
            return None

    def _work(
        self,
        client: openai.OpenAI,
        todo: queue.SimpleQueue[_Call | None],
        done: queue.SimpleQueue[tuple[_Call, Completion | Exception]],
    ) -> None:
        while (call := todo.get()) is not None:
            try:
                done.put((call, self._ask(client, call.request, call.sample)))
            except Exception as error:  # a thread's only way to raise: the caller gets it
                done.put((call, error))

    def _ask(self, client: openai.OpenAI, request: Request, index: int) -> Completion:
        import openai

        body = _body(self.settings.model, request)
        if self._takes_seeds:
            body["seed"] = row_seed(request.seed, index) % _MAX_SEED
        try:
            answer = client.chat.completions.create(**body)
        except openai.BadRequestError as error:
            if "seed" not in body or "seed" not in str(error).lower():
                raise
            self._takes_seeds = False
            return self._ask(client, request, index)
        return _completion(request, index, answer)

    def _openai(self) -> openai.OpenAI:
        if self._client is None:
            import openai

            self._client = openai.OpenAI(
                base_url=self.settings.url,
                api_key=self._key,
                timeout=self.settings.timeout_seconds,
                max_retries=self.settings.max_retries,
            )
        return self._client

    def _explained(self, error: Exception) -> Exception:
        """The client's error as one that says what to do; other errors, ours and bugs, as they are."""
        import openai

        if isinstance(error, ReasonrunError):
            return error
        settings = self.settings
        who = f"models.{self._role} ({settings.model} at {settings.url})"
        said = f"{type(error).__name__}: {' '.join(str(error).replace(self._key, '<key>').split())[:_MAX_REPLY]}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            hint = f"put a valid key into the environment variable {settings.api_key_env or '(api_key_env names none)'}"
            return EnvironmentProblem(f"{who} refuses the key. {said}", hint=hint)
        if isinstance(error, openai.NotFoundError):
            hint = f"check models.{self._role}.endpoint.url, which often ends with /v1, and the model's name"
            return EnvironmentProblem(f"{who} is not there. {said}", hint=hint)
        if isinstance(error, openai.APIConnectionError | openai.RateLimitError | openai.InternalServerError):
            return Stopped(
                f"{who} gave no answer, {settings.max_retries + 1} times. {said}",
                hint="what it answered before is kept; the same command continues this run when the server is back",
            )
        if isinstance(error, openai.APIStatusError):
            hint = "change what is asked (sampling, length, prompt) or take another model; what was answered is kept"
            return RunFailed(f"{who} refuses a request. {said}", hint=hint)
        if isinstance(error, openai.OpenAIError | ValueError):
            hint = f"check models.{self._role}.endpoint.url, which often ends with /v1"
            return EnvironmentProblem(f"{who} does not answer with a chat completion. {said}", hint=hint)
        return error

    def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            self._client.close()


def _calls(units: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[_Call]:
    for number, requests in units:
        for request in requests:
            for index in range(request.n):
                if index not in request.done:
                    yield _Call(number, request, index)


def _body(model: str, request: Request) -> dict[str, Any]:
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in request.messages],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
    }
    if sampling.top_p < 1:
        body["top_p"] = sampling.top_p
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.top_k:
        body["extra_body"] = {"top_k": sampling.top_k}  # not OpenAI's, but vLLM's and llama.cpp's
    return body


def _completion(request: Request, index: int, answer: Any) -> Completion:
    """The completion in a server's answer; nothing where it says nothing or was filtered.

    Raises:
        ValueError: the answer is no chat completion.
    """
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list):
        raise ValueError(f"the answer has no choices: {str(answer)[:_MAX_REPLY]!r}")
    choice = choices[0] if choices else None
    finish = getattr(choice, "finish_reason", None)
    text = getattr(getattr(choice, "message", None), "content", None)
    finish_reason: FinishReason = "length" if finish == "length" else "stop"
    return Completion(
        request=request.key,
        index=index,
        token_ids=(),
        text=text if isinstance(text, str) and finish != "content_filter" else "",
        finish_reason=finish_reason,
        usage=_usage(getattr(answer, "usage", None)),
    )


def _usage(usage: Any) -> Usage | None:
    prompt, completion = (getattr(usage, f"{side}_tokens", None) for side in ("prompt", "completion"))
    return Usage(prompt, completion) if isinstance(prompt, int) and isinstance(completion, int) else None
