"""What an engine is asked and what it answers."""

from __future__ import annotations

from typing import NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import field_validator, model_validator

from reasonrun.records import FinishReason, Message, Record, Sampling, digest
from reasonrun.settings import Effect, Settings, setting


class Request(Record):
    """``n`` completions of one prompt.

    ``key`` identifies the request in the ledger; sample ``index`` of it is drawn from
    ``randomness.row_seed(seed, index)`` and nothing else, so batching never changes a sample. The last ``num_given`` of
    ``prompt_ids`` are the beginning of the answer itself. ``messages`` are there for who needs words: a model behind an
    endpoint, whose ``prompt_ids`` are empty, and a script that plays a judge. Samples in ``done`` are committed already: an
    engine whose completions are paid for one by one leaves them out.
    """

    key: str
    problem_id: str
    prompt_ids: tuple[int, ...]
    num_given: int = 0
    n: int
    seed: int
    sampling: Sampling
    messages: tuple[Message, ...] = ()
    done: tuple[int, ...] = ()


class Usage(NamedTuple):
    """Tokens of one completion as the server of a model counts, and bills, them."""

    prompt: int
    completion: int


def price(usage: Usage, prompt_price: float, completion_price: float) -> float | None:
    """What tokens cost, given prices per million; None when no price is known."""
    if not (prompt_price or completion_price):
        return None
    return (usage.prompt * prompt_price + usage.completion * completion_price) / 1e6


def endpoint_weights(model: str) -> str:
    """What stands for the digest of the weights of a model behind an endpoint, of which only the name is known."""
    return digest(["endpoint", model])


class Completion(Record):
    """One sampled continuation. ``token_ids`` hold the end-of-sequence token when the model produced it."""

    request: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logps: tuple[float, ...] | None = None
    usage: Usage | None = None


class EndpointSettings(Settings):
    """A model behind an OpenAI-compatible server.

    Its name is the experiment; where it answers is not. The same model may move to another port or provider under a run,
    and nothing that a server tells would reveal that it is another one.
    """

    url: str = setting(..., Effect.OPERATIONAL, "Base of the API, such as http://localhost:8000/v1.")
    model: str = setting(..., Effect.SEMANTIC, "What the server calls the model.", min_length=1)
    api_key_env: str | None = setting(
        "OPENAI_API_KEY",
        Effect.OPERATIONAL,
        "Environment variable that holds the key; null for a server that asks for none.",
        pattern=r"^[A-Za-z_]\w*$",
    )
    max_parallel: int = setting(8, Effect.OPERATIONAL, "Requests under way at the same time.", ge=1, le=256)
    timeout_seconds: float = setting(120.0, Effect.OPERATIONAL, "Longest wait for one answer.", gt=0)
    max_retries: int = setting(
        5, Effect.OPERATIONAL, "How often a request that failed is tried again, with growing pauses.", ge=0
    )

    prompt_price: float = setting(
        0.0, Effect.OPERATIONAL, "USD per million tokens of prompts, for reports; 0 is unknown.", ge=0
    )
    completion_price: float = setting(
        0.0, Effect.OPERATIONAL, "USD per million tokens of completions, for reports; 0 is unknown.", ge=0
    )
    max_cost: float = setting(
        0.0,
        Effect.OPERATIONAL,
        "USD that a run may spend on this model before it stops, resumably; what is under way still comes in. 0 is no limit.",
        ge=0,
    )

    @property
    def weights(self) -> str:
        return endpoint_weights(self.model)

    def cost(self, usage: Usage) -> float | None:
        """USD; None when no price is known."""
        return price(usage, self.prompt_price, self.completion_price)

    @model_validator(mode="after")
    def _limit_has_prices(self) -> Self:
        if self.max_cost and not (self.prompt_price or self.completion_price):
            raise ValueError("max_cost needs prompt_price or completion_price: without prices nothing reaches it")
        return self

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and a host, and often ends with /v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            # It is shown in messages and stored with the run, so nothing secret may stand in it.
            raise ValueError("a URL holds no user, password, query or fragment; a key comes from api_key_env")
        return url.rstrip("/")
