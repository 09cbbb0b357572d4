"""What the Ray launcher asks for and says, without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from reasonrun.errors import EnvironmentProblem
from reasonrun.launchers.ray import Ray
from reasonrun.workers.on_ray import cluster
from reasonrun.workers.on_ray.relay import Options, passed_on


def options_of(through: tuple[str, ...]) -> Options:
    *command, text = through
    assert command == [sys.executable, "-P", "-m", "reasonrun.workers.on_ray.relay"]
    return Options.model_validate_json(text)


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``launch(<settings>)`` gives the relay options of all generation workers and of the training worker."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(**settings: Any) -> tuple[list[Options], Options]:
        engine = SimpleNamespace(model_dump_json=lambda: "{}")
        arguments: dict[str, Any] = {
            "recipe": SimpleNamespace(engine=engine, classes={"engine": Ray}),
            "run_dir": SimpleNamespace(attempt_dir=tmp_path, record_worker=lambda pid, pgid: None),
            "interrupted": lambda: 0,
        }
        launcher = Ray(Ray.Settings(**{"address": "head:6379", **settings}))
        pool, trainer = launcher.generation(**arguments), launcher.training("a.Trainer", **arguments)
        specs = [*pool._crew.specs, *trainer._crew.specs]
        *generation, training = [options_of(spec.through) for spec in specs]
        return generation, training

    return make


def test_each_worker_asks_for_its_share(launch: Any) -> None:
    generation, training = launch(
        num_workers=2, gpus_per_worker=0.5, cpus_per_worker=4, resources={"big": 1}, training_gpus=2, training_cpus=8
    )
    assert [options.place.resources for options in generation] == [{"CPU": 4, "GPU": 0.5, "big": 1}] * 2
    assert [options.place.index for options in generation] == [0, 1]
    assert generation[1].place.what == "generation worker 2 of 2"
    assert training.place.resources == {"CPU": 8, "GPU": 2}
    assert generation[0].env == {"OMP_NUM_THREADS": "4"}  # Ray says which GPUs
    assert generation[0].address == "head:6379"


def test_worker_without_gpus_finds_none_and_the_users_threads_are_kept(
    launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch()[0][0].env == {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch()[0][0].env == {"CUDA_VISIBLE_DEVICES": ""}
    assert passed_on({"OMP_NUM_THREADS": "3"}) == {"OMP_NUM_THREADS": "3"}


def test_ray_client_is_refused() -> None:
    with pytest.raises(ValidationError, match="hides the loss of nodes"):
        Ray.Settings(address="ray://head:10001")


@pytest.mark.promise("G18", "launchers")
def test_secrets_stay_here() -> None:
    environ = {
        "HF_TOKEN": "x",
        "HF_HOME": "/h",
        "WANDB_API_KEY": "x",
        "VLLM_API_KEY": "x",
        "PATH": "/bin",
        "NCCL_DEBUG": "1",
    }
    assert passed_on(environ) == {"HF_HOME": "/h", "NCCL_DEBUG": "1"}


def node(name: str, **resources: float) -> dict[str, Any]:
    made_up = {"memory": 1e9, f"node:{name}": 1.0}
    return {"NodeID": name, "NodeManagerHostname": name, "Alive": True, "Resources": {**resources, **made_up}}


def place(index: int = 0, *, spread: bool = True, **resources: float) -> cluster.Place:
    return cluster.Place(
        what="worker", fewer="launcher.num_workers", resources=resources, index=index, spread=spread, seconds=1
    )


def test_workers_spread_over_nodes_or_pack() -> None:
    nodes = [node("b", CPU=8, GPU=2), node("a", CPU=8, GPU=2), node("head", CPU=8)]
    wanted = {"CPU": 1.0, "GPU": 1.0}
    assert [cluster.preferred_node(nodes, place(index, **wanted)) for index in range(3)] == ["a", "b", "a"]
    assert {cluster.preferred_node(nodes, place(index, spread=False, **wanted)) for index in range(3)} == {"a"}
    assert cluster.preferred_node(nodes, place(CPU=1)) == "head"  # the GPUs are left to those that ask for them
    assert cluster.preferred_node(nodes, place(CPU=16)) is None


@pytest.mark.parametrize(
    ("asked", "hint"), [({"GPU": 1}, "there is room for 3 such at most"), ({"GPU": 4}, "no node is large enough")]
)
def test_no_room_says_what_was_asked_and_what_there_is(asked: dict[str, float], hint: str) -> None:
    nodes = [node("a", CPU=8, GPU=1), node("b", CPU=4, GPU=2)]
    ray = SimpleNamespace(nodes=lambda: nodes, available_resources=lambda: {"CPU": 3.0, "memory": 5.0})
    error = cluster._no_room(ray, place(**asked))
    assert f"worker asks for {asked['GPU']} GPU, and no node" in error.message
    assert "free is 3 CPU" in error.message and "node b: 4 CPU, 2 GPU" in error.message
    assert hint in error.hint and "launcher.num_workers" in error.hint


def test_nothing_at_the_address_is_said_before_ray_tries() -> None:
    with pytest.raises(EnvironmentProblem, match=r"nothing answers at launcher\.address=127\.0\.0\.1:1: ") as caught:
        cluster._check_reachable("127.0.0.1:1")
    assert "ray start --head" in caught.value.hint


def test_without_ray_the_hint_is_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentProblem) as caught:
        cluster.connect("127.0.0.1:1")
    assert caught.value.exit_code == 3
    assert caught.value.hint.startswith("pip install 'reasonrun[ray]'")


def test_options_survive_the_command_line(launch: Any) -> None:
    generation, _ = launch(resources={"weird name": 0.25})
    assert json.loads(generation[0].model_dump_json())["place"]["resources"]["weird name"] == 0.25
