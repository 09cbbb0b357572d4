"""Writes a small tokenizer with a chat template, for tests that need a real one."""

from __future__ import annotations

import json
from pathlib import Path

# The turn marks of SmolLM2 and Qwen: an end of turn that is the end-of-sequence token, then a line break.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Tom has 12 apples and buys 7 more. How many apples does he have now? The answer is 19.",
    "A train drives 45 km in an hour and then 30 km in the next. It drove 75 km. Step 1: 45 + 30 = 75.",
    "system user assistant\nYou are a helpful assistant.\nÄpfel, naïve, 数学, 🙂",
]


def write_tokenizer(folder: Path, template: str = CHATML) -> Path:
    """A byte-level BPE tokenizer of at most 512 ids, its config and ``template``, into ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 256}))
    return folder
