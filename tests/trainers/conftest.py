"""A two-layer Llama with random weights, and a job that a test can vary."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sft_rows import VOCAB, Events, write_rows

from reasonrun.records import Checkpoint, PreferenceExample, SFTExample
from reasonrun.training import PreferenceSettings, SFTSettings, TrainJob


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """More threads than idle cores make a model of this size a hundred times slower; child processes inherit it."""
    import torch

    num_threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"any": "bytes"}\n')
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return Checkpoint(path=str(folder), weights="w", tokenizer="t")


JobMaker = Callable[..., TrainJob]


@pytest.fixture
def make_job(tmp_path: Path, start: Checkpoint) -> JobMaker:
    """``make_job(examples, out="a", num_steps=4, lr=…)``: words that are not of the job are settings."""

    def make(
        examples: Sequence[SFTExample] | Sequence[PreferenceExample],
        *,
        out: str = "out",
        num_steps: int = 4,
        job: dict[str, Any] | None = None,
        **settings: Any,
    ) -> TrainJob:
        out_dir = tmp_path / out
        out_dir.mkdir()
        kind = examples[0].kind if examples else "sft"
        settings_type = {"sft": SFTSettings, "preference": PreferenceSettings}[kind]
        chosen = settings_type(**{"lr": 1e-3, "batch_size": 4, "checkpoint_every": 1000, **settings})
        fields: dict[str, Any] = {
            "kind": kind,
            "rows": (write_rows(tmp_path / f"{out}.parquet", examples),),
            "start": start,
            "settings": chosen.model_dump(mode="json"),
            "num_steps": num_steps,
            "seed": 11,
            "out_dir": str(out_dir),
        }
        return TrainJob(**{**fields, **(job or {})})

    return make


@pytest.fixture
def events() -> Events:
    return Events()
