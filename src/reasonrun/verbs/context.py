"""What every verb works with: the run directory, the recipe, the task, and where models run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from reasonrun.contracts import Grader, Task, TrainEvents
from reasonrun.errors import RunConflict
from reasonrun.generation import Completion, Request, Usage
from reasonrun.ledger.borrowing import Donors
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.recipe import ResolvedRecipe
from reasonrun.records import Checkpoint, Message, Problem, Rollout
from reasonrun.rendering import Renderer
from reasonrun.samples import Extent
from reasonrun.training import MergeJob, TrainJob, TrainResult

Unit = tuple[int, Sequence[Request]]
TokenPair = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt and of what follows it."""


class Host(Protocol):
    """Where models run: inside the supervisor (scripted) or in worker processes."""

    unit_rows: int

    @property
    def num_workers(self) -> int: ...

    def generate(self, checkpoint: Checkpoint, units: Iterable[Unit]) -> Iterator[tuple[int, list[Completion]]]: ...

    def logprobs(self, checkpoint: Checkpoint, sequences: Sequence[TokenPair]) -> list[list[float]]: ...

    def train(self, job: TrainJob, events: TrainEvents, retry: Callable[[], TrainJob]) -> TrainResult: ...

    def merge(self, job: MergeJob) -> None: ...

    def observed(self) -> dict[str, Any]:
        """What happened since the last call that belongs to no result: switches, differences between engine and trainer."""
        ...

    def close(self) -> None: ...


class Progress(Protocol):
    """Shows what happens. Never decides anything."""

    def begin(self, step: str, total: int, done: int) -> None: ...

    def advance(self, step: str, amount: int, note: str = "") -> None: ...

    def end(self, step: str, summary: str) -> None: ...

    def say(self, line: str) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step of a plan. Units are requests, rollouts, examples or optimizer steps, as ``unit`` says."""

    step: str
    verb: str
    unit: str
    units: Extent
    tokens: Extent  # generated or trained
    disk_bytes: Extent
    generated: Extent = field(default_factory=lambda: Extent.of(0))  # by a training step that samples while it trains

    def only_possible(self) -> PlannedStep:
        """The same for a step that need not come: nothing of it is expected."""
        return replace(
            self,
            units=self.units.share(0),
            tokens=self.tokens.share(0),
            disk_bytes=self.disk_bytes.share(0),
            generated=self.generated.share(0),
        )


@dataclass(kw_only=True)
class Context:
    """State of one attempt. ``planned`` is a list in a rehearsal and None in a run."""

    run_dir: RunDir
    recipe: ResolvedRecipe
    task: Task
    grader: Grader
    renderer: Renderer
    base: Checkpoint
    models: Mapping[str, Checkpoint]  # the further ones, by role
    host: Host
    progress: Progress
    check_stop: Callable[[], None]
    code_changed: bool = False
    accept_code: bool = False
    recipe_changes: list[str] = field(default_factory=list)  # semantic fields that differ from the run's own recipe
    takes_changes_at: str = ""  # the step from which on a changed recipe is meant (--redo); * is any
    planned: list[PlannedStep] | None = None
    max_problems: int | None = None  # in a rehearsal: the problems of a split that take part
    tokens_per_completion: float = 0.0  # in a rehearsal: an assumed length; 0 takes the script's
    rows: list[dict[str, Any]] = field(default_factory=list)  # metrics.jsonl, in the order in which steps are reached
    on_row: Callable[[dict[str, Any]], None] = lambda row: None
    problems_by_id: dict[str, Problem] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)  # by curation step: its counts by reason
    donors: Donors | None = None  # other runs that may have made a step already
    borrowed: set[str] = field(default_factory=set)  # steps taken from them in this attempt
    spent: dict[tuple[str, str], Usage] = field(default_factory=dict)  # on endpoints, by (weights, url)
    _renderers: dict[str, Renderer] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.recipe.seed)

    @property
    def evaluation_tokens(self) -> int:
        """Longest completion of an evaluation: the recipe's, else the method's."""
        own: int = getattr(self.recipe.method, "max_new_tokens", 256)
        return self.recipe.evaluate.max_new_tokens or own

    @property
    def attempt_dir(self) -> Path:
        """Folder of this attempt; nothing in it is ever read as a result."""
        return self.run_dir.attempt_dir

    @property
    def cache_dir(self) -> Path:
        return self.run_dir.path / "derived"

    def open_step(self, name: str, fingerprint: dict[str, Any]) -> Committed | OpenStep:
        """The committed step of that name, or the open one to work on; raises RunConflict when they differ."""
        self.check_stop()
        if self.recipe_changes and self.run_dir.committed(name) is None:
            self._meet_change(name)
        try:
            step = self.run_dir.step(name, fingerprint)
        except RunConflict as conflict:
            conflict.message += self._changed_fields("which fits these changes of the recipe:")
            raise
        return self._borrow(step, fingerprint) or step if isinstance(step, OpenStep) else step

    def _meet_change(self, name: str) -> None:
        """At the first step that the changed recipe would make: take the change, if ``--redo`` asked for it, or refuse.

        What is committed and was reached before has the fingerprints of the changed recipe, so it stays.
        """
        if self.takes_changes_at not in ("*", name):
            raise RunConflict(
                f"the recipe of {self.run_dir.path} changed, and step {name} would be the first to use it:"
                + self._changed_fields(),
                hint="revert the change; or start a new run with --run NEW; or, to go on in this one with the change,"
                f" --redo {name}",
            )
        self.run_dir.amend({"recipe": self.recipe.resolved})
        self.progress.say(f"from step {name} on, {self.run_dir.path} has the changed recipe:{self._changed_fields()}")
        self.recipe_changes = []

    def _borrow(self, step: OpenStep, fingerprint: dict[str, Any]) -> Committed | None:
        if self.donors is None:
            return None

        def refuse(reason: str) -> None:
            self.note({"step": step.name, "not_borrowed": reason})
            self.progress.say(f"{step.name}: {reason}")

        def take(path: Path) -> None:
            self.note({"step": step.name, "borrowed_from": str(path)})
            self.progress.say(f"{step.name}: taken from {path}")

        taken = self.donors.lend(step, fingerprint, take, refuse)
        if taken is not None:
            self.borrowed.add(step.name)
        return taken

    def _changed_fields(self, heading: str = "") -> str:
        lines = [f"\n  {line}" for line in self.recipe_changes[:10]]
        return "".join([f"\n{heading}" if heading and lines else "", *lines])

    def record(self, committed: Committed, verb: str, *, new: bool) -> None:
        """Add the step's line to the metrics record; a new commit, borrowed or made, also writes it to disk."""
        # Sealed results come back with sorted keys; a new one must read the same.
        result = json.loads(json.dumps(committed.result, sort_keys=True))
        row = {"step": committed.name, "verb": verb, **result}
        self.rows.append(row)
        if new or committed.name in self.borrowed:
            self.run_dir.write_projection("metrics.jsonl", self.rows)
        self.on_row(row)

    def renderer_of(self, checkpoint: Checkpoint) -> Renderer:
        """The policy's renderer, or that of a further model with another tokenizer or template."""
        if checkpoint.tokenizer == self.renderer.digest:
            return self.renderer
        if checkpoint.tokenizer not in self._renderers:
            self._renderers[checkpoint.tokenizer] = Renderer.load(checkpoint.path)
        return self._renderers[checkpoint.tokenizer]

    def tokenizer_of(self, rollout: Rollout) -> str:
        """Digest of the tokenizer that the ids of ``rollout`` are of: a further model's own, else the policy's."""
        others = (m for m in self.models.values() if m.weights == rollout.policy != self.base.weights)
        return next((model.tokenizer for model in others), self.renderer.digest)

    def rendered(self, checkpoint: Checkpoint, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a conversation for ``checkpoint``; none for a remote one, which reads words."""
        return () if checkpoint.remote else self.renderer_of(checkpoint).render(messages)

    def prompt(self, problem: Problem, style: str) -> tuple[tuple[Message, ...], tuple[int, ...]]:
        """The conversation that asks ``problem`` in ``style``, and its ids for the policy."""
        messages = self.task.messages(problem, style)
        return messages, self.renderer.render(messages)

    @contextmanager
    def timed(self, step: str, verb: str) -> Iterator[None]:
        """Note the seconds that this attempt spent on a step, and what it saw of the engine; they never enter the step."""
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds = round(time.monotonic() - begin, 3)
            self.note({"step": step, "verb": verb, "seconds": seconds, **self.host.observed()})

    def note(self, line: dict[str, Any]) -> None:
        """Add a line about this attempt; nothing that a result depends on."""
        with (self.attempt_dir / "notes.jsonl").open("a") as notes:
            notes.write(json.dumps(line) + "\n")
