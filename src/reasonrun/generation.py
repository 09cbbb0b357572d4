"""What an engine is asked and what it answers."""

from __future__ import annotations

from reasonrun.records import FinishReason, Record, Sampling


class Request(Record):
    """``n`` completions of one prompt.

    ``key`` identifies the request in the ledger; sample ``index`` of it is drawn from
    ``randomness.row_seed(seed, index)`` and nothing else, so batching never changes a sample. The last ``num_given`` of
    ``prompt_ids`` are the beginning of the answer itself.
    """

    key: str
    problem_id: str
    prompt_ids: tuple[int, ...]
    num_given: int = 0
    n: int
    seed: int
    sampling: Sampling


class Completion(Record):
    """One sampled continuation. ``token_ids`` hold the end-of-sequence token when the model produced it."""

    request: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logps: tuple[float, ...] | None = None
