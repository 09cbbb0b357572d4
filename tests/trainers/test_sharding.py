"""Training whose weights, gradients and optimizer state are divided among processes. Two of them stand for two devices."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import on_policy_jobs
import pytest
import torch
from jobs_in_turn import run_in_turn
from on_policy_jobs import PROBLEMS, TINY, experience
from sft_rows import Events, random_examples, random_pairs, sha256, weights_of, write_rows

from reasonrun.engines.hf import HuggingFace
from reasonrun.errors import OutOfMemory, RecipeError
from reasonrun.records import Checkpoint
from reasonrun.trainers import launch
from reasonrun.trainers.policy_gradient import PolicyGradient
from reasonrun.trainers.preference import Preference
from reasonrun.trainers.sft import SFT
from reasonrun.training import PreferenceSettings, SFTSettings, TrainJob

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]  # two processes for every job; the first test waits for all

TRAINERS = {"sft": SFT, "preference": Preference, "policy_gradient": PolicyGradient}
SHARDED = {"num_processes": 2, "sharding": "fsdp"}
LORA = {"rank": 4, "dropout": 0.1}


@dataclass
class Trained:
    """Jobs by name, with what they reported."""

    jobs: dict[str, TrainJob]
    events: dict[str, Events]

    def losses(self, name: str, kind: str = "loss") -> list[float]:
        return [event[kind] for event in self.events[name].of("log")]

    def final(self, name: str) -> dict[str, torch.Tensor]:
        return weights_of(Path(self.jobs[name].out_dir) / "final")

    def output(self, name: str, path: str) -> str:
        return sha256(Path(self.jobs[name].out_dir) / path)


def make_job(folder: Path, out: str, *, job: dict[str, Any], **settings: Any) -> TrainJob:
    """Batches of three: two processes get different numbers of rows, so one of them has a pass to idle through."""
    (folder / out).mkdir()
    is_preference = "reference" in job
    rows = random_pairs(7) if is_preference else random_examples(10)
    chosen = {
        "lr": 1e-4,
        "batch_size": 3,
        "micro_batch_size": 1,
        "checkpoint_every": 2,
        "schedule": "linear",
        **settings,
    }
    fields: dict[str, Any] = {
        "kind": "preference" if is_preference else "sft",
        "rows": (write_rows(folder / f"{out}.parquet", rows),),
        "start": TINY,
        "settings": (PreferenceSettings if is_preference else SFTSettings)(**chosen).model_dump(mode="json"),
        "num_steps": 4,
        "seed": 11,
        "out_dir": str(folder / out),
    }
    return TrainJob(**{**fields, **job})


def poisoned(folder: Path, out: str, *, job: dict[str, Any]) -> TrainJob:
    made = make_job(folder, out, job=job)
    examples = random_examples(10)
    examples[7] = examples[7].model_copy(update={"weight": float("inf")})
    write_rows(folder / f"{out}.parquet", examples)
    return made


def moved(folder: Path) -> Checkpoint:
    """A model that is not the carried one, with moments to carry on, stored in bfloat16."""
    from transformers import AutoModelForCausalLM

    job = make_job(folder, "moved", job={}, lr=1e-3)
    SFT().train(job, Events())
    model = AutoModelForCausalLM.from_pretrained(f"{job.out_dir}/final", dtype=torch.bfloat16)
    shutil.copytree(f"{job.out_dir}/final", folder / "half")
    model.save_pretrained(folder / "half")
    return Checkpoint(
        path=str(folder / "half"), weights="moved", tokenizer=TINY.tokenizer, optimizer_path=f"{job.out_dir}/optimizer"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """All jobs, those of two processes one after another in the same two."""
    folder = tmp_path_factory.mktemp("sharding")
    torch.set_num_threads(1)
    half = moved(folder)
    on_policy = {"problems": PROBLEMS[:3], "num_steps": 2, "batch_size": 12, "rewards": {"kl_coefs": (0.05,)}}

    def of(kind: str, out: str, fields: dict[str, Any], **settings: Any) -> TrainJob:
        given: dict[str, dict[str, Any]] = {
            "sft": {},
            "carried": {"start": half, "carry_optimizer": True},
            "preference": {"start": half, "reference": TINY},
        }
        if kind == "on_policy":
            job = {**fields, "start": TINY, "reference": half if "lora" not in settings else TINY}
            return on_policy_jobs.make_job(folder, out, job=job, **on_policy, **settings)
        return make_job(folder, out, job={**given[kind], **fields}, **settings)

    jobs = {}
    for kind in ("sft", "carried", "preference", "on_policy"):
        jobs[f"{kind}-one"] = of(kind, f"{kind}-one", {})
        jobs[f"{kind}-two"] = of(kind, f"{kind}-two", SHARDED)
    jobs["bfloat16-one"] = of("sft", "bfloat16-one", {}, dtype="bfloat16")
    jobs["bfloat16-two"] = of("sft", "bfloat16-two", SHARDED, dtype="bfloat16")
    jobs["ddp"] = of("sft", "ddp", {"num_processes": 2})
    jobs["checkpointing"] = of("sft", "checkpointing", SHARDED, gradient_checkpointing=True)
    jobs["on_policy_lora-one"] = of("on_policy", "on_policy_lora-one", {}, lora=LORA | {"dropout": 0.0})
    jobs["on_policy_lora-two"] = of("on_policy", "on_policy_lora-two", SHARDED, lora=LORA | {"dropout": 0.0})
    jobs["lora-two"] = of("sft", "lora-two", SHARDED, lora=LORA)
    jobs["lora-resumed"] = resumed(jobs["lora-two"], "lora-resumed")
    for kind in ("sft", "preference"):
        jobs[f"{kind}-resumed"] = resumed(jobs[f"{kind}-two"], f"{kind}-resumed")
    jobs["other"] = jobs["ddp"].model_copy(
        update={"sharding": "fsdp", "resume_from": f"{jobs['ddp'].out_dir}/checkpoint-2"}
    )
    jobs["poisoned"] = poisoned(folder, "poisoned", job=SHARDED)

    several = [name for name, job in jobs.items() if job.num_processes > 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        classes = [TRAINERS[jobs[name].kind] for name in several]
        paths = [f"{trainer.__module__}:{trainer.__qualname__}" for trainer in classes]
        found = run_in_turn(patch, folder / "two", list(zip(paths, [jobs[name] for name in several], strict=True)))
    events = dict(zip(several, found, strict=True))
    for name in jobs.keys() - events.keys():
        events[name] = Events()
        TRAINERS[jobs[name].kind]().train(jobs[name], events[name])
    yield Trained(jobs, events)


def resumed(job: TrainJob, out: str) -> TrainJob:
    folder = Path(job.out_dir).parent / out
    folder.mkdir()
    return job.model_copy(update={"out_dir": str(folder), "resume_from": f"{job.out_dir}/checkpoint-2"})


def furthest(some: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert some.keys() == other.keys() and all(some[name].dtype == other[name].dtype for name in some)
    return max(float((some[name].float() - other[name].float()).abs().max()) for name in some)


@pytest.mark.parametrize("kind", ["sft", "carried", "preference"])
def test_two_processes_with_half_a_model_each_learn_what_one_does(trained: Trained, kind: str) -> None:
    one, two = f"{kind}-one", f"{kind}-two"
    for number in ("loss", "grad_norm"):
        assert trained.losses(two, number) == pytest.approx(trained.losses(one, number), rel=2e-4, abs=1e-5)
    # A weight stored in bfloat16 may fall on the other side of a rounding.
    tolerance = 1e-5 if kind == "sft" else 2**-8
    assert furthest(trained.final(two), trained.final(one)) <= tolerance
    assert furthest(trained.final(two), weights_of(trained.jobs[one].start.path)) > 2e-4


def test_weights_gathered_in_bfloat16_learn_the_same_but_for_their_rounding(trained: Trained) -> None:
    losses = trained.losses("bfloat16-two")
    assert losses == pytest.approx(trained.losses("bfloat16-one"), rel=1e-2)
    assert losses != pytest.approx(trained.losses("sft-two"), rel=1e-6)
    assert furthest(trained.final("bfloat16-two"), trained.final("bfloat16-one")) <= 1e-3


def test_gradients_summed_by_every_process_and_divided_ones_are_the_same(trained: Trained) -> None:
    assert trained.losses("sft-two") == pytest.approx(trained.losses("ddp"), abs=1e-5)
    assert furthest(trained.final("sft-two"), trained.final("ddp")) <= 1e-5
    assert furthest(trained.final("checkpointing"), trained.final("sft-two")) <= 1e-6


@pytest.mark.parametrize("kind", ["sft", "preference", "lora"])
def test_resuming_with_divided_state_is_exact(trained: Trained, kind: str) -> None:
    whole, again = f"{kind}-two", f"{kind}-resumed"
    assert trained.events[again].of("log") == trained.events[whole].of("log")[2:]
    assert trained.events[again][-1]["result"] == trained.events[whole][-1]["result"]
    kept = "adapter/adapter_model.safetensors" if kind == "lora" else "optimizer/adamw.safetensors"
    for path in ("final/model.safetensors", kept):
        assert trained.output(again, path) == trained.output(whole, path)


@pytest.mark.parametrize("kind", ["on_policy", "on_policy_lora"])
def test_a_divided_policy_samples_and_learns_what_a_whole_one_does(trained: Trained, kind: str) -> None:
    one, two = trained.jobs[f"{kind}-one"], trained.jobs[f"{kind}-two"]
    for step in (1, 2):  # the second sampling is by weights that were gathered after an update
        mine, theirs = experience(one, step), experience(two, step)
        assert [row.rollout.completion_ids for row in mine] == [row.rollout.completion_ids for row in theirs]
        assert [row.credit.advantage for row in mine] == pytest.approx(
            [row.credit.advantage for row in theirs], abs=1e-4
        )
    for mine_log, their_log in zip(
        trained.events[f"{kind}-one"].of("log"), trained.events[f"{kind}-two"].of("log"), strict=True
    ):
        assert {**mine_log, "num_padded_tokens": 0} == pytest.approx({**their_log, "num_padded_tokens": 0}, abs=1e-3)


def test_what_is_left_is_an_ordinary_model_folder(trained: Trained) -> None:
    two, one = trained.jobs["carried-two"], trained.jobs["carried-one"]
    names = {path.name for path in (Path(two.out_dir) / "final").iterdir()}
    assert names == {path.name for path in (Path(one.out_dir) / "final").iterdir()}
    assert {weight.dtype for weight in trained.final("carried-two").values()} == {torch.bfloat16}
    engine = HuggingFace(HuggingFace.Settings(num_threads=1))
    engine.load(Checkpoint(path=f"{two.out_dir}/final", weights="w", tokenizer=TINY.tokenizer))
    engine.close()


@pytest.mark.promise("G12", "poisoned rows")
def test_a_poisoned_row_stops_all_processes_before_it_is_learnt_from(trained: Trained) -> None:
    *before, last = trained.events["poisoned"]
    assert last["error"] == "RunFailed" and "loss is not finite at optimizer step" in last["text"]
    assert "Examples: r7." in last["text"]
    assert all(event["event"] in ("log", "checkpoint") for event in before)
    assert not (Path(trained.jobs["poisoned"].out_dir) / "final").exists()


def test_a_checkpoint_of_whole_weights_is_not_divided(trained: Trained) -> None:
    (said,) = trained.events["other"]
    assert said["error"] == RecipeError.__name__ and "made with launcher.sharding=none" in said["text"]
    assert "set launcher.sharding=none again" in said["text"]


class Tight(SFT):
    """In the second process two examples at a time do not fit, and the others wait for it."""

    def prepare(self, job: TrainJob) -> Any:
        settings, objective, left_out = super().prepare(job)
        compute = objective.losses

        def losses(model: Any, batch: Any, micro: Any, device: Any) -> Any:
            if len(micro) > 1 and torch.distributed.get_rank() == 1:
                raise torch.OutOfMemoryError("injected")
            return compute(model, batch, micro, device)

        objective.losses = losses  # type: ignore[method-assign]
        return settings, objective, left_out


@pytest.mark.promise("G11", "out of memory")
def test_a_process_that_runs_out_of_memory_ends_them_all_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    job = make_job(tmp_path, "tight", job=SHARDED, micro_batch_size=2, batch_size=4)
    with pytest.raises(OutOfMemory, match=r"step 1 with 2 examples in a forward pass\.\n.*micro_batch_size=1"):
        launch.train_in_processes("test_sharding:Tight", job, Events())


def test_one_process_divides_nothing_and_says_so(tmp_path: Path) -> None:
    events = Events()
    job = make_job(tmp_path, "alone", job={"sharding": "fsdp"})
    SFT().train(job.model_copy(update={"num_steps": 1}), events)
    assert [event["text"] for event in events.of("note")] == [
        "launcher.sharding=fsdp divides nothing in a single process: the model is trained whole"
    ]
