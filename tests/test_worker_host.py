"""Who is on the device when, what proves the weights, and what is noted of it: without processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from reasonrun.engines.hf import HuggingFace
from reasonrun.engines.vllm import VLLM
from reasonrun.errors import EnvironmentProblem, RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.models import resolve
from reasonrun.probing import Proof, write_probe
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Checkpoint, Sampling
from reasonrun.training import TrainJob
from reasonrun.worker_host import WorkerHost

TINY = resolve(ModelSettings(name="tiny"))
RIGHT = (-2.0, -3.0)


class FakePool:
    """Notes what it is asked; probes come to ``logps``."""

    def __init__(self, name: str, did: list[str], logps: tuple[float, ...]) -> None:
        self.name, self.did, self.logps, self.num_starts = name, did, logps, 1
        self.proof: Proof | None = None

    def prestart(self, checkpoint: Checkpoint | None = None, probe: Sequence[int] = ()) -> None:
        self.did.append(f"{self.name} starts")

    def load(self, checkpoint: Checkpoint, probe: Sequence[int] = ()) -> None:
        self.did.append(f"{self.name} loads {checkpoint.step or 'base'}")

    def prove(self, proof: Proof) -> float:
        self.proof = proof
        return proof.check(self.name, self.logps)

    def generate(self, units: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Completion]]]:
        for number, requests in units:
            yield number, [completion(request, i) for request in requests for i in range(request.n)]

    def logprobs(self, sequences: Sequence[Any]) -> list[list[float]]:
        self.did.append(f"{self.name} scores {len(sequences)}")
        return [list(RIGHT) for _ in sequences]

    def train(self, job: TrainJob, events: Any, retry: Any = None) -> str:
        self.did.append("training trains")
        return "trained"

    def sleep(self) -> None:
        self.did.append(f"{self.name} sleeps")

    def close(self) -> None:
        self.did.append(f"{self.name} closes")


def completion(request: Request, index: int) -> Completion:
    logps = (-2.0, -2.5) if request.sampling.logprobs else None
    return Completion(request=request.key, index=index, token_ids=(5, 6), text="x", finish_reason="stop", logps=logps)


def request(number: int, *, n: int = 4, logprobs: bool = False) -> Request:
    sampling = Sampling(max_new_tokens=8, logprobs=logprobs)
    return Request(key=f"r{number}", problem_id="p", prompt_ids=(1,), n=n, seed=number, sampling=sampling)


class FakeLauncher:
    def __init__(self, settings: SimpleNamespace) -> None:
        self.residency, self.did, self.logps = settings.residency, settings.did, settings.logps

    def generation(self, *, recipe: Any, run_dir: Any, interrupted: Any, comparing: bool = False) -> FakePool:
        return FakePool("comparing" if comparing else "engine", self.did, self.logps)

    def training(self, trainer: str, **kwargs: Any) -> FakePool:
        return FakePool("training", self.did, ())


Make = Callable[..., tuple[WorkerHost, list[str]]]


@pytest.fixture
def make_host(tmp_path: Path) -> Make:
    def make(
        residency: str, engine: type = VLLM, logps: tuple[float, ...] = RIGHT, trains: tuple[str, ...] = ("sft",)
    ) -> tuple[WorkerHost, list[str]]:
        did: list[str] = []
        classes = {"launcher": FakeLauncher, "engine": engine, "method": SimpleNamespace(trains=trains)}
        recipe = SimpleNamespace(
            engine=SimpleNamespace(unit_rows=10),
            launcher=SimpleNamespace(residency=residency, did=did, logps=logps),
            classes=classes,
        )
        run_dir = SimpleNamespace(path=tmp_path / "run")
        return WorkerHost(cast(Any, recipe), cast(Any, run_dir), lambda: 0), did

    return make


def trained(tmp_path: Path, name: str, logps: Sequence[float] = RIGHT) -> Checkpoint:
    folder = tmp_path / name.replace("/", "-")
    folder.mkdir()
    (folder / "config.json").write_text((Path(TINY.path) / "config.json").read_text())
    write_probe(folder, logps)
    return TINY.model_copy(update={"path": str(folder), "weights": name, "step": name})


def sample(host: WorkerHost, policy: Checkpoint, requests: Sequence[Request] = ()) -> list[Completion]:
    return [row for _, rows in host.generate(policy, [(0, list(requests) or [request(0)])]) for row in rows]


def train(host: WorkerHost) -> None:
    host.train(cast(TrainJob, SimpleNamespace(kind="sft")), lambda event: None, cast(Any, None))


def test_on_one_gpu_the_engine_leaves_before_the_trainer_comes_and_back(make_host: Make, tmp_path: Path) -> None:
    host, did = make_host("exit")
    sample(host, TINY)
    train(host)
    sample(host, trained(tmp_path, "round-001/train"))
    assert did == [
        # What transformers computes from a model that no trainer made is asked before the engine takes the memory.
        *("comparing loads base", "comparing scores 1", "comparing closes"),
        *("engine starts", "engine loads base"),
        "engine closes",
        *("comparing loads base", "comparing scores 4", "comparing closes"),  # of the rollouts
        *("training trains", "training closes"),
        *("engine starts", "engine loads round-001/train"),
    ]
    assert host.num_starts == 5  # comparer twice, engine twice, trainer


def test_a_sleeping_engine_keeps_its_process(make_host: Make, tmp_path: Path) -> None:
    host, did = make_host("sleep")
    sample(host, TINY)
    train(host)
    sample(host, trained(tmp_path, "round-001/train"))
    assert "engine sleeps" in did and "engine closes" not in did
    assert did.index("engine sleeps") < did.index("training trains") < did.index("training closes")
    assert did[-1] == "engine loads round-001/train"


def test_resident_workers_start_side_by_side_and_stay(make_host: Make, tmp_path: Path) -> None:
    host, did = make_host("resident")
    sample(host, TINY)
    train(host)
    sample(host, trained(tmp_path, "round-001/train"))
    assert did[:2] == ["engine starts", "training starts"]
    assert not [line for line in did if "closes" in line or "sleeps" in line]


def test_transformers_is_not_compared_with_itself(make_host: Make, tmp_path: Path) -> None:
    host, did = make_host("resident", engine=HuggingFace)
    sample(host, TINY)
    assert not [line for line in did if line.startswith("comparing")]
    sample(host, trained(tmp_path, "round-001/train"))  # but its loading of trained weights is proved
    assert host.observed()["probe_difference"] == 0


def test_other_weights_stop_the_run_before_anything_is_sampled(make_host: Make, tmp_path: Path) -> None:
    host, _ = make_host("resident", logps=(-2.0, -9.0))
    with pytest.raises(RunFailed, match="worker engine does not answer with the weights of round-001/train"):
        sample(host, trained(tmp_path, "round-001/train"))


def test_the_policy_before_is_part_of_the_proof(make_host: Make, tmp_path: Path) -> None:
    host, _ = make_host("resident", logps=(-2.01, -3.01))
    sample(host, trained(tmp_path, "round-001/train", (-2.01, -3.01)))
    with pytest.raises(RunFailed, match="still answers with the weights of round-001/train"):
        sample(host, trained(tmp_path, "round-002/train", (-2.1, -3.1)))


def test_rollouts_are_compared_and_come_back_as_they_were_asked_for(make_host: Make) -> None:
    host, did = make_host("resident")
    rows = sample(host, TINY, [request(i, logprobs=i == 1) for i in range(6)])
    assert "comparing scores 16" in did  # of 24
    assert [row.logps is not None for row in rows] == [i == 1 for i in range(6) for _ in range(4)]
    observed = host.observed()
    assert observed["mismatch"]["num_tokens"] == 32 and observed["mismatch"]["mean"] == pytest.approx(0.25)
    assert observed["switches"] == 1 and host.observed() == {}


def test_what_a_model_comes_to_is_asked_once_per_run(make_host: Make, tmp_path: Path) -> None:
    for _ in range(2):
        host, did = make_host("exit")
        host.logprobs(TINY, [((1,), (2,))])
    assert not [line for line in did if line.startswith("comparing")]
    assert [path.name for path in (tmp_path / "run/derived/probes").iterdir()] == [f"{TINY.weights}.json"]


def test_a_judge_that_no_trainer_made_waits_until_the_engine_has_left(make_host: Make, tmp_path: Path) -> None:
    host, did = make_host("exit")
    sample(host, TINY)
    judge = TINY.model_copy(update={"weights": "judge", "step": "judge"})
    sample(host, judge)
    assert did.index("engine closes") < did.index("comparing loads judge") < did.index("engine loads judge")
    train(host)  # both models' rollouts are compared, and policies that were are not taken again
    assert [line for line in did if line == "comparing scores 4"] == ["comparing scores 4"] * 2


def test_what_transformers_cannot_do_is_noted_and_stops_nothing(
    make_host: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakePool, checkpoint: Checkpoint, probe: Sequence[int] = ()) -> None:
        if self.name == "comparing":
            raise EnvironmentProblem("transformers does not know this model")

    monkeypatch.setattr(FakePool, "load", refuse)
    host, _ = make_host("resident")
    assert len(sample(host, TINY)) == 4
    assert host.observed()["not_compared"] == "transformers does not know this model"
