"""Converts what is not a plain safetensors folder with a fast tokenizer. Run as a process of its own by ``models.py``.

python -m reasonrun.conversion gguf MODEL.gguf OUT_DIR
python -m reasonrun.conversion tokenizer MODEL_DIR OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert_gguf(source: Path, out_dir: Path) -> None:
    """Write the language model of a GGUF file to ``out_dir``: bfloat16 safetensors, config, tokenizer, template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = loaded.config
    # save_pretrained refuses a model whose config says that it is quantized, which the dequantized one still does.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config).to(torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out_dir)


def convert_tokenizer(source: Path, out_dir: Path) -> None:
    """Write a slow tokenizer's fast twin to ``out_dir``."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source, use_fast=True, local_files_only=True).save_pretrained(out_dir)


def main(arguments: list[str]) -> None:
    kind, source, out_dir = arguments
    {"gguf": convert_gguf, "tokenizer": convert_tokenizer}[kind](Path(source), Path(out_dir))


if __name__ == "__main__":
    main(sys.argv[1:])
