"""Attention over prompt and own tokens, against the plain kernel row by row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from reasonrun.engines._slots import PromptCache, SlotCache, attend
from reasonrun.errors import EnvironmentProblem

KEY_HEADS, GROUP, SIZE = 2, 3, 8
LAYER = SimpleNamespace(layer_idx=0)


def prompts(lengths: list[int]) -> PromptCache:
    cache = PromptCache()
    cache.update(*torch.randn(2, len(lengths), KEY_HEADS, max(lengths), SIZE).unbind(), 0)
    return cache


# Scores of some 1, and of some 300: only differences to the highest one can be exponentiated.
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_rows_that_come_and_go_attend_as_if_alone(scale: float) -> None:
    torch.manual_seed(0)
    cache = SlotCache(torch.device("cpu"))
    history: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # per row, (key, value) of each token seen

    def enter(lengths: list[int], num_samples: list[int]) -> None:
        prompt = prompts(lengths)
        keys, values = prompt.layers[0]
        cache.append(prompt, lengths, num_samples)
        for p, count in enumerate(num_samples):
            history.extend([(keys[p, :, t], values[p, :, t]) for t in range(lengths[p])] for _ in range(count))

    def leave(rows: list[int]) -> None:
        for source, target in cache.drop(rows):
            history[target] = history[source]
        del history[len(cache) :]

    def decode() -> None:
        mask = cache.advance()
        query = scale * torch.randn(len(cache), KEY_HEADS * GROUP, 1, SIZE)
        new_keys, new_values = torch.randn(2, len(cache), KEY_HEADS, 1, SIZE).unbind()
        assert cache.positions.tolist() == [len(tokens) for tokens in history]
        output, _ = attend(LAYER, query, *cache.update(new_keys, new_values, 0), mask, slots=cache)  # type: ignore[arg-type]
        for row, tokens in enumerate(history):
            tokens.append((new_keys[row, :, 0], new_values[row, :, 0]))
            keys, values = (torch.stack(side, dim=1)[None] for side in zip(*tokens, strict=True))
            expected = scaled_dot_product_attention(query[row : row + 1], keys, values, enable_gqa=True)
            torch.testing.assert_close(output[row], expected[0].transpose(0, 1), rtol=1e-3, atol=1e-4)

    enter([5, 2, 9], [2, 1, 3])
    decode()
    leave([2, 0])  # the second prompt has no row left
    decode()
    enter([12, 1], [4, 1])
    for _ in range(40):  # more own tokens than there is room for at first
        decode()
    leave([0, 1, 2, 3, 5])
    decode()
    enter([3], [1])
    decode()
    leave(list(range(len(cache))))
    enter([4], [2])
    decode()


def test_attention_that_would_miss_the_prompts_is_refused() -> None:
    query = torch.randn(1, KEY_HEADS * GROUP, 1, SIZE)
    key = torch.randn(1, KEY_HEADS, 4, SIZE)
    with pytest.raises(EnvironmentProblem, match="does not compute the attention of"):
        attend(LAYER, query, key, key, torch.zeros(1, 1, 1, 4))  # type: ignore[arg-type]
