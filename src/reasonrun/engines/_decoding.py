"""The decode loop: rows enter when slots are free, leave when they are finished, and never wait for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from reasonrun.engines._sampling import choose, token_logps
from reasonrun.engines._slots import PromptCache, SlotCache
from reasonrun.errors import RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.randomness import row_seed, uniforms
from reasonrun.records import FinishReason
from reasonrun.rendering import Renderer

# Refilling costs a prefill each time; waiting for a quarter of the slots makes few of them and leaves few slots idle.
_REFILL_SHARE = 4
# A character has at most four bytes, so a stop string of n characters ends within the last 4 n tokens; the rest allows
# for tokens without text.
_BYTES_PER_CHARACTER = 4
_TOKENS_WITHOUT_TEXT = 8

Wanted = tuple[Request, list[int]]
"""A request and the sample indexes of it that are still to be drawn."""


class Scorer:
    """A causal language model that computes logits only where they are asked for.

    The output layer is the largest product of a small model; a hook in front of it picks the positions, whatever the
    architecture does to logits afterwards.
    """

    def __init__(self, model: nn.Module, output_layer: nn.Module) -> None:
        self._model = model
        self._picked: tuple[Tensor, Tensor] | None = None
        self._hook = output_layer.register_forward_pre_hook(self._pick)
        self.device = next(model.parameters()).device

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def at(self, ids_BL: Tensor, rows_N: Tensor, positions_N: Tensor, cache: PromptCache | None = None) -> Tensor:
        """Logits [N, vocabulary] after position ``positions_N[i]`` of row ``rows_N[i]``; padding is on the right."""
        self._picked = (rows_N, positions_N)
        try:
            positions_BL = torch.arange(ids_BL.shape[1], device=self.device).expand_as(ids_BL)
            return self._logits(ids_BL, positions_BL, cache, None)[0]
        finally:
            self._picked = None

    def step(self, ids_B: Tensor, cache: SlotCache) -> Tensor:
        """Logits [B, vocabulary] after one more token a row."""
        mask = cache.advance()
        return self._logits(ids_B[:, None], cache.positions[:, None], cache, mask)[:, -1]

    def _logits(
        self, ids: Tensor, positions: Tensor, cache: PromptCache | SlotCache | None, mask: Tensor | None
    ) -> Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            attention_mask=mask,
            use_cache=cache is not None,
            **({"slots": cache} if isinstance(cache, SlotCache) else {}),
        )
        return cast(Tensor, output.logits)

    def _pick(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._picked is None:
            return None
        rows, positions = self._picked
        return (inputs[0][rows, positions][None], *inputs[1:])


@dataclass
class _Row:
    """One completion in progress."""

    request: Request
    index: int
    seed: int
    ids: list[int]
    logps: list[float]


class Decoding:
    """Draws all wanted samples of requests that share their sampling parameters.

    Args:
        scorer: the model.
        renderer: its tokenizer, for texts and stop strings.
        max_rows: rows decoded at once.
        prefill_tokens: prompt tokens, padding included, that go through the model at once.
        count: told the number of tokens after each step.
    """

    def __init__(
        self, scorer: Scorer, renderer: Renderer, *, max_rows: int, prefill_tokens: int, count: Callable[[int], None]
    ) -> None:
        self._scorer = scorer
        self._renderer = renderer
        self._max_rows = max_rows
        self._prefill_tokens = prefill_tokens
        self._count = count
        self._eos_ids = frozenset(renderer.eos_ids)
        self._rows: list[_Row] = []
        self._last_ids = torch.zeros(0, dtype=torch.long, device=scorer.device)
        self.num_rows_peak = 0

    def run(self, wanted: Iterable[Wanted]) -> Iterator[Completion]:
        """All completions, each as soon as it is finished. ``wanted`` in descending order of prompt length."""
        pending = deque(wanted)
        num_wanted = sum(len(indexes) for _, indexes in pending)
        num_slots = min(self._max_rows, num_wanted)
        cache = SlotCache(self._scorer.device)
        while pending or self._rows:
            free = num_slots - len(self._rows)
            if pending and (free * _REFILL_SHARE >= num_slots or not self._rows):
                yield from self._admit(_take(pending, free), cache)
                continue
            logits_BV = self._scorer.step(self._last_ids, cache)
            yield from self._accept(logits_BV, cache, first_row=0)

    def _admit(self, wanted: list[Wanted], cache: SlotCache) -> Iterator[Completion]:
        for chunk in _chunks(wanted, self._prefill_tokens):
            num_new = sum(len(indexes) for _, indexes in chunk)
            # Counted before memory is taken: when it runs out, this is the number of rows that did not fit.
            self.num_rows_peak = max(self.num_rows_peak, len(self._rows) + num_new)
            prompts = [request.prompt_ids for request, _ in chunk]
            ids_PL, lengths_P = padded(prompts, self._scorer.device)
            prompt_cache = PromptCache()
            logits_PV = self._scorer.at(
                ids_PL, torch.arange(len(chunk), device=ids_PL.device), lengths_P - 1, prompt_cache
            )
            owners = [p for p, (_, indexes) in enumerate(chunk) for _ in indexes]
            owner_R = torch.tensor(owners, device=ids_PL.device)
            first_row = len(self._rows)
            self._rows += [
                _Row(request, index, row_seed(request.seed, index), [], [])
                for request, indexes in chunk
                for index in indexes
            ]
            cache.append(prompt_cache, lengths_P.tolist(), [len(indexes) for _, indexes in chunk])
            self._last_ids = torch.cat([self._last_ids, owner_R])  # placeholders until the first token is chosen
            yield from self._accept(logits_PV[owner_R], cache, first_row)

    def _accept(self, logits_BV: Tensor, cache: SlotCache, first_row: int) -> Iterator[Completion]:
        """Choose one token for each row from ``first_row`` on; finished rows leave and become completions."""
        rows = self._rows[first_row:]
        sampling = rows[0].request.sampling
        ids_B = choose(logits_BV, self._uniforms(rows), sampling)
        self._last_ids[first_row:] = ids_B
        chosen = ids_B.tolist()
        if min(chosen) < 0:
            raise RunFailed(
                f"The model in {self._renderer.source} answers with numbers that are not finite.",
                hint="Its training diverged or its weights are damaged: go back to an earlier checkpoint.",
            )
        for row, token_id in zip(rows, chosen, strict=True):
            row.ids.append(token_id)
        self._count(len(rows))
        if sampling.logprobs:
            for row, logp in zip(rows, token_logps(logits_BV, ids_B).tolist(), strict=True):
                row.logps.append(logp)
        finished = self._finished(rows)
        if not finished:
            return
        completions = [self._completion(rows[i], reason) for i, reason in finished.items()]
        for source, target in cache.drop([first_row + i for i in finished]):
            self._rows[target] = self._rows[source]
            self._last_ids[target] = self._last_ids[source]
        del self._rows[len(cache) :]
        self._last_ids = self._last_ids[: len(cache)]
        yield from completions

    def _uniforms(self, rows: Sequence[_Row]) -> Tensor:
        """float64 [rows]; rows that entered together stand at the same position."""
        seeds = np.array([row.seed for row in rows], dtype=np.uint64)
        positions = np.array([len(row.ids) for row in rows])
        drawn = np.empty(len(rows))
        for position in np.unique(positions):
            here = positions == position
            drawn[here] = uniforms(seeds[here], int(position))
        return torch.from_numpy(drawn).to(self._scorer.device)

    def _finished(self, rows: Sequence[_Row]) -> dict[int, FinishReason]:
        sampling = rows[0].request.sampling
        found: dict[int, FinishReason] = {}
        for i, row in enumerate(rows):
            if row.ids[-1] in self._eos_ids:
                found[i] = "stop"
            elif len(row.ids) >= sampling.max_new_tokens:
                found[i] = "length"
        if not sampling.stop:
            return found
        window = _BYTES_PER_CHARACTER * max(map(len, sampling.stop)) + _TOKENS_WITHOUT_TEXT
        tails = self._renderer.decode_batch([row.ids[-window:] for row in rows])
        for i, tail in enumerate(tails):
            if any(stop in tail for stop in sampling.stop):
                found[i] = "stop_string"
        return found

    def _completion(self, row: _Row, reason: FinishReason) -> Completion:
        text = self._renderer.decode(row.ids)
        if reason == "stop_string":
            starts = [text.find(stop) for stop in row.request.sampling.stop]
            text = text[: min(start for start in starts if start >= 0)]
        return Completion(
            request=row.request.key,
            index=row.index,
            token_ids=tuple(row.ids),
            text=text,
            finish_reason=reason,
            logps=tuple(row.logps) if row.request.sampling.logprobs else None,
        )


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, longest], filled up on the right with 0, and the lengths [B].

    Under causal attention nothing on the right of a token reaches it, so no mask is needed.
    """
    lengths = [len(ids) for ids in sequences]
    block = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    for row, ids in enumerate(sequences):
        block[row, : len(ids)] = ids
    return torch.from_numpy(block).to(device), torch.tensor(lengths, device=device)


def by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Runs of consecutive items whose padded block holds at most ``max_tokens``; at least one item each."""
    start, longest = 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and (i + 1 - start) * longest > max_tokens:
            yield slice(start, i)
            start, longest = i, length
    if start < len(lengths):
        yield slice(start, len(lengths))


def _chunks(wanted: list[Wanted], max_tokens: int) -> Iterator[list[Wanted]]:
    for run in by_tokens([len(request.prompt_ids) for request, _ in wanted], max_tokens):
        yield wanted[run]


def _take(pending: deque[Wanted], num_rows: int) -> list[Wanted]:
    """The next ``num_rows`` samples; a request that does not fit is split."""
    taken: list[Wanted] = []
    while pending and num_rows > 0:
        request, indexes = pending.popleft()
        taken.append((request, indexes[:num_rows]))
        if len(indexes) > num_rows:
            pending.appendleft((request, indexes[num_rows:]))
        num_rows -= len(taken[-1][1])
    return taken


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory, on a GPU or in its CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("not enough memory", "can't allocate"))
    )


def free_memory(device: torch.device) -> None:
    """Give cached blocks back to the device, so that a smaller batch finds one piece of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
