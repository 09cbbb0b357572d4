"""No code comes from a model folder: pickles are never opened, and Python beside the weights runs for a pinned commit only."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bad_input import reasonrun
from safetensors.numpy import save_file

from small_tokenizer import write_tokenizer

pytestmark = [pytest.mark.attack, pytest.mark.promise("G19", "hostile models")]

OWNED = "owned"


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path(OWNED).write_text, ("x",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder as the Hub has many, without weights."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 16}
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "eos_token_id": 2}))
    return folder


def evaluated(folder: Path, engine: str = "scripted") -> tuple[int, str]:
    small = ["task.num_test=2", "evaluate.max_new_tokens=16", "--run", f"out-{engine}"]
    done = reasonrun("eval", "arith", "--engine", engine, "--model", str(folder), *small)
    assert "Traceback" not in done.text
    return done.exit_code, done.text


def test_the_payload_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert Path(OWNED).exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl"])
def test_pickled_weights_are_named_and_never_opened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload()))
    code, text = evaluated(folder)
    assert code == 3 and f"It has {name}, but opening a pickle runs code from it" in text
    assert "Use a revision with safetensors" in text and not Path(OWNED).exists()


def test_a_pickle_beside_or_instead_of_safetensors_is_never_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))  # a pickle under a harmless name
    code, text = evaluated(folder, "hf")
    assert code in (1, 3) and not Path(OWNED).exists(), text
    save_file({"a": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    assert evaluated(folder)[0] in (0, 2, 5) and not Path(OWNED).exists()  # a scripted run reads no weights


def test_a_config_that_says_too_little_is_no_traceback(folder: Path) -> None:
    save_file({"a": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 256, "eos_token_id": 2}')
    code, text = evaluated(folder, "hf")
    assert code == 3 and "does not say how many tokens the model knows" in text
    (folder / "config.json").write_text('{"model_type": ')
    code, text = evaluated(folder, "hf")
    assert code == 3 and "config.json cannot be read" in text and "Copy the file again" in text


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_a_config_names_is_not_imported(folder: Path, where: str) -> None:
    save_file({"a": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    named = {
        "config.json": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.T", "evil.T"]},
    }
    config = json.loads((folder / where).read_text())
    changed = {**config, "auto_map": named[where], "model_type": "evil_model"} if where == "config.json" else config
    (folder / where).write_text(json.dumps({**changed, "auto_map": named[where]}))
    (folder / "evil.py").write_text(f"open({str(folder.parent / OWNED)!r}, 'w').close()\n")
    code, text = evaluated(folder, "hf")
    assert not Path(OWNED).exists(), text
    if where == "config.json":
        assert "runs Python code of its own, which the recipe does not allow" in text
        assert code == 2 and "trust_remote_code_commit" in text


def test_weights_that_the_files_lack_are_not_drawn_at_random(folder: Path) -> None:
    save_file({"a": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    code, text = evaluated(folder, "hf")
    assert code == 3 and "lack 12 of the model's weights: lm_head.weight" in text


def test_a_chat_template_can_only_write_text(folder: Path) -> None:
    save_file({"a": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__['os'].system('touch owned') }}",
        "{% include '/etc/passwd' %}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        code, text = evaluated(folder)
        assert code in (2, 3) and not Path(OWNED).exists() and "root:" not in text, text
