"""What the Hugging Face engine samples, against plain transformers and against itself in other batches."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import MakeLlama, ask, engine_for, reference_greedy, rows_of

from reasonrun.engines.hf import HuggingFace
from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from reasonrun.records import Sampling
from reasonrun.rendering import Renderer


@pytest.fixture(scope="module")
def llama(make_llama: MakeLlama) -> Path:
    return make_llama(0)


@pytest.fixture(scope="module")
def engine(llama: Path) -> HuggingFace:
    return engine_for(llama)


@pytest.fixture(scope="module")
def talkative(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with 40 ids that end a sequence, so that lengths are ragged."""
    folder = tmp_path_factory.mktemp("talkative")
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(60, 100))}))
    return folder


def test_rows_do_not_depend_on_batch_size_order_or_other_rows(talkative: Path) -> None:
    requests = ask(50, n=4, max_new_tokens=20, top_p=0.95, top_k=200, temperature=0.8)
    wide = rows_of(engine_for(talkative), requests)
    shuffled = random.Random(1).sample(requests, 50)
    narrow = rows_of(engine_for(talkative, max_batch_rows=7, prefill_tokens=60), shuffled)
    assert len(wide) == 200
    assert narrow == wide
    # The case is worth something only if rows are ragged, and samples of one prompt differ.
    assert len({len(row.token_ids) for row in wide.values()}) > 10
    assert len({wide["r0", i].token_ids for i in range(4)}) == 4


def test_greedy_completions_equal_those_of_generate(llama: Path, engine: HuggingFace) -> None:
    requests = ask(12, max_new_tokens=16, temperature=0)
    rows = rows_of(engine, requests)
    assert {key: row.token_ids for (key, _), row in rows.items()} == reference_greedy(llama, requests)


def test_a_row_ends_at_its_first_end_of_sequence_token(engine: HuggingFace, talkative: Path) -> None:
    requests = ask(15, n=2, max_new_tokens=20)
    unhindered = rows_of(engine, requests)
    ends = {2, *range(60, 100)}
    for key, row in rows_of(engine_for(talkative), requests).items():
        whole = unhindered[key].token_ids
        first = next((i for i, token_id in enumerate(whole) if token_id in ends), None)
        assert row.token_ids == (whole if first is None else whole[: first + 1])
        assert row.finish_reason == ("length" if first is None else "stop")


def test_all_samples_of_a_request_share_one_prefill(engine: HuggingFace) -> None:
    requests = ask(6, n=5, max_new_tokens=3, temperature=0)
    seen: list[int] = []
    hook = engine._model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].numel())
    )
    rows = rows_of(engine, requests)
    hook.remove()
    longest = max(len(request.prompt_ids) for request in requests)
    # One block of 6 padded prompts, then two steps of 30 rows: the first token comes from the prefill.
    assert seen == [6 * longest, 30, 30]
    assert all(rows["r0", i].token_ids == rows["r0", 0].token_ids for i in range(5))


def test_logps_are_those_of_the_model_at_temperature_1(llama: Path, engine: HuggingFace) -> None:
    from transformers import AutoModelForCausalLM

    requests = ask(9, n=2, max_new_tokens=7, temperature=0.7, top_k=20, logprobs=True)
    prompts = {request.key: request.prompt_ids for request in requests}
    rows = list(rows_of(engine, requests).values())
    scored = engine.logprobs([(prompts[row.request], row.token_ids) for row in rows])
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    for row, logps in zip(rows, scored, strict=True):
        prompt = prompts[row.request]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row.token_ids])).logits[0].double()
        expected = [
            logits[len(prompt) - 1 + t].log_softmax(-1)[token_id].item() for t, token_id in enumerate(row.token_ids)
        ]
        assert logps == pytest.approx(expected, abs=2e-5)
        assert row.logps == pytest.approx(expected, abs=2e-5)


def test_scoring_in_small_blocks_keeps_the_order_and_empty_completions(llama: Path, engine: HuggingFace) -> None:
    sequences = [((5, 6, 7), (8, 9)), ((5,), ()), ((9, 8, 7, 6, 5, 4), (3,)), ((5, 6), (7, 8, 9))]
    one_by_one = [engine.logprobs([pair])[0] for pair in sequences]
    together = engine_for(llama, prefill_tokens=5).logprobs(sequences)
    assert [len(logps) for logps in together] == [2, 0, 1, 3]
    assert [x for row in together for x in row] == pytest.approx([x for row in one_by_one for x in row], abs=1e-5)
    with pytest.raises(ValueError, match="at least one token"):
        engine.logprobs([((), (3,))])


def test_requests_of_different_sampling_go_together(engine: HuggingFace) -> None:
    greedy, hot = ask(4, max_new_tokens=6, temperature=0), ask(4, max_new_tokens=9, temperature=1.5)
    hot = [request.model_copy(update={"key": f"hot-{request.key}"}) for request in hot]
    mixed = [request for pair in zip(greedy, hot, strict=True) for request in pair]
    assert rows_of(engine, mixed) == rows_of(engine, greedy) | rows_of(engine, hot)


def test_a_stop_string_ends_the_row_and_is_cut_from_the_text(llama: Path, engine: HuggingFace) -> None:
    requests = ask(20, max_new_tokens=16, temperature=0)
    renderer = Renderer.load(llama)
    whole = rows_of(engine, requests)
    # A stop string that spans two tokens of some answer, found without the engine's own search.
    middle = renderer.decode(whole["r3", 0].token_ids[5:7])
    assert len(middle) >= 2
    stopping = Sampling(max_new_tokens=16, temperature=0, stop=("never in an answer", middle))
    rows = rows_of(engine, [request.model_copy(update={"sampling": stopping}) for request in requests])
    assert rows["r3", 0].finish_reason == "stop_string"
    for key, row in rows.items():
        full = whole[key].token_ids
        hits = [k for k in range(1, len(full) + 1) if middle in renderer.decode(full[:k])]
        if not hits:
            assert (row.token_ids, row.finish_reason) == (full, whole[key].finish_reason)
            continue
        assert row.token_ids == full[: hits[0]]
        assert row.text == renderer.decode(row.token_ids).split(middle)[0]


def fail_above(engine: HuggingFace, monkeypatch: pytest.MonkeyPatch, max_rows: int) -> list[int]:
    """Let the model run out of memory when it decodes more than ``max_rows`` rows; returns the sizes it was given."""
    forward, sizes = engine._model.forward, []

    def limited(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine._model, "forward", limited)
    return sizes


@pytest.mark.promise("G11", "out of memory")
def test_out_of_memory_halves_the_batch_and_changes_no_row(
    talkative: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests = ask(9, n=3, max_new_tokens=12)
    engine = engine_for(talkative, max_batch_rows=24)
    expected = rows_of(engine, requests)
    sizes = fail_above(engine, monkeypatch, 5)
    assert rows_of(engine, requests) == expected
    # 24, 12 and 6 rows are too many for the first decode step.
    assert engine.max_batch_rows == 3
    assert [record.args for record in caplog.records] == [(24, 12), (12, 6), (6, 3)]
    del sizes[:]
    rows_of(engine, requests[:3])
    assert max(sizes) <= 3


@pytest.mark.promise("G11", "out of memory")
def test_a_single_row_that_does_not_fit_is_explained(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(llama)
    fail_above(engine, monkeypatch, 0)
    with pytest.raises(EnvironmentProblem, match=r"Memory does not suffice for one completion(.|\n)*max_new_tokens"):
        list(engine.generate(ask(3, n=2)))
    with pytest.raises(EnvironmentProblem, match="Memory does not suffice for scoring one sequence"):
        engine.logprobs([((5,), (6,))])


@pytest.mark.promise("G11", "other errors")
def test_other_errors_of_the_model_are_not_taken_for_memory(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(llama)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(engine._model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        list(engine.generate(ask(3)))


def test_what_exceeds_the_context_is_refused_with_the_numbers(engine: HuggingFace) -> None:
    request = ask(1, max_new_tokens=200)[0].model_copy(update={"prompt_ids": (5,) * 57})
    with pytest.raises(RecipeError, match=r"57 tokens and 200 new ones exceed the 256"):
        list(engine.generate([request]))


@pytest.mark.promise("G12", "poisoned models")
def test_a_model_that_answers_nan_fails_the_run(llama: Path) -> None:
    engine = engine_for(llama)
    with torch.no_grad():
        engine._model.model.norm.weight[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(RunFailed, match="not finite"):
            list(engine.generate(ask(1, temperature=temperature)))


def test_progress_counts_tokens_while_rows_are_unfinished(llama: Path) -> None:
    engine = engine_for(llama)
    counts = []
    for _ in engine.generate(ask(4, n=2, max_new_tokens=5, temperature=0)):
        counts.append(engine.num_tokens_made)
    # All rows are as long as they may be, so they end together.
    assert counts == [40] * 8
