"""Generation in worker processes: each free worker takes the next unit; a unit lost with its worker is asked again."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from reasonrun.errors import RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.probing import Proof
from reasonrun.records import Checkpoint
from reasonrun.workers import protocol
from reasonrun.workers.crew import Crew, CrewOwner, Item, Limits
from reasonrun.workers.spawning import WorkerSpec
from reasonrun.workers.training import TrainingWorker
from reasonrun.workers.units import NUM_EXCUSED, Unit, UnitQueue

__all__ = ["GenerationPool", "Limits", "TrainingWorker"]

# A worker that ends this often while it starts or loads does not do so by chance: while no worker answers, and at all.
_NUM_FUTILE_CRASHES, _NUM_IDLE_CRASHES = 3, 8
_LOGPROBS_UNIT = 64  # sequences


class GenerationPool(CrewOwner):
    """Engines in worker processes, started when first needed.

    Args:
        engine_class_path: dotted path of the engine's class; its ``Settings`` read ``settings_json`` in the worker.
        num_workers: processes that generate at the same time.
        attempt_dir: logs go to ``attempt_dir/logs/<name>-<i>.log``.
        record_worker: called with (pid, process group) of every process before it is asked anything.
        python: interpreter of the workers; this one unless given.
        env: variables for all workers; ``device_env[i]`` adds those of worker i.
        through: ``through[i]`` carries worker i to another machine; see ``WorkerSpec``.
        limits: when a worker counts as hanging.
        interrupted: asked ten times a second; a true value ends the workers and raises Stopped, whose exit code is
            that value, 75 when it is plainly True.
        name: what the workers are called in logs and errors.

    Every error that leaves a method has ended the workers that were busy; the pool can be used again.
    """

    def __init__(
        self,
        engine_class_path: str,
        settings_json: str,
        *,
        num_workers: int,
        attempt_dir: Path,
        record_worker: Callable[[int, int], None],
        python: str | None = None,
        env: Mapping[str, str] | None = None,
        device_env: Sequence[Mapping[str, str]] | None = None,
        through: Sequence[Sequence[str]] | None = None,
        limits: Limits | None = None,
        interrupted: Callable[[], int] = lambda: 0,
        name: str = "generation",
    ) -> None:
        setup = protocol.Setup(role="generation", class_path=engine_class_path, settings=settings_json)
        specs = [
            WorkerSpec(
                name=f"{name}-{index}",
                setup=setup,
                attempt_dir=attempt_dir,
                record_worker=record_worker,
                python=python,
                env={**(env or {}), **own_env},
                through=tuple(own_through),
            )
            for index, own_env, own_through in zip(
                range(num_workers), device_env or [{}] * num_workers, through or [()] * num_workers, strict=True
            )
        ]
        super().__init__(Crew(specs, limits or Limits(), interrupted))
        self._checkpoint: Checkpoint | None = None
        self._probe: tuple[int, ...] = ()
        self._proof: Proof | None = None
        self._probed: dict[int, tuple[float, ...]] = {}  # by slot, of the model that is there
        self._probed_before: dict[int, tuple[float, ...]] = {}  # of the one before
        self._num_calls = 0
        self._dispatching = False
        # By slot: crashes in units; its own ones while idle since its last load; and, from outside or not, since any answer.
        self._num_crashes: Counter[int] = Counter()
        self._num_idle_crashes: Counter[int] = Counter()
        self._num_futile_crashes: Counter[tuple[int, bool]] = Counter()
        self.num_loads = 0
        self.load_seconds = 0.0

    @property
    def num_workers(self) -> int:
        """Workers that share the units."""
        return len(self._crew.specs)

    def prestart(self, checkpoint: Checkpoint | None = None, probe: Sequence[int] = ()) -> None:
        """Start all workers that do not run, and the load of ``checkpoint`` if given, without waiting."""
        self._refuse_while_dispatching()
        if checkpoint is not None:
            if not _same(self._checkpoint, checkpoint):
                self._proof = None
                self._probed_before = {**self._probed_before, **self._probed}
                self._probed.clear()
            self._checkpoint, self._probe = checkpoint, tuple(probe)
        self._crew.start_missing()
        self._load_missing()

    def load(self, checkpoint: Checkpoint, probe: Sequence[int] = ()) -> None:
        """Have every worker answer with ``checkpoint``; returns when all that have a machine have its weights in place.

        Args:
            checkpoint: the policy.
            probe: tokens that every worker scores after every load, for ``prove``.

        Raises WorkerCrash when a worker ends again and again while it loads.
        """
        self.prestart(checkpoint, probe)
        while not self._all_loaded():
            for slot, item in self._turn():
                self._note_idle(slot, item)

    def prove(self, proof: Proof) -> float:
        """Check what the workers' probes came to, now and whenever one of them loads this checkpoint again.

        Returns the largest mean difference of a worker from the trainer; not a number when the engine cannot score, which
        proves nothing. Raises RunFailed when a worker has other weights; all are ended then.
        """
        if not any(self._probed.values()):
            return math.nan
        self._proof = proof
        return max(self._check_probe(slot) for slot in self._probed)

    @property
    def num_done(self) -> int:
        """Tokens that the running workers have shown to have made."""
        return sum(worker.num_done for worker in self._crew.workers.values())

    def sleep(self) -> None:
        """Have every worker give its device's memory back and wait; ``load`` wakes them."""
        self._refuse_while_dispatching()
        self._checkpoint = None
        while awake := [w for w in self._crew.workers.values() if w.call is not None or w.loaded is not None]:
            for worker in awake:
                if worker.call is None:
                    self._num_calls += 1
                    worker.send(protocol.Sleep(call=self._num_calls))
            for slot, item in self._turn():
                self._note_idle(slot, item)

    def generate(self, units: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Completion]]]:
        """The completions of every (unit number, requests), each request once, in the order in which they are ready.

        Units are taken from the iterable when a worker is free. A unit comes in one piece, unless it ended workers: then it
        comes in parts of whole requests. What workers have begun when the caller leaves the iteration is lost.

        Raises:
            RunFailed: after all other completions, when a request ends its worker every time; at once, when workers end
                again and again without any answer, or an answer does not fit its requests.
            Stopped: ``interrupted()`` became true.
        """
        with contextlib.closing(self._dispatch(_generate_unit(*unit) for unit in units)) as answers:
            for unit, answer in answers:
                assert isinstance(answer, protocol.Generated)
                yield unit.number, _checked(unit.items, answer.completions)

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Natural log-probabilities at temperature 1 of each (prompt ids, completion ids), one list per pair.

        Raises as ``generate`` does.
        """
        starts = range(0, len(sequences), _LOGPROBS_UNIT)
        units = (_logprobs_unit(start, sequences[start : start + _LOGPROBS_UNIT]) for start in starts)
        rows: dict[int, list[float]] = {}
        for unit, answer in self._dispatch(units):
            assert isinstance(answer, protocol.Scored)
            if len(answer.logps) == len(unit.items):
                rows.update((place, list(row)) for (place, _, _), row in zip(unit.items, answer.logps, strict=True))
        logps = [rows.get(place, []) for place in range(len(sequences))]
        if [len(row) for row in logps] != [len(completion_ids) for _, completion_ids in sequences]:
            raise RunFailed("the engine gave another number of log-probabilities than there are completion tokens")
        return logps

    def _dispatch(self, units: Iterator[Unit]) -> Generator[tuple[Unit, protocol.FromWorker], None, None]:
        self._refuse_while_dispatching()
        if self._checkpoint is None:
            raise RuntimeError("load a checkpoint before asking for completions")
        self.prestart()
        queue = UnitQueue(units, self.num_workers)
        self._dispatching = True
        try:
            while self._assign(queue):
                answers = []
                for slot, item in self._turn():
                    if slot not in queue.in_flight:
                        self._note_idle(slot, item)
                    elif isinstance(item, protocol.WorkerCrash):
                        self._num_crashes[slot] += 1
                        queue.lose(slot, item)
                    else:
                        self._num_futile_crashes.clear()
                        answers.append((queue.finish(slot), item))
                # Free workers get their next unit before the caller stores these.
                self._assign(queue)
                yield from answers
            queue.check_complete()
        finally:
            self._dispatching = False
            for slot in queue.in_flight:
                self._crew.end(slot)

    def _assign(self, queue: UnitQueue) -> bool:
        """Give free workers work; False when every unit is answered."""
        # What is suspected of ending workers goes to the device that has lost the fewest.
        for slot in sorted(self._free_slots(), key=lambda slot: self._num_crashes[slot]):
            unit = queue.take(slot)
            if unit is None:
                break
            self._num_calls += 1
            self._crew.workers[slot].send(unit.message(self._num_calls, unit.items))
        return not queue.done

    def _turn(self) -> list[Item]:
        self._crew.start_missing()
        self._load_missing()
        items: list[Item] = []
        for slot, item in self._crew.turn():
            if isinstance(item, protocol.Loaded):
                self._forget_idle_crashes(slot)
                self.num_loads += 1
                self.load_seconds += item.seconds
                self._probed[slot] = item.probe_logps
                if self._proof is not None:
                    self._check_probe(slot)
            else:
                items.append((slot, item))
        return items

    def _check_probe(self, slot: int) -> float:
        assert self._proof is not None
        try:
            name, logps = self._crew.specs[slot].name, self._probed[slot]
            difference = self._proof.check(name, logps)
            if slot in self._probed_before:
                self._proof.check_moved(name, logps, self._probed_before[slot])
            return difference
        except RunFailed:
            self._crew.end_all()
            raise

    def _note_idle(self, slot: int, item: protocol.FromWorker | protocol.WorkerCrash) -> None:
        if not isinstance(item, protocol.WorkerCrash) or item.displaced:
            return
        self._num_idle_crashes[slot] += not item.from_outside
        self._num_futile_crashes[slot, item.from_outside] += 1
        limit = NUM_EXCUSED if item.from_outside else _NUM_FUTILE_CRASHES
        is_final = self._num_futile_crashes[slot, item.from_outside] >= limit
        if is_final or self._num_idle_crashes[slot] >= _NUM_IDLE_CRASHES:
            self._forget_idle_crashes(slot)
            self._crew.end_all()
            raise item

    def _forget_idle_crashes(self, slot: int) -> None:
        self._num_idle_crashes[slot] = 0
        self._num_futile_crashes[slot, False] = self._num_futile_crashes[slot, True] = 0

    def _load_missing(self) -> None:
        for worker in self._crew.workers.values():
            if self._checkpoint is not None and worker.call is None and not _same(worker.loaded, self._checkpoint):
                self._num_calls += 1
                worker.send(protocol.Load(call=self._num_calls, checkpoint=self._checkpoint, probe=self._probe))

    def _free_slots(self) -> list[int]:
        workers = self._crew.workers.items()
        return [slot for slot, w in workers if w.call is None and _same(w.loaded, self._checkpoint)]

    def _all_loaded(self) -> bool:
        free = set(self._free_slots())
        # A worker that looks for another machine may find none for hours; the others need not wait for it.
        return bool(free) and len(free | self._crew.displaced) == len(self._crew.specs)

    def _refuse_while_dispatching(self) -> None:
        if self._dispatching:
            raise RuntimeError("one generate at a time: exhaust or close the running one first")


def _same(loaded: Checkpoint | None, wanted: Checkpoint | None) -> bool:
    if loaded is None or wanted is None:
        return False
    return (loaded.weights, loaded.tokenizer) == (wanted.weights, wanted.tokenizer)


def _generate_unit(number: int, requests: Sequence[Request]) -> Unit:
    def describe(requests: tuple[Request, ...]) -> str:
        return ", ".join(f"request {request.key} of problem {request.problem_id}" for request in requests)

    return Unit(number, tuple(requests), lambda call, items: protocol.Generate(call=call, requests=items), describe)


def _logprobs_unit(start: int, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Unit:
    def message(call: int, items: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]) -> protocol.Logprobs:
        return protocol.Logprobs(call=call, sequences=tuple((prompt_ids, ids) for _, prompt_ids, ids in items))

    def describe(items: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]) -> str:
        return ", ".join(f"the log-probabilities of sequence {place} (from 0)" for place, _, _ in items)

    items = tuple((start + i, tuple(prompt), tuple(ids)) for i, (prompt, ids) in enumerate(sequences))
    return Unit(start, items, message, describe)


def _checked(requests: Sequence[Request], completions: Sequence[Completion]) -> list[Completion]:
    wanted = Counter((request.key, index) for request in requests for index in range(request.n))
    got = Counter((completion.request, completion.index) for completion in completions)
    if wanted != got:
        raise RunFailed(
            f"the engine's completions are not those asked for: missing {sorted(wanted - got)[:5]}, "
            f"not asked for {sorted(got - wanted)[:5]}",
            hint="an engine yields each of the n samples of each request exactly once",
        )
    return list(completions)
