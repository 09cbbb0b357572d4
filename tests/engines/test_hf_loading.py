"""What the Hugging Face engine loads, reloads and refuses to load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from engine_runs import MakeLlama, ask, checkpoint, engine_for, reference_greedy, rows_of

from reasonrun.engines.hf import HuggingFace
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from small_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def llama(make_llama: MakeLlama) -> Path:
    return make_llama(0)


def test_new_weights_are_copied_into_the_model_that_is_there(make_llama: MakeLlama) -> None:
    requests = ask(5, max_new_tokens=8, temperature=0)
    engine = engine_for(make_llama(0))
    model, first = engine._model, rows_of(engine, requests)
    engine.load(checkpoint(make_llama(1)))
    assert engine._model is model
    second = rows_of(engine, requests)
    assert second == rows_of(engine_for(make_llama(1)), requests)
    assert second != first


def test_weights_of_another_architecture_make_a_new_model(llama: Path, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    folder = write_tokenizer(tmp_path)
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        sliding_window=24,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    engine = engine_for(llama)
    engine.load(checkpoint(folder))
    requests = [
        r.model_copy(update={"prompt_ids": r.prompt_ids[:14]}) for r in ask(6, max_new_tokens=10, temperature=0)
    ]
    rows = rows_of(engine, requests)
    assert {key: row.token_ids for (key, _), row in rows.items()} == reference_greedy(folder, requests)
    # Beyond its window this model would need a mask that the engine does not make.
    with pytest.raises(EnvironmentProblem, match=r"25 tokens outgrows the 24-token attention window"):
        list(engine.generate([requests[0].model_copy(update={"prompt_ids": (5,) * 15})]))


def test_a_changed_config_makes_a_new_model_even_if_all_shapes_agree(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = engine_for(llama)
    engine.load(checkpoint(tmp_path))
    requests = ask(6, max_new_tokens=10, temperature=0)
    assert {key: row.token_ids for (key, _), row in rows_of(engine, requests).items()} == reference_greedy(
        tmp_path, requests
    )


def test_an_attention_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = write_tokenizer(tmp_path)
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(EnvironmentProblem, match=r"softcap(.|\n)*engine=vllm"):
        list(engine_for(folder).generate(ask(1)))


def test_a_device_that_is_not_there_is_explained(llama: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"engine.device=cuda:99 cannot be used"):
        engine_for(llama, device="cuda:99")


def test_damaged_weights_are_explained_at_first_load_and_at_reload(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for engine in (HuggingFace(HuggingFace.Settings(num_threads=1)), engine_for(llama)):
        with pytest.raises(EnvironmentProblem, match="cannot load the model"):
            engine.load(checkpoint(tmp_path))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model_with_code(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of a kind that only its own code knows; that code leaves a trace when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / COMMIT
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_kind",
        "auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_kind'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_of_a_model_does_not_run_unless_its_commit_is_named(model_with_code: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="runs Python code of its own, which the recipe does not allow"):
        engine_for(model_with_code)
    with pytest.raises(RecipeError, match="does not name the code"):
        engine_for(model_with_code, trust_remote_code_commit="f" * 40)
    assert not (tmp_path / "trace").exists()


def test_code_of_a_model_runs_when_its_commit_is_named(model_with_code: Path, tmp_path: Path) -> None:
    rows_of(engine_for(model_with_code, trust_remote_code_commit=COMMIT), ask(2, max_new_tokens=2))
    assert (tmp_path / "trace").exists()


def test_importing_the_engine_is_cheap() -> None:
    program = (
        "import sys, reasonrun.engines.hf, reasonrun.models, reasonrun.rendering\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_close_frees_the_model(llama: Path) -> None:
    engine = engine_for(llama)
    rows_of(engine, ask(2))
    model = weakref.ref(engine._model)
    engine.close()
    assert model() is None
    with pytest.raises(RunFailed, match="before load"):
        list(engine.generate(ask(1)))
    engine.load(checkpoint(llama))
    assert rows_of(engine, ask(1, max_new_tokens=1))
