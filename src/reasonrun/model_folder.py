"""What the files of a Hugging Face model folder say, read without transformers, and those that training leaves as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from reasonrun.errors import EnvironmentProblem

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
# Tokenizers without a limit of their own write a number near 1e30 there.
_NO_LIMIT = 10**9

INDEX_NAME = "model.safetensors.index.json"
# What belongs to tokenizer and chat template, and the configs. Training changes none of them, so they are copied byte
# for byte: writing them anew would change their digest with every version of transformers.
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)


class ModelFolder:
    """A folder with ``config.json``, a fast tokenizer and safetensors weights.

    Every method raises EnvironmentProblem with the next step when what it reads is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def tokenizer_path(self) -> Path:
        """``tokenizer.json``, which is there."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise EnvironmentProblem(
                f"{self.path} has no tokenizer.json.",
                hint="Save it there with AutoTokenizer.from_pretrained(model).save_pretrained(folder).",
            )
        return path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return self._json("config.json", required=True)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Text of ``bos_token``, ``eos_token`` …, those that the tokenizer has."""
        tokens: dict[str, str] = {}
        for source in (self._json("special_tokens_map.json"), self._tokenizer_config):
            for name in _SPECIAL_TOKENS:
                value = source.get(name)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    tokens[name] = text
        return tokens

    def chat_template(self) -> str:
        """Jinja source: ``chat_template.jinja``, else the (default) template in ``tokenizer_config.json``."""
        path = self.path / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        stored = self._tokenizer_config.get("chat_template")
        if isinstance(stored, list):
            stored = {entry.get("name"): entry.get("template") for entry in stored}.get("default")
        if not isinstance(stored, str) or not stored:
            raise EnvironmentProblem(
                f"{self.path} has no chat template, so messages cannot be put to this model.",
                hint="Use the instruction-tuned variant, or write a chat_template.jinja into a copy of the folder.",
            )
        return stored

    def eos_ids(self, token_to_id: Callable[[str], int | None]) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's own first, then those of the generation and the model config."""
        ids: list[int] = []
        own = token_to_id(self.special_tokens.get("eos_token", ""))
        if own is not None:
            ids.append(own)
        for source in (self._json("generation_config.json"), self.config):
            declared = source.get("eos_token_id")
            ids += declared if isinstance(declared, list) else [declared] if isinstance(declared, int) else []
        if not ids:
            raise EnvironmentProblem(
                f"{self.path} names no end-of-sequence token, so an answer would never end.",
                hint='Set "eos_token" in tokenizer_config.json or "eos_token_id" in generation_config.json.',
            )
        return tuple(dict.fromkeys(ids))

    def context_length(self) -> int:
        """Longest sequence in tokens."""
        nested = self.config.get("text_config")
        for source in (self.config, nested if isinstance(nested, dict) else {}):
            for key in _CONTEXT_KEYS:
                if isinstance(source.get(key), int):
                    return int(source[key])
        limit = self._tokenizer_config.get("model_max_length")
        if isinstance(limit, int | float) and limit < _NO_LIMIT:
            return int(limit)
        raise EnvironmentProblem(
            f"{self.path} does not say how long its context is.",
            hint='Set "max_position_embeddings" in config.json or "model_max_length" in tokenizer_config.json.',
        )

    def vocab_size(self) -> int:
        """Rows of the embedding, those without a token included."""
        nested = self.config.get("text_config")
        for source in (self.config, nested if isinstance(nested, dict) else {}):
            if isinstance(source.get("vocab_size"), int) and source["vocab_size"] > 0:
                return int(source["vocab_size"])
        raise EnvironmentProblem(
            f"{self.path / 'config.json'} does not say how many tokens the model knows.",
            hint='Set "vocab_size" in it, or copy the file again from its source.',
        )

    def weight_paths(self) -> tuple[Path, ...]:
        """The safetensors files, by name.

        Raises:
            EnvironmentProblem: there are none (pickled weights are never opened), or a shard that the index names is
                missing.
        """
        present = {path.name for path in self.path.glob("*.safetensors")}
        indexed = self._json(INDEX_NAME).get("weight_map", {})
        missing = sorted(set(indexed.values()) - present)
        if missing:
            raise EnvironmentProblem(
                f"{self.path} lacks {len(missing)} of its weight files: {', '.join(missing[:3])} …",
                hint="Copy or download the folder again.",
            )
        if not present:
            pickles = sorted(
                path.name for suffix in ("bin", "pt", "pth", "pkl") for path in self.path.glob(f"*.{suffix}")
            )
            found = f" It has {', '.join(pickles[:3])}, but opening a pickle runs code from it." if pickles else ""
            raise EnvironmentProblem(
                f"{self.path} has no safetensors weights.{found}",
                hint="Use a revision with safetensors, or convert the folder with save_pretrained in a sandbox.",
            )
        return tuple(self.path / name for name in sorted(set(indexed.values()) or present))

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        return self._json("tokenizer_config.json")

    def _json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            if not required:
                return {}
            raise EnvironmentProblem(
                f"{self.path} has no {name}.", hint="Point at a complete Hugging Face model folder."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(
                f"{path} cannot be read: {error}", hint="Copy the file again from its source."
            ) from error
        return content if isinstance(content, dict) else {}


def copy_all_but_weights(source: Path, target: Path) -> None:
    """Copy configs, tokenizer and chat template from one model folder into another."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)
