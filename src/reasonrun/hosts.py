"""Where models run: inside the supervisor for the scripted engine, in worker processes for every other, and further
models behind endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from reasonrun import plugins
from reasonrun.contracts import Task, TrainEvents
from reasonrun.engines.endpoint import EndpointEngine
from reasonrun.engines.scripted import Scripted
from reasonrun.generation import Completion
from reasonrun.ledger.run_dir import RunDir
from reasonrun.models import remote, resolve
from reasonrun.recipe import ResolvedRecipe
from reasonrun.records import Checkpoint, Problem
from reasonrun.rendering import Renderer
from reasonrun.trainers.scripted import ScriptedTrainer
from reasonrun.training import MergeJob, TrainJob, TrainKind, TrainResult
from reasonrun.verbs.context import Host, TokenPair, Unit

if TYPE_CHECKING:
    from reasonrun.workers.pool import GenerationPool, TrainingWorker

TRAINERS: dict[TrainKind, str] = {
    "sft": "reasonrun.trainers.sft.SFT",
    "preference": "reasonrun.trainers.preference.Preference",
    "policy_gradient": "reasonrun.trainers.policy_gradient.PolicyGradient",
}


class InProcessHost:
    """The scripted engine and trainer, called directly."""

    def __init__(self, engine: Scripted) -> None:
        self._engine = engine
        self._trainer = ScriptedTrainer(engine)
        self.unit_rows = engine.settings.unit_rows
        self.num_starts = 0

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

    def close(self) -> None:
        self._engine.close()


class WorkerHost:
    """Worker processes, started when first needed and kept while the launcher says so."""

    def __init__(self, recipe: ResolvedRecipe, run_dir: RunDir, interrupted: Callable[[], int]) -> None:
        self._recipe, self._run_dir, self._interrupted = recipe, run_dir, interrupted
        self._generation: GenerationPool | None = None
        self._training: dict[TrainKind, TrainingWorker] = {}
        self._loaded = ""
        self.unit_rows = int(recipe.engine.unit_rows)
        self._launcher = recipe.classes["launcher"](recipe.launcher)
        self._take_turns = bool(getattr(self._launcher, "take_turns", False))

    def generate(self, checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[int, list[Completion]]]:
        yield from self._generating(checkpoint).generate(units)

    def logprobs(self, checkpoint: Checkpoint, sequences: Sequence[TokenPair]) -> list[list[float]]:
        return self._generating(checkpoint).logprobs(sequences)

    def _generating(self, checkpoint: Checkpoint) -> GenerationPool:
        """The generation workers, with ``checkpoint`` in place."""
        if self._take_turns:
            self._close_training(None)
        if self._generation is None:
            self._generation = self._launcher.generation(
                recipe=self._recipe, run_dir=self._run_dir, interrupted=self._interrupted
            )
            self._generation.prestart(checkpoint)
            if not self._take_turns:
                for kind in self._recipe.classes["method"].trains:  # imports take seconds, which sampling can hide
                    self._training_worker(kind).prestart()
        if self._loaded != checkpoint.weights:
            self._generation.load(checkpoint)
            self._loaded = checkpoint.weights
        return self._generation

    def train(self, job: TrainJob, events: TrainEvents, retry: Callable[[], TrainJob]) -> TrainResult:
        if self._take_turns:
            self._close_training(job.kind)
            if self._generation is not None:
                self._generation.close()
                self._loaded = ""
        return self._training_worker(job.kind).train(job, events, retry=retry)

    def _close_training(self, but: TrainKind | None) -> None:
        for kind, worker in self._training.items():
            if kind != but:
                worker.close()

    def merge(self, job: MergeJob) -> None:
        from reasonrun.workers.merging import merge_in_process

        merge_in_process(job, self._run_dir.record_worker, self._interrupted)

    @property
    def num_starts(self) -> int:
        """Worker processes started so far."""
        return sum(pool.num_starts for pool in self._pools())

    def close(self) -> None:
        for pool in self._pools():
            pool.close()

    def _training_worker(self, kind: TrainKind) -> TrainingWorker:
        if kind not in self._training:
            self._training[kind] = self._launcher.training(
                TRAINERS[kind], recipe=self._recipe, run_dir=self._run_dir, interrupted=self._interrupted
            )
        return self._training[kind]

    def _pools(self) -> list[GenerationPool | TrainingWorker]:
        generation = [] if self._generation is None else [self._generation]
        return [*generation, *self._training.values()]


class EndpointHost:
    """Another host, and engines for the models that are behind endpoints, by (weights, url)."""

    def __init__(self, local: Host, engines: Mapping[tuple[str, str], EndpointEngine]) -> None:
        self._local, self._engines = local, engines
        self.unit_rows = local.unit_rows

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
