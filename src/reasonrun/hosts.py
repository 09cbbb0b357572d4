"""Where models run that need no worker processes: inside the supervisor for the scripted engine, and behind endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reasonrun import plugins
from reasonrun.contracts import Task, TrainEvents
from reasonrun.engines.endpoint import EndpointEngine
from reasonrun.engines.scripted import Scripted
from reasonrun.generation import Completion
from reasonrun.models import remote, resolve
from reasonrun.recipe import ResolvedRecipe
from reasonrun.records import Checkpoint, Problem
from reasonrun.rendering import Renderer
from reasonrun.trainers.scripted import ScriptedTrainer
from reasonrun.training import MergeJob, TrainJob, TrainResult
from reasonrun.verbs.context import Host, TokenPair, Unit


class InProcessHost:
    """The scripted engine and trainer, called directly."""

    def __init__(self, engine: Scripted) -> None:
        self._engine = engine
        self._trainer = ScriptedTrainer(engine)
        self.unit_rows = engine.settings.unit_rows
        self.num_starts = 0
        self.num_workers = 1

    def generate(self, checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[int, list[Completion]]]:
        self._engine.load(checkpoint)
        for number, requests in units:
            yield number, list(self._engine.generate(requests))

    def logprobs(self, checkpoint: Checkpoint, sequences: Sequence[TokenPair]) -> list[list[float]]:
        self._engine.load(checkpoint)
        return self._engine.logprobs(sequences)

    def train(self, job: TrainJob, events: TrainEvents, retry: Callable[[], TrainJob]) -> TrainResult:
        return self._trainer.train(job, events)

    def merge(self, job: MergeJob) -> None:
        self._trainer.merge(job)

    def observed(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._engine.close()


class EndpointHost:
    """Another host, and engines for the models that are behind endpoints, by (weights, url)."""

    def __init__(self, local: Host, engines: Mapping[tuple[str, str], EndpointEngine]) -> None:
        self._local, self._engines = local, engines
        self.unit_rows = local.unit_rows

    @property
    def num_workers(self) -> int:
        return self._local.num_workers

    def generate(self, checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[int, list[Completion]]]:
        if checkpoint.remote:
            return self._engines[checkpoint.weights, checkpoint.path].generate(units)
        return self._local.generate(checkpoint, units)

    def logprobs(self, checkpoint: Checkpoint, sequences: Sequence[TokenPair]) -> list[list[float]]:
        return self._local.logprobs(checkpoint, sequences)

    def train(self, job: TrainJob, events: TrainEvents, retry: Callable[[], TrainJob]) -> TrainResult:
        return self._local.train(job, events, retry)

    def merge(self, job: MergeJob) -> None:
        self._local.merge(job)

    def observed(self) -> dict[str, Any]:
        return self._local.observed()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._local.close()


def further_models(recipe: ResolvedRecipe) -> dict[str, Checkpoint]:
    """The models besides the policy, by role, checked. Raises as ``models.resolve`` does."""
    found = recipe.further_models.items()
    return {role: remote(model.endpoint) if model.endpoint else resolve(model) for role, model in found}


def with_endpoints(local: Host, recipe: ResolvedRecipe, check_stop: Callable[[], None]) -> Host:
    """``local``, and the recipe's endpoints if it has any. Raises EnvironmentProblem when their package or key is missing:
    that should be known before hours of sampling, not after."""
    engines = {}
    for role, model in recipe.further_models.items():
        if model.endpoint:
            checkpoint = remote(model.endpoint)
            engine = EndpointEngine(model.endpoint, role=role, check_stop=check_stop)
            engines[checkpoint.weights, checkpoint.path] = engine
    return EndpointHost(local, engines) if engines else local


def scripted_host(
    settings: Scripted.Settings, task: Task, problems: dict[str, Problem], renderer: Renderer
) -> InProcessHost:
    """The scripted engine, told what a model would know."""
    engine = Scripted(settings)
    engine.attach(task, problems.__getitem__, renderer)
    return InProcessHost(engine)


def engine_is_scripted(recipe: ResolvedRecipe) -> bool:
    """Whether the recipe runs without worker processes."""
    return plugins.find("engines", recipe.engine.name) is Scripted
