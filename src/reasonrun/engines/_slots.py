"""Keys and values of the rows that are being decoded: a dense block of slots, each with a length of its own.

Rows enter at the end of the block after a prefill without padding on the left, and leave by the last row moving into
their place, so the block never holds a finished row and needs no gather of the whole cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reasonrun.errors import EnvironmentProblem

ATTENTION = "reasonrun_slots"
# Room for new tokens beyond the longest row; the block grows by half its size when that is used up.
_HEADROOM = 32


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
    """What the model takes for a cache while it decodes one token a row.

    ``lengths`` [rows] counts the tokens whose keys and values each row holds; ``advance`` adds one to each.
    """

    is_compileable = False

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.device = device
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._width = 0
        self._longest = 0
        self._rows = torch.arange(num_slots, device=device)

    def __len__(self) -> int:
        return len(self.lengths)

    def append(self, prompt: PromptCache, prompt_index: Tensor, prompt_lengths: Tensor) -> None:
        """Add rows: row i continues prompt ``prompt_index[i]`` of a prefill, ``prompt_lengths[i]`` tokens long."""
        width = prompt.layers[0][0].shape[2]
        self._reserve(max(width, self._longest) + _HEADROOM, prompt)
        rows = slice(len(self), len(self) + len(prompt_index))
        for (keys, values), (new_keys, new_values) in zip(self._blocks, prompt.layers, strict=True):
            keys[rows, :, :width] = new_keys[prompt_index]
            values[rows, :, :width] = new_values[prompt_index]
        self.lengths = torch.cat([self.lengths, prompt_lengths])
        self._longest = max(self._longest, width)

    def drop(self, rows: list[int]) -> list[tuple[int, int]]:
        """Remove rows; returns the moves (from, to) that close the gaps, for the caller's own per-row state."""
        remaining = len(self) - len(rows)
        gone = set(rows)
        moved = [row for row in range(remaining, len(self)) if row not in gone]
        moves = list(zip(moved, sorted(row for row in rows if row < remaining), strict=True))
        if moves:
            source, target = (torch.tensor(side, device=self.device) for side in zip(*moves, strict=True))
            for block in (block for pair in self._blocks for block in pair):
                block[target, :, : self._longest] = block[source, :, : self._longest]
            self.lengths[target] = self.lengths[source]
        self.lengths = self.lengths[:remaining]
        self._longest = int(self.lengths.max()) if remaining else 0
        return moves

    def advance(self) -> Tensor:
        """Make room for one token a row; returns the additive attention mask [rows, 1, 1, length].

        The model's next forward pass writes at position ``lengths - 1`` of each row.
        """
        self.lengths = self.lengths + 1
        self._longest += 1
        self._reserve(self._longest)
        visible = self._positions < self.lengths[:, None]
        mask = torch.zeros(visible.shape, dtype=self._blocks[0][0].dtype, device=self.device)
        return mask.masked_fill_(~visible, -torch.inf)[:, None, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one token a row ([rows, heads, 1, head size]); returns all keys and values of the rows."""
        rows, last = self._rows[: len(self)], self.lengths - 1
        stored = self._blocks[layer]
        for block, new in zip(stored, (keys, values), strict=True):
            block[rows, :, last] = new[:, :, 0]
        return stored[0][: len(self), :, : self._longest], stored[1][: len(self), :, : self._longest]

    def get_seq_length(self, layer: int = 0) -> int:
        return self._longest - 1

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self._longest, device=self.device)

    def _reserve(self, width: int, prompt: PromptCache | None = None) -> None:
        if width <= self._width:
            return
        self._width = max(width, self._width + self._width // 2)
        if not self._blocks and prompt is not None:
            self._blocks = [(self._empty(keys), self._empty(values)) for keys, values in prompt.layers]
            return
        for layer, pair in enumerate(self._blocks):
            wider = tuple(self._empty(block) for block in pair)
            for block, old in zip(wider, pair, strict=True):
                block[: len(self), :, : old.shape[2]] = old[: len(self)]
            self._blocks[layer] = (wider[0], wider[1])

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros, not empty: a masked position is multiplied by weight 0, which does not hide a NaN.
        return like.new_zeros(self.num_slots, like.shape[1], self._width, like.shape[3])


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [B, H, T, D], key and value [B, key heads, L, D] give [B, T, H, D].

    One new token a row on the CPU is done by two products over the key heads, which reads each key once where the
    built-in kernel first repeats keys for every query head. All else is the built-in kernel's.

    Raises:
        EnvironmentProblem: the model wants an attention that neither computes (capped scores, sinks, biases).
    """
    unusual = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unusual:
        raise EnvironmentProblem(
            f"The Hugging Face engine does not compute attention with {', '.join(unusual)}, which this model needs.",
            hint="Use engine=vllm for this model.",
        )
    if query.shape[2] > 1 or query.device.type != "cpu" or attention_mask is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    num_rows, num_heads, _, head_size = query.shape
    num_key_heads = key.shape[1]
    grouped = (query * kwargs.get("scaling", head_size**-0.5)).reshape(
        num_rows, num_key_heads, num_heads // num_key_heads, head_size
    )
    scores = grouped @ key.transpose(2, 3) + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(num_rows, 1, num_heads, head_size), None
