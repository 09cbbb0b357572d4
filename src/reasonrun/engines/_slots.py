"""Keys and values of the rows that are being decoded.

Two dense blocks per layer, without padding on the left: one holds each prompt once, however many samples continue it;
the other holds each row's own tokens. Rows enter at the end after a prefill and leave by the last row moving into their
place, so neither block ever needs a gather. Attention over the two parts is joined by their log-sum-exp, as
FlashDecoding does (Dao et al. 2023); keys of a prompt are read once for all its samples.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from reasonrun.errors import EnvironmentProblem

ATTENTION = "reasonrun_slots"
# Own tokens that a row has room for at first; blocks grow by half.
_FIRST_WIDTH = 32


class PromptCache:
    """What the model takes for a cache while it reads prompts: hands keys and values back and keeps them."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values are [prompts, heads, length, head size]."""
        self.layers.append((keys, values))
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


class SlotCache:
    """What the model takes for a cache while it decodes one token a row."""

    is_compileable = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._prompts, self._rows = _Block(), _Block()
        self._prompt_lengths = self._own_lengths = self._owners = self._places = self._integers([])
        self._num_users: list[int] = []  # live rows of each prompt
        self._num_places = 1
        self._longest_prompt = self._longest_own = 0
        self._prompt_mask = torch.zeros(0)

    def __len__(self) -> int:
        return len(self._own_lengths)

    @property
    def positions(self) -> Tensor:
        """Position of each row's newest token, [rows]."""
        return self._prompt_lengths[self._owners] + self._own_lengths - 1

    def append(self, prompt: PromptCache, lengths: list[int], num_samples: list[int]) -> None:
        """Add the prompts of a prefill, and ``num_samples[p]`` rows, not begun, for each of them in order."""
        first, count, width = self._prompts.count, len(lengths), prompt.layers[0][0].shape[2]
        self._prompts.reserve(first + count, width, prompt.layers)
        for pair, new_pair in zip(self._prompts.layers, prompt.layers, strict=True):
            for block, new in zip(pair, new_pair, strict=True):
                block[first : first + count, :, :width] = new
        self._prompts.count += count
        self._num_users += num_samples
        self._num_places = max(self._num_places, *num_samples)
        owners = [first + p for p, n in enumerate(num_samples) for _ in range(n)]
        self._rows.reserve(len(self) + len(owners), max(_FIRST_WIDTH, self._longest_own), prompt.layers)
        self._rows.count += len(owners)
        self._prompt_lengths = torch.cat([self._prompt_lengths, self._integers(lengths)])
        self._owners = torch.cat([self._owners, self._integers(owners)])
        self._places = torch.cat([self._places, self._integers([k for n in num_samples for k in range(n)])])
        self._own_lengths = torch.cat([self._own_lengths, self._integers([0] * len(owners))])
        self._mask_prompts()

    def drop(self, rows: list[int]) -> list[tuple[int, int]]:
        """Remove rows; returns the moves (from, to) that close the gaps, for the caller's own per-row state."""
        for owner, count in Counter(self._owners[self._integers(rows)].tolist()).items():
            self._num_users[owner] -= count
        moves = _closing_moves(rows, len(self))
        source, target = (self._integers([move[side] for move in moves]) for side in (0, 1))
        self._rows.move(source, target, len(rows), self._longest_own)
        for state in (self._own_lengths, self._owners, self._places):
            state[target] = state[source]
        remaining = len(self) - len(rows)
        self._own_lengths, self._owners, self._places = (
            state[:remaining] for state in (self._own_lengths, self._owners, self._places)
        )
        self._longest_own = int(self._own_lengths.max()) if remaining else 0
        self._drop_unused_prompts()
        return moves

    def advance(self) -> Tensor:
        """Make room for one token a row; returns the additive mask [rows, 1, 1, own tokens] for the forward pass."""
        self._own_lengths = self._own_lengths + 1
        self._longest_own += 1
        self._rows.reserve(self._rows.count, self._longest_own, self._rows.layers)
        return _mask(self._own_lengths, self._longest_own, self._rows.layers[0][0].dtype)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one token a row ([rows, heads, 1, head size]); returns keys and values of the rows' own tokens."""
        rows, last = torch.arange(len(self), device=self._device), self._own_lengths - 1
        for block, new in zip(self._rows.layers[layer], (keys, values), strict=True):
            block[rows, :, last] = new[:, :, 0]
        key_block, value_block = self._rows.layers[layer]
        return key_block[: len(self), :, : self._longest_own], value_block[: len(self), :, : self._longest_own]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._longest_prompt + self._longest_own - 1

    def attend_to_prompts(self, query: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial attention of scaled queries [rows, key heads, group, head size] over each row's prompt.

        See ``_partial`` for what it returns, one entry a row.
        """
        key_block, value_block = self._prompts.layers[layer]
        count, width = self._prompts.count, self._longest_prompt
        _, heads, group, size = query.shape
        by_prompt = query.new_zeros(count * self._num_places, heads, group, size)
        places = self._owners * self._num_places + self._places
        by_prompt[places] = query
        by_prompt = by_prompt.view(count, self._num_places, heads, group, size).transpose(1, 2).flatten(2, 3)
        partial = _partial(by_prompt, key_block[:count, :, :width], value_block[:count, :, :width], self._prompt_mask)
        output, highest, total = (
            part.unflatten(2, (self._num_places, group))[self._owners, :, self._places] for part in partial
        )
        return output, highest, total

    def _drop_unused_prompts(self) -> None:
        unused = [p for p, num_users in enumerate(self._num_users) if num_users == 0]
        if not unused:
            return
        moves = _closing_moves(unused, len(self._num_users))
        source, target = (self._integers([move[side] for move in moves]) for side in (0, 1))
        self._prompts.move(source, target, len(unused), self._longest_prompt)
        self._prompt_lengths[target] = self._prompt_lengths[source]
        renamed = torch.arange(len(self._num_users), device=self._device)
        renamed[source] = target
        self._owners = renamed[self._owners]
        for old, new in moves:
            self._num_users[new] = self._num_users[old]
        del self._num_users[self._prompts.count :]
        self._prompt_lengths = self._prompt_lengths[: self._prompts.count]
        self._mask_prompts()

    def _mask_prompts(self) -> None:
        self._longest_prompt = int(self._prompt_lengths.max()) if len(self._prompt_lengths) else 0
        self._prompt_mask = _mask(self._prompt_lengths, self._longest_prompt, self._prompts.layers[0][0].dtype)

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class _Block:
    """Keys and values of all layers, each [capacity, heads, width, head size]; the first ``count`` items are in use."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.count = 0
        self._capacity = self._width = 0

    def reserve(self, capacity: int, width: int, like: list[tuple[Tensor, Tensor]]) -> None:
        """Have room for ``capacity`` items of ``width`` tokens; heads, sizes and types are those of ``like``."""
        if capacity <= self._capacity and width <= self._width:
            return
        if width > self._width:
            self._width = max(width, self._width + self._width // 2)
        if capacity > self._capacity:
            self._capacity = max(capacity, self._capacity + self._capacity // 2)
        for layer, pair in enumerate(like):
            # Zeros, not empty: a masked position is multiplied by weight 0, which does not hide a NaN.
            grown = [block.new_zeros(self._capacity, block.shape[1], self._width, block.shape[3]) for block in pair]
            if layer == len(self.layers):
                self.layers.append((grown[0], grown[1]))
                continue
            for new, old in zip(grown, self.layers[layer], strict=True):
                new[: self.count, :, : old.shape[2]] = old[: self.count]
            # Replaced layer by layer, so that only one is in memory twice.
            self.layers[layer] = (grown[0], grown[1])

    def move(self, source: Tensor, target: Tensor, num_dropped: int, width: int) -> None:
        """Copy items ``source`` over items ``target``, then forget the last ``num_dropped``."""
        if len(source):
            for block in (block for pair in self.layers for block in pair):
                block[target, :, :width] = block[source, :, :width]
        self.count -= num_dropped


def _closing_moves(gone: list[int], count: int) -> list[tuple[int, int]]:
    """Which of the last of ``count`` items move to which gaps, so that the remaining ones come first."""
    remaining = count - len(gone)
    gone_set = set(gone)
    last_ones = [item for item in range(remaining, count) if item not in gone_set]
    return list(zip(last_ones, sorted(item for item in gone if item < remaining), strict=True))


def _mask(lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.arange(width, device=lengths.device) >= lengths[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, -torch.inf)[:, None, None]


def _partial(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unnormalised attention: weighted values, the highest score, the sum of weights relative to it (float32)."""
    scores = (query @ keys.transpose(2, 3) + mask).float()
    highest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - highest).exp_()
    return (weights.to(values.dtype) @ values).float(), highest, weights.sum(dim=-1, keepdim=True)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slots: SlotCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D], key and value [B, key heads, L, D] give [B, T, H, D].

    With ``slots`` (an argument of the model's forward pass, handed down by transformers), key and value are the rows'
    own tokens and T is 1; without, this is causal attention over whole prompts.

    Raises:
        EnvironmentProblem: the model wants an attention that this engine does not compute.
    """
    unusual = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    # A mask comes only with slots: without them, the model has not handed them down.
    if unusual or (slots is None and attention_mask is not None):
        raise EnvironmentProblem(
            f"The Hugging Face engine does not compute the attention of {type(module).__name__}"
            f"{' with ' if unusual else ''}{', '.join(unusual)}.",
            hint="Use engine=vllm for this model.",
        )
    if slots is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
        return output, None
    num_rows, num_heads, _, size = query.shape
    scaled = query * kwargs.get("scaling", size**-0.5)
    grouped = scaled.reshape(num_rows, key.shape[1], num_heads // key.shape[1], size)
    own, own_highest, own_total = _partial(grouped, key, value, attention_mask)
    prompt, prompt_highest, prompt_total = slots.attend_to_prompts(grouped, int(module.layer_idx))
    highest = torch.maximum(own_highest, prompt_highest)
    own_share, prompt_share = (own_highest - highest).exp_(), (prompt_highest - highest).exp_()
    joined = (own * own_share + prompt * prompt_share) / (own_total * own_share + prompt_total * prompt_share)
    return joined.to(query.dtype).reshape(num_rows, 1, num_heads, value.shape[3]), None
