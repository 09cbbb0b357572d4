"""A real vLLM on the CPU against the Hugging Face engine: the same answers, probabilities and policy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_runs import RENDERER, TINY, VLLM, HuggingFace, Stale, ask, correct, make_pool, perturbed, rows_of, serving

from reasonrun.errors import EnvironmentProblem, RecipeError, RunFailed
from reasonrun.metrics import bootstrap_interval
from reasonrun.model_folder import ModelFolder
from reasonrun.probing import Proof, mean_difference, mismatch, probe_ids, probe_pair, read_probe
from reasonrun.workers.pool import GenerationPool

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]
PROBE = probe_ids(int(ModelFolder(Path(TINY.path)).config["vocab_size"]))


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[GenerationPool, GenerationPool]]:
    """The same model in both engines."""
    folder = tmp_path_factory.mktemp("engines")
    with make_pool(HuggingFace, folder) as hf, make_pool(VLLM, folder) as vllm:
        vllm.prestart(TINY, PROBE)
        hf.load(TINY)
        vllm.load(TINY, PROBE)
        yield hf, vllm


def test_greedy_completions_agree_in_99_percent_of_the_tokens(pools: tuple[GenerationPool, GenerationPool]) -> None:
    hf, vllm = pools
    requests = ask(500, temperature=0.0, logprobs=True)
    ours, theirs = rows_of(hf, requests), rows_of(vllm, requests)
    num_tokens = sum(len(row.token_ids) for row in ours.values())
    num_equal = sum(
        a == b for key, row in ours.items() for a, b in zip(row.token_ids, theirs[key].token_ids, strict=False)
    )
    assert num_equal / num_tokens >= 0.99
    same = [key for key, row in ours.items() if row.token_ids == theirs[key].token_ids]
    found = mismatch([theirs[key].logps or () for key in same], [ours[key].logps or () for key in same])
    assert found["num_tokens"] > 5_000 and found["mean"] < 1e-4 and found["max"] < 1e-2


def test_sampled_accuracy_is_the_same_within_its_interval(pools: tuple[GenerationPool, GenerationPool]) -> None:
    hf, vllm = pools
    requests = ask(500, temperature=1.0)
    ours, theirs = correct(rows_of(hf, requests)), correct(rows_of(vllm, requests))
    assert len(ours) == len(theirs) == 500
    low, high = bootstrap_interval([float(a) - float(b) for a, b in zip(ours, theirs, strict=True)])
    assert low <= 0 <= high
    assert 0.2 < sum(theirs) / 500 < 0.5  # a policy at work, not a constant


def test_samples_depend_on_their_request_alone(pools: tuple[GenerationPool, GenerationPool]) -> None:
    _, vllm = pools
    requests = ask(40, n=3, temperature=1.0, top_p=0.95, top_k=50)
    together = rows_of(vllm, requests)
    assert len({row.token_ids for row in together.values()}) > 60  # siblings differ
    apart = rows_of(vllm, requests[:7]) | rows_of(vllm, list(reversed(requests[7:])))
    equal = sum(row.token_ids == apart[key].token_ids for key, row in together.items())
    assert equal / len(together) >= 0.99


def test_log_probabilities_of_given_tokens(pools: tuple[GenerationPool, GenerationPool]) -> None:
    hf, vllm = pools
    rows = rows_of(hf, ask(64, temperature=1.0))
    prompts = {request.key: request.prompt_ids for request in ask(64)}
    sequences = [(prompts[key], row.token_ids) for (key, _), row in rows.items()]
    sequences += [(prompts[next(iter(prompts))], ()), probe_pair(PROBE)]
    ours, theirs = hf.logprobs(sequences), vllm.logprobs(sequences)
    assert [len(row) for row in theirs] == [len(ids) for _, ids in sequences]
    assert max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)) < 1e-3
    # A second time the prompts are in vLLM's cache, which must not swallow them.
    again = vllm.logprobs(sequences)
    assert max(abs(a - b) for x, y in zip(again, theirs, strict=True) for a, b in zip(x, y, strict=True)) < 1e-3


def test_stop_strings_and_prefixes(pools: tuple[GenerationPool, GenerationPool]) -> None:
    hf, vllm = pools
    stopped = ask(30, temperature=0.0, stop=("Step 2",), logprobs=True)
    ours, theirs = rows_of(hf, stopped), rows_of(vllm, stopped)
    assert {key: (row.text, row.finish_reason) for key, row in ours.items()} == {
        key: (row.text, row.finish_reason) for key, row in theirs.items()
    }
    assert "stop_string" in {row.finish_reason for row in theirs.values()}
    given = RENDERER.encode("Step 1:")
    continued = ask(30, temperature=0.0, prompt_tail=given)
    ours, theirs = rows_of(hf, continued), rows_of(vllm, continued)
    assert [row.token_ids for row in ours.values()] == [theirs[key].token_ids for key in ours]
    cut = ask(5, temperature=0.0, max_new_tokens=3)
    assert {row.finish_reason for row in rows_of(vllm, cut).values()} == {"length"}


def test_other_weights_are_loaded_in_place_and_proved(
    pools: tuple[GenerationPool, GenerationPool], tmp_path: Path
) -> None:
    """Ends with the first weights again: the fixture is shared."""
    hf, vllm = pools
    before = hf.logprobs([probe_pair(PROBE)])[0]
    other = perturbed(tmp_path / "other", 0.05)
    expected = read_probe(Path(other.path))
    assert expected is not None and mean_difference(expected, before) > 0.05
    num_starts = vllm.num_starts
    vllm.load(other, PROBE)
    difference = vllm.prove(Proof(policy="other", logps=expected, before="tiny", logps_before=tuple(before)))
    assert difference < 1e-4 and vllm.num_starts == num_starts
    requests = ask(20, temperature=0.0)
    hf.load(other)
    assert correct(rows_of(vllm, requests)) == correct(rows_of(hf, requests))
    hf.load(TINY)
    vllm.load(TINY, PROBE)
    assert vllm.prove(Proof(policy="tiny", logps=tuple(before))) < 1e-4


def test_stale_weights_are_caught(tmp_path: Path) -> None:
    """The new policy is so near the one before that only the comparison with both tells them apart."""
    with make_pool(HuggingFace, tmp_path) as hf:
        hf.load(TINY)
        before = tuple(hf.logprobs([probe_pair(PROBE)])[0])
    other = perturbed(tmp_path / "other", 0.004)
    expected = read_probe(Path(other.path))
    assert expected is not None and 1e-3 < mean_difference(expected, before) < 0.2
    with make_pool(Stale, tmp_path) as stale:
        stale.load(TINY, PROBE)
        assert stale.prove(Proof(policy="tiny", logps=before)) < 1e-4
        stale.load(other, PROBE)
        with pytest.raises(RunFailed, match="still answers with the weights of tiny"):
            stale.prove(Proof(policy="round-001/train", logps=expected, before="tiny", logps_before=before))


def test_what_vllm_cannot_do_is_said(tmp_path: Path) -> None:
    with make_pool(VLLM, tmp_path, max_model_len=10**6) as pool, pytest.raises(RecipeError, match="reads 768 tokens"):
        pool.load(TINY)
    with (
        make_pool(VLLM, tmp_path, arguments={"quantisation": "x"}) as pool,
        pytest.raises(RecipeError, match="quantisation"),
    ):
        pool.load(TINY)
    with make_pool(VLLM, tmp_path, python=sys.executable) as pool, pytest.raises(EnvironmentProblem, match="make vllm"):
        pool.load(TINY)
    unknown = perturbed(tmp_path / "unknown", 0.0)
    config = ModelFolder(Path(unknown.path)).config
    config |= {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"}
    (Path(unknown.path) / "config.json").write_text(json.dumps(config))
    with make_pool(VLLM, tmp_path) as pool, pytest.raises(EnvironmentProblem, match="engine=hf"):
        pool.load(unknown)


def test_an_engine_without_a_gpu_cannot_sleep(pools: tuple[GenerationPool, GenerationPool]) -> None:
    _, vllm = pools
    vllm.load(TINY)
    with pytest.raises(EnvironmentProblem, match="cannot sleep: it has no GPU"):
        vllm.sleep()
    vllm.load(TINY)  # in a new worker
    assert rows_of(vllm, ask(2))


def test_a_run_with_adapters_served_beside_the_base(tmp_path: Path) -> None:
    """The whole loop through the command line: two rounds, each with a new adapter, one engine start."""
    command = [
        *(
            sys.executable,
            "-m",
            "reasonrun.cli.main",
            "train",
            "star_arith",
            "engine=vllm",
            "engine.enforce_eager=true",
        ),
        *("engine.cpu_cache_gib=1", "engine.max_lora_rank=8", "method.sft.lora.rank=8", "method.rounds=2"),
        *("method.steps_start=10", "method.sft.lora.target_modules=all-linear", "method.init_from=base"),
        *("task.num_train=60", "task.num_dev=40", "task.num_test=40", "preflight=off", "--run", str(tmp_path / "run")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 5), done.stderr[-3000:]
    notes = [json.loads(line) for line in (tmp_path / "run/attempts/1/notes.jsonl").read_text().splitlines()]
    differences = [note["probe_difference"] for note in notes if "probe_difference" in note]
    compared = {note["mismatch"]["policy"]: note["mismatch"]["mean"] for note in notes if "mismatch" in note}
    assert len(differences) >= 3 and max(differences) < 1e-3
    assert {"round-001/train", "round-002/train"} <= compared.keys() and max(compared.values()) < 1e-4
    log = (tmp_path / "run/attempts/1/logs/generation-0.log").read_text()
    assert log.count("Loading safetensors checkpoint shards: 100%") == 1
    status = subprocess.run(
        [sys.executable, "-m", "reasonrun.cli.main", "status", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert "switches" in status.stdout and "engine off by" in status.stdout


def test_a_served_model_answers_like_the_engine(pools: tuple[GenerationPool, GenerationPool], tmp_path: Path) -> None:
    """A real ``vllm serve``: ids in and out, scores, and weights that it is told to read."""
    from reasonrun.engines.openai import Served

    hf, _ = pools
    other = perturbed(tmp_path / "other", 0.05, tied=False)
    start = perturbed(tmp_path / "start", 0.0, tied=False)
    with serving(start, tmp_path) as url:
        engine = Served(Served.Settings(url=url, reload=True))
        engine.load(start)
        requests = ask(40, temperature=0.0, logprobs=True)
        served = {(row.request, row.index): row for row in engine.generate(requests)}
        hf.load(start)
        ours = rows_of(hf, requests)
        assert [row.token_ids for row in ours.values()] == [served[key].token_ids for key in ours]
        assert all(
            abs(a - b) < 1e-3 for k, row in ours.items() for a, b in zip(row.logps, served[k].logps, strict=True)
        )
        assert mean_difference(engine.logprobs([probe_pair(PROBE)])[0], read_probe(Path(start.path)) or ()) < 1e-4
        engine.load(other)
        assert mean_difference(engine.logprobs([probe_pair(PROBE)])[0], read_probe(Path(other.path)) or ()) < 1e-4
        assert len({row.token_ids for row in engine.generate(ask(5, n=4, temperature=1.0))}) > 8


def test_an_on_policy_run_samples_with_vllm_in_a_child_of_the_trainer(tmp_path: Path) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "reasonrun.cli.main",
            "train",
            "score_arith",
            "engine=vllm",
            "engine.enforce_eager=true",
        ),
        *("engine.cpu_cache_gib=1", "method.stage1.steps=2", "method.stage1.rounds=1", "method.stage2.steps=2"),
        *(
            "method.stage2.rounds=1",
            "method.rl.batch_size=32",
            "task.num_train=60",
            "task.num_dev=20",
            "task.num_test=20",
        ),
        *("preflight=off", "--run", str(tmp_path / "run")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode in (0, 5), done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["verb"] == "train"]
    assert len(trained) == 2 and all(row["mismatch"] < 1e-4 for row in trained)
