"""The sets that verbs take and return: problems, rollouts, graded rollouts, examples.

Every set knows the step that committed it and a digest of its content, which is what fingerprints are made of. In a
rehearsal it also carries an ``Extent``: how large it will be in the real run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from reasonrun.errors import RecipeError
from reasonrun.on_policy import RewardFunction, RolloutFunction
from reasonrun.records import Example, Graded, Prefix, Problem, Rollout, Score, digest
from reasonrun.sets import Rows
from reasonrun.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """Size of a set in the real run: expected and worst case; ``exact`` when it does not depend on data."""

    expected: float
    worst: float
    exact: bool = True

    @classmethod
    def of(cls, size: int) -> Extent:
        return cls(expected=size, worst=size)

    def times(self, factor: float) -> Extent:
        return Extent(expected=self.expected * factor, worst=self.worst * factor, exact=self.exact)

    def share(self, share: float) -> Extent:
        """A part of this set whose size depends on data: ``share`` of it is expected, all of it is possible."""
        return Extent(expected=self.expected * share, worst=self.worst, exact=False)

    def plus(self, other: Extent) -> Extent:
        return Extent(
            expected=self.expected + other.expected, worst=self.worst + other.worst, exact=self.exact and other.exact
        )


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """Problems in a fixed order."""

    problems: Sequence[Problem]
    step: str
    extent: Extent

    def __len__(self) -> int:
        return len(self.problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def first(self, count: int) -> ProblemSet:
        """The first ``count`` problems."""
        return replace(self, problems=self.problems[:count], extent=Extent.of(count))

    def parts(self, sizes: Sequence[int], rng: random.Random) -> list[ProblemSet]:
        """Disjoint random parts of the given sizes.

        A rehearsal has a handful of the problems; its parts have the same proportions, and at least one problem each.

        Raises:
            RecipeError: the sizes exceed the set.
        """
        if sum(sizes) > self.extent.expected:
            raise RecipeError(
                f"{' + '.join(map(str, sizes))} different problems are asked for, and {self.step} has"
                f" {self.extent.expected:,.0f}",
                hint="lower these numbers, or take a task with more problems",
            )
        shuffled = rng.sample(self.problems, len(self.problems))
        share = len(self.problems) / self.extent.expected if len(self.problems) else 0.0
        least = 1 if share < 1 else 0
        parts, start = [], 0
        for size in sizes:
            count = min(len(shuffled), max(least, round(size * share)))
            start = min(start, len(shuffled) - count)
            parts.append(replace(self, problems=shuffled[start : start + count], extent=Extent.of(size)))
            start += count
        return parts

    @property
    def digest(self) -> str:
        return digest([problem.id for problem in self.problems])


@dataclass(frozen=True, kw_only=True)
class RolloutSet:
    """Rollouts ordered by problem, then parent, then sample index."""

    rows: Rows[Rollout]
    problems: ProblemSet
    step: str
    extent: Extent

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rows)

    @property
    def digest(self) -> str:
        running = hashlib.sha256()
        for part in self.rows.parts():
            running.update(digest(part.column("id")).encode())
        return running.hexdigest()[:32]

    def where(self, keep: Callable[[Rollout], bool]) -> RolloutSet:
        """The rollouts that ``keep`` accepts."""
        kept = np.fromiter(map(keep, self.rows), bool, len(self))
        share = float(kept.mean()) if len(self) else 0.0
        return replace(self, rows=self.rows.take(kept), extent=self.extent.share(share))


@dataclass(frozen=True, kw_only=True)
class GradedSet:
    """Rollouts with one score each, in the same order."""

    rollouts: RolloutSet
    scores: Rows[Score]
    step: str
    extent: Extent
    _starts: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def problems(self) -> ProblemSet:
        return self.rollouts.problems

    @property
    def digest(self) -> str:
        running = hashlib.sha256(self.values.data)
        for part in self.scores.parts():
            running.update(digest(part.column("answer")).encode())
        return digest([self.rollouts.digest, running.hexdigest()])

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Scores per rollout; NaN where the grader could not tell."""
        values = np.full(len(self), np.nan)
        start = 0
        for part in self.scores.parts():
            column = [np.nan if value is None else value for value in part.column("value")]
            values[start : start + len(part)] = column
            start += len(part)
        return values

    @property
    def accuracy(self) -> float:
        """Share of the rollouts that are right; ungraded ones count as wrong."""
        return float(np.mean(self.values >= 1.0)) if len(self) else 0.0

    def of_problem(self, problem_id: str) -> list[Graded]:
        """The rows of one problem, in order; empty when it was not sampled."""
        start, stop = self._spans().get(problem_id, (0, 0))
        rows = zip(self.rollouts.rows[start:stop], self.scores[start:stop], strict=True)
        return [Graded.model_construct(rollout=rollout, score=score) for rollout, score in rows]

    def unsolved(self) -> ProblemSet:
        """The problems of which no rollout is right. Problems with nothing but ungraded rows are not among them."""
        return self.with_rate(0.0, 0.0)

    def wrong(self) -> RolloutSet:
        """The rollouts that are wrong; those that were not graded are not among them."""
        kept = self.values < 1.0
        share = float(kept.mean()) if len(self) else 0.0
        rows = self.rollouts.rows.take(kept)
        return RolloutSet(rows=rows, problems=self.problems, step=self.step, extent=self.extent.share(share))

    def with_rate(self, low: float, high: float) -> ProblemSet:
        """The problems of which a share from ``low`` to ``high`` of the graded rollouts is right."""
        values, spans = self.values, self._spans()
        chosen = []
        for problem in self.problems:
            start, stop = spans.get(problem.id, (0, 0))
            verdicts = values[start:stop]
            verdicts = verdicts[~np.isnan(verdicts)]
            if len(verdicts) and low <= float(np.mean(verdicts >= 1.0)) <= high:
                chosen.append(problem)
        return self._subset(chosen)

    def no_problems(self) -> ProblemSet:
        """The empty subset, for a method that skips a phase."""
        return ProblemSet(problems=(), step=self.problems.step, extent=Extent.of(0))

    def _subset(self, problems: Sequence[Problem]) -> ProblemSet:
        share = len(problems) / len(self.problems) if len(self.problems) else 0.0
        return ProblemSet(problems=problems, step=self.step, extent=self.problems.extent.share(share))

    def _spans(self) -> dict[str, tuple[int, int]]:
        if not self._starts and len(self):
            position = 0
            for part in self.rollouts.rows.parts():
                for problem_id in part.column("problem_id"):
                    start, _ = self._starts.get(problem_id, (position, 0))
                    position += 1
                    self._starts[problem_id] = (start, position)
        return self._starts


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """What a curation kept, in order, with the counts of what it left out by reason."""

    rows: Rows[Example]
    paths: tuple[str, ...]
    left_out: dict[str, int]
    step: str
    digest: str
    extent: Extent
    kind: str  # of its examples, which is that of the trainer they are for
    sources: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Where a policy-gradient step's rows come from: the policy's own rollouts, made while it trains (``on_policy.py``).

    ``rollout`` and ``rewards`` are module-level functions, marked with a version, that are called with their settings.
    """

    problems: ProblemSet
    rollout: RolloutFunction
    rollout_settings: Settings
    rewards: RewardFunction
    rewards_settings: Settings
    given: RolloutSet | None = None  # sampled before; ``rollout`` may go on from them

    @property
    def steps(self) -> list[str]:
        """The steps that it reads."""
        return [self.problems.step, *([self.given.step] if self.given is not None else [])]


@dataclass(frozen=True, kw_only=True)
class PrefixSet:
    """Beginnings of rollouts that a curation chose, ordered by problem, with the counts of what it left out."""

    rows: Rows[Prefix]
    problems: ProblemSet
    left_out: dict[str, int]
    step: str
    extent: Extent

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self.rows)

    def where(self, keep: Callable[[Prefix], bool]) -> PrefixSet:
        """The prefixes that ``keep`` accepts."""
        kept = np.fromiter(map(keep, self.rows), bool, len(self))
        share = float(kept.mean()) if len(self) else 0.0
        return replace(self, rows=self.rows.take(kept), extent=self.extent.share(share))
