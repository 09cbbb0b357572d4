"""The shapes that plug-ins fill: methods, tasks, graders, engines, trainers, trackers.

A plug-in is a module with one class of the right shape, found by name (``star`` is ``reasonrun.methods.star``) or by
dotted path (``my_package.my_module.MyMethod``). Its nested ``Settings`` class is what a recipe may say about it.
Importing a plug-in module must be cheap: heavy libraries are imported where they are first used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from reasonrun.generation import Completion, Request
from reasonrun.records import Checkpoint, Graded, Message, Problem, Sampling, Score
from reasonrun.settings import Settings
from reasonrun.training import TrainJob, TrainKind, TrainResult

if TYPE_CHECKING:
    from reasonrun.lab import Lab


F = TypeVar("F", bound=Callable[..., Any])


def versioned(number: int) -> Callable[[F], F]:
    """Mark a function that a run names (curation, on-policy rollouts and rewards) with its version; a change of behaviour
    bumps it."""

    def mark(function: F) -> F:
        function.version = number  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What a small sample of the base must show before a run is worth its compute.

    ``needs`` says what the method learns from: ``right`` answers, ``wrong`` ones, or ``variance``: problems with both.
    """

    style: str
    sampling: Sampling
    needs: frozenset[Literal["right", "wrong", "variance"]] = frozenset({"right"})


class Method(ABC):
    """A self-training method: one class, whose ``run`` reads like the paper's pseudo-code.

    ``requires`` names the styles and capabilities that the task must offer whatever the settings; ``needs`` adds those
    that the settings ask for. ``check`` refuses a pair that lacks one. ``paper`` cites the publication, and ``from_paper``
    names the fields below ``method`` whose defaults it states, with spaces between them; the rest is a choice of this project.
    """

    Settings: ClassVar[type[Settings]]
    paper: ClassVar[str] = ""
    from_paper: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset({"plain"})
    trains: ClassVar[tuple[TrainKind, ...]] = ("sft",)  # what its train steps run; () when it trains nothing

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def evaluation_turns(self) -> int:
        """Attempts in a row that its evaluations must have (``evaluate.turns``)."""
        return 1

    def needs(self) -> Mapping[str, str]:
        """Styles and capabilities of the task that these settings ask for, each with the setting (below ``method``) that
        does."""
        return {}

    def roles(self) -> Mapping[str, str]:
        """Roles of the models that these settings ask for, each with the setting that does."""
        return {}

    def before(self, lab: Lab) -> None:  # noqa: B027 - most methods have nothing to refuse
        """Refuse what these settings cannot do with these problems, before the preflight or anything else is sampled."""

    @abstractmethod
    def run(self, lab: Lab) -> Checkpoint:
        """The method. Branches only on committed results and ``lab.rng``; returns the last policy."""

    def findings(self, lab: Lab) -> list[str]:
        """What a person should know of the finished run, from ``lab.evaluations``: one line each, exit code 5."""
        return []

    def preflight(self) -> Probe | None:
        """What to look at before the run; None for a method that does not learn from its own samples."""
        if not self.trains:
            return None
        return Probe(style="plain", sampling=Sampling(max_new_tokens=getattr(self.config, "max_new_tokens", 256)))


class Grader(Protocol):
    """Turns a completion into a verdict. Crosses processes, so it is built from plain settings."""

    id: str  # name and version, such as number-1; a change of behaviour bumps the version

    @property
    def settings(self) -> Settings:
        """What else the verdict depends on."""
        ...

    def grade(self, problem: Problem, text: str, *, truncated: bool) -> Score:
        """Verdict on one completion. Never raises on the policy's text."""
        ...

    def grade_many(self, items: Iterable[tuple[Problem, str, bool]]) -> Generator[Score]:
        """Verdicts on (problem, text, truncated) in order; slow graders work in parallel."""
        ...

    def close(self) -> None:
        """Give grading processes back; the next call starts them again."""
        ...


class Task(ABC):
    """A source of problems and the way to put and check them.

    ``styles`` are the prompt styles that ``messages`` knows; ``capabilities`` the optional abilities, each the method of
    that name (segment, first_error, solution, correction, gold_score, question_about). ``prompt_version`` is bumped whenever a
    rendered prompt changes.
    """

    Settings: ClassVar[type[Settings]]
    name: ClassVar[str]
    prompt_version: ClassVar[int] = 1
    styles: frozenset[str] = frozenset({"plain"})
    capabilities: frozenset[str] = frozenset()
    reads_logps: ClassVar[bool] = False  # whether ``tables`` reads the log-probabilities of sampled rows
    hint_markers: ClassVar[tuple[str, ...]] = ()  # texts by which a solution shows that it saw the hint

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of ``train``, ``dev`` or ``test``, in a fixed order."""

    @abstractmethod
    def messages(self, problem: Problem, style: str) -> tuple[Message, ...]:
        """The conversation that asks ``problem`` in ``style``; the last message is the user's."""

    @abstractmethod
    def grader(self) -> Grader:
        """The task's own verifier."""

    @abstractmethod
    def direct_answer(self, problem: Problem) -> str:
        """The gold answer alone, in the form that the grader reads: what direct fine-tuning learns."""

    @abstractmethod
    def scripted_answer(self, problem: Problem, *, correct: bool, seed: int, prefix: str = "") -> str:
        """What follows ``prefix`` in a completion of this task's form, right or wrong on purpose, for the scripted engine.

        ``prefix`` begins a completion of this form, or is the opening of a style; it may hold an error already.
        """

    def tables(self, groups: Sequence[tuple[Problem, Sequence[Graded]]]) -> Mapping[str, Any]:
        """What this task's evaluations report besides accuracy: further tables of one part, by name.

        Args:
            groups: each problem with its rows, in sampling order.
        """
        return {}

    def opening(self, style: str) -> str:
        """The beginning of every answer in ``style``, put in the model's mouth; empty for most styles."""
        return ""

    def segment(self, text: str) -> Sequence[tuple[int, int]] | str:
        """Capability ``segment``: for each step the character where it begins and the one where its text begins, after a
        label; or the reason why the text cannot be cut into steps."""
        raise NotImplementedError(f"task {self.name} does not segment")

    def first_error(self, problem: Problem, text: str) -> int | str:
        """Capability ``first_error``: a character of the first wrong step, or the reason why none can be named."""
        raise NotImplementedError(f"task {self.name} does not know first errors")

    def solution(self, problem: Problem) -> str:
        """Capability ``solution``: a right solution, with steps; of a judge's task, the gold judgement. Raises RecipeError
        where a problem has none."""
        raise NotImplementedError(f"task {self.name} has no solutions")

    def correction(self) -> str:
        """Capability ``correction``: the user's turn that asks for the solution once more, with any error corrected; it
        never tells whether the answer was right."""
        raise NotImplementedError(f"task {self.name} has no turn that asks again")

    def gold_score(self, problem: Problem) -> float | None:
        """Capability ``gold_score``, of tasks whose answers are judgements: the score from 1 to 5 that is right; None where
        none is known."""
        raise NotImplementedError(f"task {self.name} has no scores")

    def question_about(self, problem: Problem, text: str) -> tuple[Message, ...]:
        """Capability ``question_about``: a conversation that asks a judge to score an answer from 1 to 5 after
        ``[RESULT]``."""
        raise NotImplementedError(f"task {self.name} does not ask about answers")


class Engine(Protocol):
    """Generates completions. Sample ``index`` of a request depends on the request alone, never on the batch.

    Settings with an ``interpreter`` (a Python executable, or None) name the environment of its workers. A class with
    ``needs_own_process`` set is never loaded into a trainer's process.
    """

    def load(self, checkpoint: Checkpoint) -> None:
        """Make ``checkpoint`` the model that answers; returns when its weights are in place."""
        ...

    def update(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Copy tensors by name over those of the loaded model, which then is another policy."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """All completions of all requests, in any order."""
        ...

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of each (prompt ids, completion ids), one list per pair.

        An engine that raises NotImplementedError here cannot prove that it has the weights it was given; the run notes it.
        """
        ...

    def sleep(self) -> None:
        """Give the device's memory back and keep the process; ``load`` wakes it."""
        ...

    def close(self) -> None:
        """Give memory and processes back."""
        ...


TrainEvents = Callable[[dict[str, Any]], None]
"""Receives ``{"event": "log", "step": int, ...}``, ``{"event": "checkpoint", "step": int, "path": str}`` and
``{"event": "note", "text": str}`` (something a person should know, such as a smaller micro-batch)."""


class Trainer(Protocol):
    """Executes examples. Knows weights, masks and margins, never methods."""

    def train(self, job: TrainJob, events: TrainEvents) -> TrainResult:
        """Run the job; ``final/`` in ``job.out_dir`` is a complete model folder when this returns."""
        ...


class Tracker(Protocol):
    """Exports metrics somewhere. The metrics file is the record; a tracker may die without harm."""

    def start(self, run_dir: Path, recipe: dict[str, Any]) -> None: ...

    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A command that now waits in a queue: its number there, what will run, where it writes, commands that follow it."""

    job_id: str
    queue: str
    script: Path
    log: Path
    follow: tuple[str, ...]


class Submits(Protocol):
    """A launcher that may hand the whole command to a queue, instead of letting it run here and starting its workers."""

    def submit(
        self, arguments: Sequence[str], *, once: Sequence[str] = (), folder: Path, program: Sequence[str]
    ) -> Submission | None:
        """Submit the command; None when it shall run here, because this is where the queue has brought it.

        Args:
            arguments: what follows the program: ``train``, the recipe, overrides, flags.
            once: flags for the first start alone, if the queue may start the command several times.
            folder: the run directory; what is submitted, and its log, go to ``folder/jobs``.
            program: the beginning of the command: interpreter and module.

        Raises:
            EnvironmentProblem: the queue is missing, does not answer, or refuses.
            RunConflict: what was submitted for this folder before still waits or runs.
        """
        ...
