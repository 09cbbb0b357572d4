"""A run directory as reports read it: what is committed, in the order of its record. Takes no lock, changes no step."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reasonrun.errors import RecipeError, RunFailed
from reasonrun.ledger.catalogue import RUN_NAME, read_lines, run_identity, step_states, stored_fingerprint
from reasonrun.ledger.files import Files, decode_json
from reasonrun.ledger.seals import read_seal
from reasonrun.ledger.steps import Committed
from reasonrun.records import Problem, Record, Rollout, Score

if TYPE_CHECKING:
    from reasonrun.sets import Rows

R = TypeVar("R", bound=Record)
Scored = tuple["Rows[Rollout]", tuple["Rows[Score]", ...]]


@dataclass(frozen=True, kw_only=True)
class SampleStep:
    """A committed ``sample`` step and the committed steps that graded it, in the order of the record."""

    name: str
    grade_steps: tuple[str, ...]
    is_evaluation: bool


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run, finished or not. Made by ``open_run``.

    Attributes:
        path: the run directory.
        recipe: the resolved recipe that the run began with.
        rows: the lines of ``metrics.jsonl`` whose steps are committed, in order.
        num_unfinished: steps that were begun and are not committed.
        num_unlisted: committed steps without a line: the run no longer reaches them, or stopped before noting them.
        result: what the run ended with; None while it is unfinished.
    """

    path: Path
    recipe: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    num_unfinished: int
    num_unlisted: int
    result: dict[str, Any] | None
    _files: Files = field(default_factory=Files, repr=False)

    @property
    def state(self) -> str:
        return "unfinished" if self.result is None else "finished"

    def names(self, verb: str) -> list[str]:
        """The listed steps of a verb."""
        return [row["step"] for row in self.rows if row["verb"] == verb]

    def fingerprint(self, step: str) -> dict[str, Any]:
        """What a step is a function of. Raises RunFailed when its ``step.json`` is damaged or missing."""
        fingerprint = stored_fingerprint(self.path, step)
        if not isinstance(fingerprint, dict):
            raise RunFailed(f"{self.path / 'steps' / step} is damaged: it has no step.json.")
        return fingerprint

    def sample_steps(self) -> list[SampleStep]:
        """All listed steps that hold rollouts, each with every step that graded them; an on-policy training step holds its
        own verdicts."""
        graded: dict[str, list[str]] = {}
        for name in self.names("grade"):
            graded.setdefault(self.fingerprint(name)["inputs"][0], []).append(name)
        return [
            SampleStep(
                name=name,
                grade_steps=tuple(graded.get(name, ())),
                # requests of an evaluation are seeded alike in every run, those of a round by run and step
                is_evaluation=self.fingerprint(name)["seed"][:1] == ["evaluate"],
            )
            for name in self.names("sample")
        ] + [
            SampleStep(name=name, grade_steps=(name,), is_evaluation=False)
            for name in self.names("train")
            if self._is_on_policy(name)
        ]

    def _is_on_policy(self, step: str) -> bool:
        return bool(self.fingerprint(step).get("verb") == "train_on_policy")

    def table(self, record_type: type[R], step: str) -> Rows[R]:
        """The rows of a committed step, mapped into memory. Raises RunFailed when they are damaged."""
        from reasonrun.sets import Rows  # numpy and pyarrow, which a report without rows need not wait for

        seal = read_seal(self.path / "steps" / step)
        if seal is None:
            raise RunFailed(f"step {step} of {self.path} is not committed any more.", hint="run the command again")
        committed = Committed(step, self.path / "steps" / step, seal, self._files)
        committed.verify()
        name = {"Rollout": "rollouts", "Score": "scores"}[record_type.__name__] if self._is_on_policy(step) else "rows"
        return Rows.load(record_type, committed.table_paths(name), self._cache_dir)

    def scored_parts(self, sampled: str, grade_steps: Iterable[str]) -> Iterator[Scored]:
        """The rollouts of a ``sample`` step beside the scores of each grader, in pieces that fit into memory.

        Args:
            sampled: a committed ``sample`` step.
            grade_steps: committed steps that graded it; may be none.

        Raises:
            RunFailed: a table is damaged, or has another number of rows than the rollouts.
        """
        rollouts = self.table(Rollout, sampled)
        scores = {name: self.table(Score, name) for name in grade_steps}
        for name, rows in scores.items():
            if len(rows) != len(rollouts):
                raise RunFailed(
                    f"{self.path}: {name} holds {len(rows)} scores for {len(rollouts)} rollouts of {sampled}.",
                    hint=f"run the recipe again with --redo {name}",
                )
        for part in zip(rollouts.parts(), *(rows.parts() for rows in scores.values()), strict=True):
            yield part[0], part[1:]

    def problem_parts(self) -> Iterator[Rows[Problem]]:
        """The problems of every split, in pieces."""
        for step in self.names("problems"):
            yield from self.table(Problem, step).parts()

    def problems(self, ids: Iterable[str]) -> dict[str, Problem]:
        """The problems with these ids; unknown ones are left out."""
        wanted, found = set(ids), {}
        for part in self.problem_parts():
            here = [row for row, problem_id in enumerate(part.column("id")) if problem_id in wanted]
            found.update({problem.id: problem for problem in part.take(here)} if here else {})
        return found

    @cached_property
    def _cache_dir(self) -> Path:
        """Where mapped copies of the tables live: the run's own, unless the run may only be read."""
        own = self.path / "derived"
        if os.access(own if own.is_dir() else self.path, os.W_OK):
            return own
        scratch = Path(tempfile.mkdtemp(prefix="reasonrun-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        return scratch


def open_run(path: Path) -> RunRecord:
    """Read what a run directory says about itself.

    Raises:
        RecipeError: the folder is no run directory.
        RunFailed: ``run.json`` or the seal of the run is damaged.
    """
    check_is_run(path)
    rows = read_lines(path / "metrics.jsonl")  # before the steps: a line is written after its step is committed
    states = step_states(path)
    seal = read_seal(path)
    listed = tuple(row for row in rows if states.get(row["step"]) == "committed")
    num_committed = sum(state == "committed" for state in states.values())
    return RunRecord(
        path=path,
        recipe=run_identity(path)["recipe"],
        rows=listed,
        num_unfinished=len(states) - num_committed,
        num_unlisted=num_committed - len(listed),
        result=None if seal is None else seal.content["result"],
    )


def check_is_run(path: Path, *, or_its_remains: bool = False) -> None:
    """Raises RecipeError when ``path`` is no run directory, or one whose job has not begun.

    With ``or_its_remains`` a folder that has steps and no ``run.json`` any more counts as one.
    """
    if or_its_remains and step_states(path):
        return
    with suppress(OSError, ValueError, KeyError, TypeError):
        follow = decode_json((path / "jobs" / "job.json").read_bytes())["follow"]
        if not (path / RUN_NAME).exists():
            raise RecipeError(f"{path} is submitted and has not begun", hint=f"see where it waits: {follow}")
    if not (path / RUN_NAME).is_file():
        what = f"has no {RUN_NAME}" if path.is_dir() else "does not exist" if not path.exists() else "is a file"
        raise RecipeError(f"{path} is not a run directory: it {what}", hint="list the runs with: reasonrun status")


def attempt_notes(path: Path) -> list[dict[str, Any]]:
    """What all attempts of a run noted, oldest first: seconds by step."""
    return [note for notes in sorted(path.glob("attempts/*/notes.jsonl")) for note in read_lines(notes)]
