"""Generation in worker processes: each free worker takes the next unit; a unit lost with its worker is asked again."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from reasonrun.errors import RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.records import Checkpoint
from reasonrun.workers import protocol
from reasonrun.workers.crew import Crew, CrewOwner, Item, Limits
from reasonrun.workers.spawning import WorkerSpec
from reasonrun.workers.training import TrainingWorker
from reasonrun.workers.units import Unit, UnitQueue

__all__ = ["GenerationPool", "Limits", "TrainingWorker"]

_NUM_IDLE_CRASHES = 3  # a worker that ends this often while it starts or loads does not do so by chance
_LOGPROBS_UNIT = 64  # sequences


class GenerationPool(CrewOwner):
    """Engines in worker processes, started when first needed.

    Args:
        engine_class_path: dotted path of the engine's class; its ``Settings`` read ``settings_json`` in the worker.
        num_workers: processes that generate at the same time.
        attempt_dir: logs go to ``attempt_dir/logs/generation-<i>.log``.
        record_worker: called with (pid, process group) of every process before it is asked anything.
        python: interpreter of the workers; this one unless given.
        env: variables for all workers; ``device_env[i]`` adds those of worker i.
        through: ``through[i]`` carries worker i to another machine; see ``WorkerSpec``.
        limits: when a worker counts as hanging.
        interrupted: asked ten times a second; a true value ends the workers and raises Stopped, whose exit code is
            that value, 75 when it is plainly True.

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
    ) -> None:
        setup = protocol.Setup(role="generation", class_path=engine_class_path, settings=settings_json)
        specs = [
            WorkerSpec(
                name=f"generation-{index}",
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
        self._num_calls = 0
        self._dispatching = False
        self._num_idle_crashes: Counter[int] = Counter()
        self.num_loads = 0
        self.load_seconds = 0.0

    def prestart(self, checkpoint: Checkpoint | None = None) -> None:
        """Start all workers that do not run, and the load of ``checkpoint`` if given, without waiting."""
        self._refuse_while_dispatching()
        self._checkpoint = checkpoint or self._checkpoint
        self._crew.start_missing()
        self._load_missing()

    def load(self, checkpoint: Checkpoint) -> None:
        """Have every worker answer with ``checkpoint``; returns when all that have a machine have its weights in place.

        Raises WorkerCrash when a worker ends again and again while it loads.
        """
        self.prestart(checkpoint)
        while not self._all_loaded():
            for slot, item in self._turn():
                self._note_idle(slot, item)

    def generate(self, units: Iterable[tuple[int, Sequence[Request]]]) -> Iterator[tuple[int, list[Completion]]]:
        """The completions of every (unit number, requests), each unit once, in the order in which they are ready.

        Units are taken from the iterable when a worker is free. What workers have begun when the caller leaves the
        iteration is lost.

        Raises:
            RunFailed: a unit ended its worker twice, or an answer does not fit its requests.
            Stopped: ``interrupted()`` became true.
        """
        asked: dict[int, Sequence[Request]] = {}

        def make_units() -> Iterator[Unit]:
            for number, requests in units:
                asked[number] = requests
                yield _generate_unit(number, tuple(requests))

        with contextlib.closing(self._dispatch(make_units())) as answers:
            for number, answer in answers:
                assert isinstance(answer, protocol.Generated)
                yield number, _checked(asked.pop(number), answer.completions)

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Natural log-probabilities at temperature 1 of each (prompt ids, completion ids), one list per pair.

        Raises as ``generate`` does.
        """
        starts = range(0, len(sequences), _LOGPROBS_UNIT)
        units = (_logprobs_unit(start, sequences[start : start + _LOGPROBS_UNIT]) for start in starts)
        rows: dict[int, list[list[float]]] = {}
        for start, answer in self._dispatch(units):
            assert isinstance(answer, protocol.Scored)
            rows[start] = [list(row) for row in answer.logps]
        logps = [row for start in starts for row in rows[start]]
        if [len(row) for row in logps] != [len(completion_ids) for _, completion_ids in sequences]:
            raise RunFailed("the engine gave another number of log-probabilities than there are completion tokens")
        return logps

    def _dispatch(self, units: Iterator[Unit]) -> Generator[tuple[int, protocol.FromWorker], None, None]:
        self._refuse_while_dispatching()
        if self._checkpoint is None:
            raise RuntimeError("load a checkpoint before asking for completions")
        self.prestart()
        queue = UnitQueue(units)
        self._dispatching = True
        try:
            while self._assign(queue):
                answers = []
                for slot, item in self._turn():
                    if slot not in queue.in_flight:
                        self._note_idle(slot, item)
                    elif isinstance(item, protocol.WorkerCrash):
                        queue.lose(slot, item)
                    else:
                        answers.append((queue.finish(slot), item))
                # Free workers get their next unit before the caller stores these.
                self._assign(queue)
                yield from answers
        finally:
            self._dispatching = False
            for slot in queue.in_flight:
                self._crew.end(slot)

    def _assign(self, queue: UnitQueue) -> bool:
        """Give free workers work; False when every unit is answered."""
        for slot in self._free_slots():
            unit = queue.take(slot)
            if unit is None:
                break
            self._num_calls += 1
            self._crew.workers[slot].send(unit.message(self._num_calls))
        return not queue.done

    def _turn(self) -> list[Item]:
        self._crew.start_missing()
        self._load_missing()
        items: list[Item] = []
        for slot, item in self._crew.turn():
            if isinstance(item, protocol.Loaded):
                self._num_idle_crashes[slot] = 0
                self.num_loads += 1
                self.load_seconds += item.seconds
            else:
                items.append((slot, item))
        return items

    def _note_idle(self, slot: int, item: protocol.FromWorker | protocol.WorkerCrash) -> None:
        if not isinstance(item, protocol.WorkerCrash) or item.displaced:
            return
        self._num_idle_crashes[slot] += 1
        if self._num_idle_crashes[slot] >= _NUM_IDLE_CRASHES:
            self._num_idle_crashes[slot] = 0
            self._crew.end_all()
            raise item

    def _load_missing(self) -> None:
        for worker in self._crew.workers.values():
            if self._checkpoint is not None and worker.call is None and not _same(worker.loaded, self._checkpoint):
                self._num_calls += 1
                worker.send(protocol.Load(call=self._num_calls, checkpoint=self._checkpoint))

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


def _generate_unit(number: int, requests: tuple[Request, ...]) -> Unit:
    content = "the requests " + ", ".join(request.key for request in requests)
    return Unit(number, content, lambda call: protocol.Generate(call=call, requests=requests))


def _logprobs_unit(start: int, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Unit:
    part = tuple((tuple(prompt_ids), tuple(completion_ids)) for prompt_ids, completion_ids in sequences)
    content = f"the log-probabilities of sequences {start} to {start + len(part) - 1}"
    return Unit(start, content, lambda call: protocol.Logprobs(call=call, sequences=part))


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
