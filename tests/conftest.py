"""Model folders that many tests read: a tokenizer with a chat template, and a small random Llama around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from small_tokenizer import write_tokenizer

pytest_plugins = ("promises",)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, chat template and config, no weights."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder with a random Llama of about 0.9 million parameters, by seed; grouped heads, 512 ids, 256 positions."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        if seed in made:
            return made[seed]
        folder = write_tokenizer(tmp_path_factory.mktemp(f"llama-{seed}"))
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        made[seed] = folder
        return folder

    return make
