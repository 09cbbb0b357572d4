"""The rows of committed steps as they are sealed, read in parts and without the cache; what each table comes to."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from reasonrun.columns import arrow_schema
from reasonrun.errors import RunFailed
from reasonrun.ledger.files import Files
from reasonrun.ledger.steps import Committed
from reasonrun.records import CHOSEN_TYPES, Credit, LeftOut, Problem, Record, Rollout, Score, digest
from reasonrun.report.record_checks import StepFacts
from reasonrun.report.rollouts import num_sampled_tokens
from reasonrun.sets import Rows, read_shard

R = TypeVar("R", bound=Record)
Ids = npt.NDArray[np.int64]
"""Hashes of row ids: equal for equal ids in this process, and 8 bytes each."""


def record_types(step: StepFacts) -> dict[str, type[Record]]:
    """What the tables of a step hold, by table; empty for verbs that seal no rows, or that are not known here."""
    if step.verb == "logprobs":
        from reasonrun.verbs.scoring import PairLogprobs  # imports the recipe's libraries, which few runs need here

        return {"rows": PairLogprobs}
    if step.verb in ("curate", "cut"):
        return {"rows": CHOSEN_TYPES[step.result.get("kind", "sft")], "left_out": LeftOut}
    tables: dict[str, dict[str, type[Record]]] = {
        "problems": {"rows": Problem},
        "sample": {"rows": Rollout},
        "grade": {"rows": Score},
        "judge": {"rows": Score},
        "train_on_policy": {"rollouts": Rollout, "scores": Score, "credit": Credit},
    }
    return tables.get(step.verb, {})


def _described(schema: pa.Schema) -> set[str]:
    return {f"{column.name}: {column.type}" for column in schema}


def hashed(ids: list[str]) -> Ids:
    return np.fromiter(map(hash, ids), np.int64, len(ids))


@dataclass(kw_only=True)
class RolloutFacts:
    """What a table of rollouts comes to. ``runs`` are its problems in order, each with its number of rows in a row."""

    num_rows: int = 0
    ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    parents: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    keys: list[int] = field(default_factory=list)  # hashes of request keys in order, one for each run of equal ones
    misplaced: int = 0  # rows whose sample index is not the one after the row before
    runs: list[tuple[str, int]] = field(default_factory=list)
    policies: set[str] = field(default_factory=set)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    digest: str = ""  # of the whole set, as fingerprints hold it


@dataclass(kw_only=True)
class ScoreFacts:
    """What a table of scores comes to; values are NaN where a grader could not tell."""

    values: npt.NDArray[np.float64]
    answers: list[str]  # digests, one for each part
    reasons: Counter[str]

    def digest(self, rollouts: str) -> str:
        """Digest of the graded set, as fingerprints hold it (``GradedSet.digest``), from that of its rollouts."""
        running = hashlib.sha256(self.values.data)
        for part in self.answers:
            running.update(part.encode())
        return digest([rollouts, running.hexdigest()])


@dataclass(frozen=True, kw_only=True)
class GradedFacts:
    """Scores with the rollouts that they are of.

    Attributes:
        scores: what the step sealed.
        rollouts: None where the step that was graded holds others, or more.
        digest: of the graded set, as this step names its rollouts.
    """

    scores: ScoreFacts
    rollouts: RolloutFacts | None
    digest: str


class SealedRows:
    """The tables of a run's committed steps.

    Args:
        path: the run directory.
        steps: by name.
    """

    def __init__(self, path: Path, steps: Mapping[str, StepFacts]) -> None:
        self.path, self.steps = path, dict(steps)
        self.computes_digests_so = True
        """Whether fingerprints hold digests of graded sets as this version computes them; false for some older runs."""
        self._rollouts: dict[str, RolloutFacts] = {}
        self._scores: dict[str, ScoreFacts] = {}

    def paths(self, step: StepFacts, table: str) -> list[Path]:
        """The shards of a table, in order. Raises RunFailed when there is none."""
        try:
            return Committed(step.name, step.folder, step.seal, Files()).table_paths(table)
        except KeyError as error:
            raise RunFailed(str(error.args[0])) from error

    def parts(self, step: StepFacts, table: str, record_type: type[R]) -> Iterator[Rows[R]]:
        """A table in consecutive pieces. Raises RunFailed when it cannot be read or has other columns."""
        wanted = arrow_schema(record_type)
        for path in self.paths(step, table):
            try:
                found = pq.read_schema(path)
            except (OSError, ValueError) as error:
                raise RunFailed(f"{path.name} is no Parquet file ({error})") from error
            if not found.equals(wanted):
                other = sorted(_described(found) ^ _described(wanted))
                raise RunFailed(f"{path.name} has other columns than a {record_type.__name__}: {', '.join(other[:5])}")
            for batch in read_shard(path, wanted):
                if batch.num_rows:
                    yield Rows(record_type, [batch])

    def rollouts(self, step: StepFacts) -> RolloutFacts:
        """Raises RunFailed as ``parts`` does."""
        if step.name not in self._rollouts:
            table = "rollouts" if step.verb == "train_on_policy" else "rows"
            self._rollouts[step.name] = _rollout_facts(self.parts(step, table, Rollout))
        return self._rollouts[step.name]

    def scores(self, step: StepFacts) -> ScoreFacts:
        """Raises RunFailed as ``parts`` does."""
        if step.name not in self._scores:
            table = "scores" if step.verb == "train_on_policy" else "rows"
            self._scores[step.name] = _score_facts(self.parts(step, table, Score))
        return self._scores[step.name]

    def graded(self, name: str) -> GradedFacts | None:
        """What a ``grade`` or ``judge`` step of samples made; None where it is none. Raises RunFailed as ``parts`` does."""
        step = self.steps.get(name)
        if step is None or step.verb not in ("grade", "judge") or not step.inputs:
            return None
        sampled = self.steps.get(step.inputs[0])
        if sampled is None or sampled.verb != "sample":
            return None
        rollouts, scores = self.rollouts(sampled), self.scores(step)
        named = step.fingerprint.get("rollouts", rollouts.digest)
        is_joined = rollouts.num_rows == len(scores.values) and rollouts.digest == named
        return GradedFacts(scores=scores, rollouts=rollouts if is_joined else None, digest=scores.digest(named))


def computes_digests_so(rows: SealedRows) -> bool:
    """Whether any graded set has the digest that a step read it under, or none was read."""
    fingerprints = [step.fingerprint for step in rows.steps.values()]
    parts = [found["parts"] for found in fingerprints if isinstance(found.get("parts"), dict)]
    wanted = {wanted for found in parts for wanted in found.values()}
    wanted |= {found["graded"] for found in fingerprints if "graded" in found}
    held = (graded for name in rows.steps if (graded := rows.graded(name)) is not None)
    return not wanted or any(graded.digest in wanted for graded in held)


def _rollout_facts(parts: Iterator[Rows[Rollout]]) -> RolloutFacts:
    facts, running = RolloutFacts(), hashlib.sha256()
    ids, parents = [], []
    expected = 0
    for part in parts:
        names, indexes = part.column("id"), part.column("index").tolist()
        running.update(digest(names).encode())
        ids.append(hashed(names))
        parents.append(hashed([parent for parent in part.column("parent_id") if parent is not None]))
        for name, index, problem_id in zip(names, indexes, part.column("problem_id"), strict=True):
            key, _, number = name.rpartition("-")
            if not facts.keys or facts.keys[-1] != hash(key):
                facts.keys.append(hash(key))
                expected = 0
            facts.misplaced += index != expected or number != str(index)
            expected += 1
            if facts.runs and facts.runs[-1][0] == problem_id:
                facts.runs[-1] = (problem_id, facts.runs[-1][1] + 1)
            else:
                facts.runs.append((problem_id, 1))
        facts.policies.update(part.column("policy"))
        facts.finish_reasons.update(part.column("finish_reason"))
        facts.num_tokens += sum(map(num_sampled_tokens, part.column("segments")))
        facts.num_rows += len(part)
    facts.ids = np.concatenate([facts.ids, *ids])
    facts.parents = np.unique(np.concatenate([facts.parents, *parents]))
    facts.digest = running.hexdigest()[:32]
    return facts


def _score_facts(parts: Iterator[Rows[Score]]) -> ScoreFacts:
    values: list[Any] = []
    answers: list[str] = []
    reasons: Counter[str] = Counter()
    for part in parts:
        values += [np.nan if value is None else value for value in part.column("value")]
        answers.append(digest(part.column("answer")))
        reasons.update(part.column("reason"))
    return ScoreFacts(values=np.array(values, dtype=np.float64), answers=answers, reasons=reasons)
