"""What vLLM says of a finished request, as a completion; the same in its own process and behind a server."""

from __future__ import annotations

from collections.abc import Sequence

from reasonrun.errors import RecipeError
from reasonrun.generation import Completion, Request
from reasonrun.randomness import row_seed
from reasonrun.records import FinishReason
from reasonrun.rendering import Renderer


def seed_of(request: Request, index: int) -> int:
    """The seed of one sample; torch's generators take 63 bits."""
    return row_seed(request.seed, index) >> 1


def finished(
    request: Request,
    index: int,
    ids: Sequence[int],
    renderer: Renderer,
    *,
    cut_off: bool,
    stop: object,
    logps: Sequence[float] | None,
) -> Completion:
    """The completion of sampled ``ids``.

    Args:
        cut_off: whether the limit of tokens ended it.
        stop: the stop string that ended it, where one did.
    """
    text = renderer.decode(tuple(ids))
    finish: FinishReason = "length" if cut_off else "stop"
    if isinstance(stop, str):
        finish = "stop_string"
        # A special token's own text is not part of ``text``.
        text = text[: min((text.find(s) for s in request.sampling.stop if s in text), default=len(text))]
    return Completion(
        request=request.key,
        index=index,
        token_ids=tuple(ids),
        text=text,
        finish_reason=finish,
        logps=None if logps is None else tuple(logps),
    )


def check_length(num_prompt: int, num_new: int, renderer: Renderer, max_model_len: int) -> None:
    """Raise ValueError on an empty prompt, RecipeError on a sequence that is too long for model or engine."""
    if num_prompt == 0:
        raise ValueError("a prompt needs at least one token")
    limit = min(renderer.context_length, max_model_len)
    if num_prompt + num_new > limit:
        raise RecipeError(
            f"A prompt of {num_prompt} tokens and {num_new} new ones exceed the {limit} tokens of the model in"
            f" {renderer.source}.",
            hint="Lower sampling.max_new_tokens, shorten the prompts, or raise engine.max_model_len.",
        )
