"""Merging by hand: small tensors whose averages are written out, models that do not fit, and what must survive."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from reasonrun import merging
from reasonrun.errors import RecipeError, RunFailed
from reasonrun.generation import Request
from reasonrun.merging import average, decode, encode, merge_folders, read_header
from reasonrun.models import checked, resolve
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Message, Sampling
from reasonrun.rendering import Renderer


def folder(path: Path, tensors, name="model.safetensors", save=save_file) -> Path:
    path.mkdir(exist_ok=True)
    save(tensors, path / name, metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"from": path.name}))
    return path


def floats(*values, shape=None) -> np.ndarray:
    return np.array(values, np.float32).reshape(shape or (len(values),))


@pytest.fixture
def a(tmp_path):
    return folder(tmp_path / "a", {"w": floats(1, 2, 3, 4, shape=(2, 2)), "b": floats(-8, 0.5)})


@pytest.fixture
def b(tmp_path):
    return folder(tmp_path / "b", {"w": floats(5, 2, -1, 0, shape=(2, 2)), "b": floats(0, 4.5)})


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_size", [1, 3, 1 << 22])
def test_a_quarter_and_three_quarters(tmp_path, monkeypatch, a, b, slice_size):
    monkeypatch.setattr(merging, "_SLICE", slice_size)
    merge_folders([a, b], [0.25, 0.75], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["w"].tolist() == [[4, 2], [0, 1]] and found["b"].tolist() == [-2, 3.5]
    assert found["w"].dtype == np.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"from": "a"}


def test_three_models_with_a_weight_of_nothing(tmp_path, a, b):
    c = folder(tmp_path / "c", {"w": floats(9, 9, 9, 9, shape=(2, 2)), "b": floats(100, 100)})
    merge_folders([a, b, c], [0.5, 0.5, 0.0], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["w"].tolist() == [[3, 2], [1, 2]] and found["b"].tolist() == [-4, 2.5]


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1.00390625, 1.0),  # 1 + 2^-8, half way between 1 and 1 + 2^-7: the even one
        (1.01171875, 1.015625),  # 1 + 3 * 2^-8, half way again: the even one is above
        (1.00390637, 1.0078125),  # just above half way
        (-1.00390625, -1.0),
        (3.3895313892515355e38, 3.3895313892515355e38),  # the largest
        (1e-40, 2.0**-133),  # below the smallest normal number
    ],
)
def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even(value, rounded):
    data = encode(floats(value), "BF16")
    assert len(data) == 2 and decode(data, "BF16")[0] == np.float32(rounded)
    assert decode(data, "BF16")[0] == torch.tensor([value]).to(torch.bfloat16).float().item()


def test_bfloat16_agrees_with_torch_on_many_numbers():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    assert np.array_equal(decode(encode(values, "BF16"), "BF16"), theirs)


def test_a_bfloat16_model_is_averaged_in_float32_and_rounded_once(tmp_path):
    x, y = torch.randn(2, 500, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    models = [folder(tmp_path / name, {"w": t.clone()}, save=save_torch) for name, t in (("a", x), ("b", y))]
    merge_folders(models, [0.3, 0.7], tmp_path / "out")
    found = load_torch(tmp_path / "out" / "model.safetensors")["w"]
    exact = (0.3 * x.double() + 0.7 * y.double()).to(torch.float32).to(torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact)


def test_the_result_has_the_data_type_of_the_first(tmp_path, a):
    half = folder(tmp_path / "half", {"w": np.full((2, 2), 0.5, np.float16), "b": np.array([0, 0], np.float16)})
    merge_folders([a, half], [0.5, 0.5], tmp_path / "ab")
    merge_folders([half, a], [0.5, 0.5], tmp_path / "ba")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ab", "ba"))
    assert one["w"].dtype == np.float32 and other["w"].dtype == np.float16
    assert one["w"].tolist() == other["w"].tolist() == [[0.75, 1.25], [1.75, 2.25]]


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7], [0.1] * 10])
def test_what_is_equal_in_all_models_stays_to_the_last_bit(weights):
    values = np.random.default_rng(3).standard_normal(1000).astype(np.float32)
    assert np.array_equal(average([values] * len(weights), weights), values)


def test_float64_keeps_its_digits():
    parts = [np.array([1.0]), np.array([1.0 + 1e-12])]
    assert average(parts, [0.5, 0.5])[0] == 1.0 + 5e-13 != 1.0


# -- files -------------------------------------------------------------------------------------------------------------


def test_shards_are_read_through_their_index_and_the_first_ones_layout_stays(tmp_path, a, b):
    sharded = folder(tmp_path / "sharded", {"w": floats(5, 2, -1, 0, shape=(2, 2))}, "model-00001-of-00002.safetensors")
    folder(sharded, {"b": floats(0, 4.5)}, "model-00002-of-00002.safetensors")
    names = {"w": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    folder(sharded, {"w": floats(7)}, "consolidated.safetensors")  # which the index does not name
    merge_folders([a, sharded], [0.25, 0.75], tmp_path / "whole")
    assert [path.name for path in sorted((tmp_path / "whole").iterdir())] == ["config.json", "model.safetensors"]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    merge_folders([sharded, a], [0.75, 0.25], tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "config.json",
        *sorted(names.values()),
        "model.safetensors.index.json",
    ]
    for name, file in names.items():
        assert np.array_equal(load_file(tmp_path / "parts" / file)[name], whole[name])
    assert whole["w"].tolist() == [[4, 2], [0, 1]]


def test_buffers_that_are_no_floats_are_kept_and_must_agree(tmp_path):
    counted = {"w": floats(1), "count": np.array([3, 4]), "mask": np.array([True, False])}
    x, y = folder(tmp_path / "x", counted), folder(tmp_path / "y", {**counted, "w": floats(3)})
    merge_folders([x, y], [0.5, 0.5], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["w"].tolist() == [2] and found["count"].tolist() == [3, 4] and found["mask"].tolist() == [True, False]
    z = folder(tmp_path / "z", {**counted, "count": np.array([3, 5])})
    with pytest.raises(RunFailed, match="count holds I64, which has no average, and differs"):
        merge_folders([x, z], [0.5, 0.5], tmp_path / "no")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"w": floats(0, 0, 0, 0, shape=(2, 2))}, "b is in the first only"),
        (
            {"w": floats(0, 0, 0, 0, shape=(2, 2)), "b": floats(0, 0), "lm_head": floats(0)},
            "lm_head is in the other only",
        ),
        ({"w": floats(0, 0, 0, 0), "b": floats(0, 0)}, r"w has shape \[2, 2\] and \[4\]"),
        ({"w": floats(0, 0, 0, 0, shape=(2, 2)), "b": np.array([1, 2])}, "b has type F32 and I64"),
    ],
)
def test_models_with_other_tensors_are_refused_by_name(tmp_path, a, tensors, said):
    other = folder(tmp_path / "other", tensors)
    with pytest.raises(RecipeError, match=said):
        merge_folders([a, other], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_first_differences_are_named_and_the_others_counted(tmp_path):
    x = folder(tmp_path / "x", {f"w{n}": floats(1) for n in range(9)})
    y = folder(tmp_path / "y", {"v": floats(1)})
    with pytest.raises(RecipeError, match=r"w0 is in the first only[\s\S]*w2 is[\s\S]*… and 7 more"):
        merge_folders([x, y], [0.5, 0.5], tmp_path / "out")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.promise("G12", "merges")
def test_a_result_that_is_not_finite_is_no_model(tmp_path, a, bad):
    other = folder(tmp_path / "other", {"w": floats(0, 0, bad, 0, shape=(2, 2)), "b": floats(0, 0)})
    with pytest.raises(RunFailed, match="w of the merged model is not finite in F32"):
        merge_folders([a, other], [0.5, 0.5], tmp_path / "out")


def test_what_only_its_data_type_cannot_hold_is_not_finite_either(tmp_path):
    x = folder(tmp_path / "x", {"w": np.array([1], np.float16)})
    y = folder(tmp_path / "y", {"w": floats(1e6)})
    with pytest.raises(RunFailed, match="not finite in F16"):
        merge_folders([x, y], [0.5, 0.5], tmp_path / "out")


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_a_damaged_file_is_told(tmp_path, a, b, size):
    path = b / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(RunFailed, match="damaged"):
        merge_folders([a, b], [0.5, 0.5], tmp_path / "out")


# -- models ------------------------------------------------------------------------------------------------------------


def perturbed(source: Path, target: Path) -> Path:
    """A copy of a model whose every number is a little off."""
    shutil.copytree(source, target)
    generator = np.random.default_rng(5)
    tensors = load_file(source / "model.safetensors")
    off = {name: (t + 1e-3 * generator.standard_normal(t.shape)).astype(t.dtype) for name, t in tensors.items()}
    save_file(off, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_model_merged_with_itself_is_itself(tmp_path):
    tiny = Path(resolve(ModelSettings(name="tiny")).path)
    merge_folders([tiny, tiny, tiny], [0.2, 0.5, 0.3], tmp_path / "out")
    for path in tiny.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_tiny_and_a_perturbed_tiny_merge_into_a_model_that_answers(tmp_path):
    from reasonrun.engines.hf import HuggingFace

    tiny = Path(resolve(ModelSettings(name="tiny")).path)
    merge_folders([tiny, perturbed(tiny, tmp_path / "other")], [0.5, 0.5], tmp_path / "out")
    found = checked(tmp_path / "out")
    renderer = Renderer.load(found.path)
    assert found.tokenizer == renderer.digest == Renderer.load(tiny).digest
    assert read_header(tmp_path / "out/model.safetensors")[0] == read_header(tiny / "model.safetensors")[0]
    engine = HuggingFace(HuggingFace.Settings(num_threads=1, device="cpu"))
    engine.load(found)
    ids = renderer.render([Message(role="user", content="Tom has 12 apples and buys 7 more. How many?")])
    sampling = Sampling(temperature=0, max_new_tokens=16)
    (answer,) = engine.generate([Request(key="k", problem_id="p", prompt_ids=ids, n=1, seed=0, sampling=sampling)])
    assert len(answer.token_ids) > 3 and answer.text
