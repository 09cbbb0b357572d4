"""Models in worker processes: who is on the device when, and the proof that an engine has the weights it should have."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reasonrun.engines.hf import HuggingFace
from reasonrun.errors import ReasonrunError, Stopped
from reasonrun.generation import Completion, Request
from reasonrun.ledger.run_dir import RunDir
from reasonrun.model_folder import ModelFolder
from reasonrun.probing import Proof, mismatch, probe_ids, probe_pair, read_probe
from reasonrun.recipe import ResolvedRecipe
from reasonrun.records import Checkpoint
from reasonrun.training import MergeJob, TrainJob, TrainKind, TrainResult
from reasonrun.verbs.context import TokenPair, Unit

if TYPE_CHECKING:
    from reasonrun.workers.pool import GenerationPool, TrainingWorker

TRAINERS: dict[TrainKind, str] = {
    "sft": "reasonrun.trainers.sft.SFT",
    "preference": "reasonrun.trainers.preference.Preference",
    "policy_gradient": "reasonrun.trainers.policy_gradient.PolicyGradient",
}
Residency = Literal["exit", "sleep", "resident"]
_COMPARED_ROLLOUTS = 16  # of each policy, where the engine computes otherwise than the trainers do


class WorkerHost:
    """Worker processes, started when first needed and kept while the launcher's residency says so.

    An engine that is no transformers engine proves each policy's weights: by what the trainer wrote beside them, or, of a
    model that no trainer made, by what transformers computes from them in a worker of its own. That worker, the comparer,
    also scores some of the engine's ordinary rollouts.
    """

    def __init__(self, recipe: ResolvedRecipe, run_dir: RunDir, interrupted: Callable[[], int]) -> None:
        self._recipe, self._run_dir, self._interrupted = recipe, run_dir, interrupted
        self._generation: GenerationPool | None = None
        self._comparer: GenerationPool | None = None
        self._training: dict[TrainKind, TrainingWorker] = {}
        self._loaded = ""
        self._last_proof: Proof | None = None
        self._compared: set[str] = set()  # weights of the policies whose rollouts were taken for comparison
        self._sampled: list[tuple[Checkpoint, list[tuple[Request, Completion]]]] = []  # not compared yet
        self._num_ended_starts = 0
        self._observed: dict[str, Any] = {}
        self.unit_rows = int(recipe.engine.unit_rows)
        self._launcher = recipe.classes["launcher"](recipe.launcher)
        self._residency: Residency = self._launcher.residency
        self._is_transformers = recipe.classes["engine"] is HuggingFace

    def generate(self, checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[int, list[Completion]]]:
        pool = self._generating(checkpoint)
        if self._is_transformers or checkpoint.weights in self._compared:
            yield from pool.generate(units)
            return
        compared = _Compared(units)
        yield from compared.taken_from(pool.generate(compared.units()))
        if compared.rollouts:
            self._compared.add(checkpoint.weights)
            self._sampled.append((checkpoint, compared.rollouts))
        if self._residency == "resident":
            self._compare()

    def logprobs(self, checkpoint: Checkpoint, sequences: Sequence[TokenPair]) -> list[list[float]]:
        return self._generating(checkpoint).logprobs(sequences)

    def train(
        self, job: TrainJob, events: Callable[[dict[str, Any]], None], retry: Callable[[], TrainJob]
    ) -> TrainResult:
        self._leave_to_training()
        return self._training_worker(job.kind).train(job, events, retry=retry)

    def merge(self, job: MergeJob) -> None:
        from reasonrun.workers.merging import merge_in_process

        merge_in_process(job, self._run_dir.record_worker, self._interrupted)

    def observed(self) -> dict[str, Any]:
        """What happened since the last call: switches and their seconds, and how far the engine was from the trainer."""
        observed, self._observed = self._observed, {}
        return observed

    @property
    def num_starts(self) -> int:
        """Worker processes started so far."""
        return self._num_ended_starts + sum(pool.num_starts for pool in self._pools())

    @property
    def num_workers(self) -> int:
        """Generation workers that share the units; 1 before there are any."""
        return 1 if self._generation is None else self._generation.num_workers

    def close(self) -> None:
        from reasonrun.workers.child_engine import remove_weights

        for pool in self._pools():
            pool.close()
        remove_weights(self._run_dir.path)  # of an engine whose trainer was ended

    def _generating(self, checkpoint: Checkpoint) -> GenerationPool:
        """The generation workers, with ``checkpoint`` in place and proved."""
        if self._generation is not None and self._loaded == checkpoint.weights:
            return self._generation
        with self._switch():
            self._end_training()
            probe = _probe_of(checkpoint)
            is_resident = self._residency == "resident"
            expected = None if is_resident else self._expected(checkpoint, probe)
            pool = self._started(checkpoint, probe)
            if is_resident:  # beside the engine's start, which takes longer
                expected = self._expected(checkpoint, probe)
            pool.load(checkpoint, probe)
            if expected is not None:
                difference = pool.prove(self._proof(checkpoint, expected))
                # Null is no proof: the engine cannot score.
                self._observed["probe_difference"] = None if math.isnan(difference) else difference
        self._loaded = checkpoint.weights
        return pool

    def _started(self, checkpoint: Checkpoint, probe: Sequence[int]) -> GenerationPool:
        first = self._generation is None
        if self._generation is None:
            self._generation = self._launcher.generation(
                recipe=self._recipe, run_dir=self._run_dir, interrupted=self._interrupted
            )
        self._generation.prestart(checkpoint, probe)
        if first and self._residency == "resident":
            for kind in self._recipe.classes["method"].trains:  # imports take seconds, which sampling can hide
                self._training_worker(kind).prestart()
        return self._generation

    def _proof(self, checkpoint: Checkpoint, logps: tuple[float, ...]) -> Proof:
        before = self._last_proof
        name = checkpoint.step or checkpoint.path
        proof = (
            Proof(policy=name, logps=logps)
            if before is None
            else Proof(policy=name, logps=logps, before=before.policy, logps_before=before.logps)
        )
        self._last_proof = proof
        return proof

    def _expected(self, checkpoint: Checkpoint, probe: Sequence[int]) -> tuple[float, ...] | None:
        """What the probe comes to under these weights; None where nobody but the engine itself could say."""
        by_trainer = read_probe(Path(checkpoint.path))
        if by_trainer is not None or self._is_transformers or not probe:
            return by_trainer
        cache = self._run_dir.path / "derived" / "probes" / f"{checkpoint.weights}.json"
        if cache.is_file():
            return tuple(json.loads(cache.read_text(encoding="utf-8")))
        self._make_room()
        scored = self._by_transformers(checkpoint, [probe_pair(probe)])
        if scored is None:
            return None
        logps = scored[0]
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".partial")
        partial.write_text(json.dumps(logps), encoding="utf-8")
        partial.rename(cache)
        return tuple(logps)

    def _by_transformers(self, checkpoint: Checkpoint, sequences: Sequence[TokenPair]) -> list[list[float]] | None:
        """What transformers gives these tokens; None where it cannot, which is noted: it looks on, and decides nothing."""
        if self._comparer is None:
            self._comparer = self._launcher.generation(
                recipe=_Transformers(), run_dir=self._run_dir, interrupted=self._interrupted, comparing=True
            )
        logps: list[list[float]] | None = None
        try:
            self._comparer.load(checkpoint)
            logps = self._comparer.logprobs(sequences)
        except Stopped:
            raise
        except ReasonrunError as error:
            self._observed["not_compared"] = error.message
        if self._residency != "resident":
            self._num_ended_starts += self._comparer.num_starts
            self._comparer.close()
            self._comparer = None
        return logps

    def _compare(self) -> None:
        """Score the rollouts that were kept for it by transformers."""
        waiting, self._sampled = self._sampled, []
        for checkpoint, rollouts in waiting:
            rollouts = [(request, completion) for request, completion in rollouts if completion.logps]
            sequences = [(request.prompt_ids, completion.token_ids) for request, completion in rollouts]
            theirs = self._by_transformers(checkpoint, sequences) if sequences else None
            if theirs is not None:
                found = mismatch([completion.logps or () for _, completion in rollouts], theirs)
                self._observed["mismatch"] = {"policy": checkpoint.step or checkpoint.path, **found}

    def _leave_to_training(self) -> None:
        """Give the devices to the trainer, as the residency says."""
        if self._generation is not None and self._residency != "resident":
            with self._switch():
                self._make_room()
                self._compare()

    def _make_room(self) -> None:
        """Have the engine leave the devices, as the residency says."""
        if self._residency == "resident" or self._generation is None or not self._loaded:
            return
        if self._residency == "sleep":
            self._generation.sleep()
        else:
            self._num_ended_starts += self._generation.num_starts
            self._generation.close()
            self._generation = None
        self._loaded = ""

    def _end_training(self) -> None:
        if self._residency == "resident":
            return
        for worker in self._training.values():
            self._num_ended_starts += worker.num_starts
            worker.close()
        self._training.clear()

    @contextmanager
    def _switch(self) -> Iterator[None]:
        """Count a change of what is on the devices, and its seconds."""
        began = time.monotonic()
        yield
        self._observed["switches"] = self._observed.get("switches", 0) + 1
        seconds = self._observed.get("switch_seconds", 0.0) + time.monotonic() - began
        self._observed["switch_seconds"] = round(seconds, 3)

    def _training_worker(self, kind: TrainKind) -> TrainingWorker:
        if kind not in self._training:
            self._training[kind] = self._launcher.training(
                TRAINERS[kind], recipe=self._recipe, run_dir=self._run_dir, interrupted=self._interrupted
            )
        return self._training[kind]

    def _pools(self) -> list[GenerationPool | TrainingWorker]:
        return [pool for pool in (self._generation, self._comparer, *self._training.values()) if pool is not None]


@dataclass(frozen=True)
class _Transformers:
    """The parts of a recipe that make the comparer: what the trainers compute with."""

    engine: HuggingFace.Settings = field(default_factory=HuggingFace.Settings)
    classes: Mapping[str, Any] = field(default_factory=lambda: {"engine": HuggingFace})


class _Compared:
    """Takes a few rollouts out of a step's stream, with the log-probabilities of the engine that sampled them."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._units = units
        self._requests: dict[str, Request] = {}
        self.rollouts: list[tuple[Request, Completion]] = []

    def units(self) -> Iterator[Unit]:
        """The units; the first requests of the first one also ask for log-probabilities."""
        for position, (number, requests) in enumerate(self._units):
            if position:
                yield number, requests
                continue
            asked, num_rollouts = [], 0
            for request in requests:
                if num_rollouts < _COMPARED_ROLLOUTS:
                    self._requests[request.key] = request
                    sampling = request.sampling.model_copy(update={"logprobs": True})
                    request = request.model_copy(update={"sampling": sampling})
                    num_rollouts += request.n
                asked.append(request)
            yield number, asked

    def taken_from(self, answers: Iterable[tuple[int, list[Completion]]]) -> Iterator[tuple[int, list[Completion]]]:
        """The answers as they were asked for, without log-probabilities where nobody wanted them."""
        for number, completions in answers:
            yield number, [self._taken(completion) for completion in completions]

    def _taken(self, completion: Completion) -> Completion:
        request = self._requests.get(completion.request)
        if request is None:
            return completion
        if len(self.rollouts) < _COMPARED_ROLLOUTS:
            self.rollouts.append((request, completion))
        return completion if request.sampling.logprobs else completion.model_copy(update={"logps": None})


def _probe_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    return probe_ids(ModelFolder(Path(checkpoint.path)).vocab_size())
