"""Whether the rows of a run are what its steps say: every table readable, rows in order and once, counts recomputed,
rollouts and scores joined, no row lost in curation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reasonrun.errors import RunFailed
from reasonrun.ledger.damage import Damage, Finding, Note, Promise
from reasonrun.records import Problem, digest
from reasonrun.report.curation_checks import check_curation
from reasonrun.report.joins import Join
from reasonrun.report.record_checks import StepFacts
from reasonrun.report.sealed_rows import GradedFacts, RolloutFacts, SealedRows, computes_digests_so, record_types
from reasonrun.sets import differing_cache

Check = Callable[[SealedRows, StepFacts], Iterator[Damage | Join]]

_TOLERANCE = 1e-9


def check_rows(path: Path, steps: Mapping[str, StepFacts], damaged: set[str]) -> Iterator[Finding | Join]:
    """What is wrong with the rows of a run's committed steps.

    Args:
        path: the run directory.
        steps: its committed steps by name.
        damaged: steps that are known to be damaged; their rows, and what was made from them, are not looked at again.
    """
    rows = SealedRows(path, {name: step for name, step in steps.items() if name not in damaged})
    for step in list(rows.steps.values()):
        found = list(_of_known_form(_check_tables, rows, step))
        yield from found
        if any(isinstance(one, Damage) and one.remedy == "redo" for one in found):
            rows.steps.pop(step.name)
    problem_ids = {
        hash(name)
        for step in rows.steps.values()
        if step.verb == "problems"
        for part in rows.parts(step, "rows", Problem)
        for name in part.column("id")
    }
    rows.computes_digests_so = computes_digests_so(rows)
    if not rows.computes_digests_so:
        what = "was made by a build that computes the digests of graded sets otherwise: joins by digest are not checked"
        yield Note(path="steps", what=what)
    for step in rows.steps.values():
        yield from _of_known_form(_CHECKS.get(step.verb, _check_nothing), rows, step)
        if step.verb == "sample" and not any(name.startswith("problems/") for name in steps.keys() - rows.steps.keys()):
            yield from _check_problems_known(rows, step, problem_ids)


def _of_known_form(check: Check, rows: SealedRows, step: StepFacts) -> Iterator[Damage | Join]:
    """One check, where a seal that its own digest vouches for may still not hold what the verb writes."""
    try:
        yield from check(rows, step)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        yield damage_of(step, f"its fingerprint, result or rows have not the form of a {step.verb} step ({error!r})")


def damage_of(step: StepFacts, what: str, promise: Promise = "G21") -> Damage:
    return Damage(path=f"steps/{step.name}", what=what, promise=promise, remedy="redo", step=step.name)


def _check_tables(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    """Every table opens with the columns of its records, and no cache of it holds anything else."""
    for table, record_type in record_types(step).items():
        try:
            for _ in rows.parts(step, table, record_type):
                pass
            cache = differing_cache(record_type, rows.paths(step, table), rows.path / "derived")
        except RunFailed as error:
            yield Damage(path=f"steps/{step.name}", what=error.message, promise="G4", remedy="redo", step=step.name)
            continue
        if cache is not None:
            what = f"is a cache of the {table} of {step.name} that holds other rows than they are"
            where = cache.relative_to(rows.path).as_posix()
            yield Damage(path=where, what=what, promise="G21", remedy="cache")


def _counts(step: StepFacts, **counted: Any) -> Iterator[Damage]:
    """The counts of a result against those of its rows; a count that the result does not have is not compared."""
    for name, value in counted.items():
        if name in step.result and step.result[name] != value:
            yield damage_of(step, f"its result says {name} {step.result[name]}, its rows say {value}", "G17")


def _check_problem_step(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    listed = [
        pair
        for part in rows.parts(step, "rows", Problem)
        for pair in zip(part.column("id"), part.column("reference"), strict=True)
    ]
    yield from _counts(step, num_problems=len(listed))
    if len({problem_id for problem_id, _ in listed}) != len(listed):
        yield damage_of(step, "holds a problem twice")
    if "problems" in step.fingerprint and step.fingerprint["problems"] != digest([list(pair) for pair in listed]):
        yield damage_of(step, "holds other problems than its fingerprint names", "G7")


def _check_problems_known(rows: SealedRows, step: StepFacts, known: set[int]) -> Iterator[Damage | Join]:
    foreign = [name for name, _ in rows.rollouts(step).runs if hash(name) not in known]
    read = [name for name in step.inputs if name in rows.steps and rows.steps[name].verb == "problems"]
    if len(read) == 1:
        yield Join(source=read[0], reader=step.name, things="problems", agrees=not foreign)
    elif foreign:
        yield damage_of(
            step, f"holds rollouts of {len(foreign)} problems that the run does not have, such as {foreign[0]}"
        )


def _check_sample(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    facts = rows.rollouts(step)
    yield from _counts(step, num_rollouts=facts.num_rows, finish_reasons=dict(sorted(facts.finish_reasons.items())))
    if "num_without_usage" not in step.result:  # a server counts its own tokens
        yield from _counts(step, num_completion_tokens=facts.num_tokens)
    yield from _check_order(step, facts)
    policy = step.fingerprint.get("policy")
    if policy and facts.policies - {policy}:
        yield damage_of(step, "holds rollouts of other weights than its fingerprint names", "G7")
    sources = [rows.rollouts(source) for source in _ancestors(rows.steps, step) if source.verb == "sample"]
    whole = all(name in rows.steps for name in step.inputs)
    if len(facts.parents) and sources and whole:
        known = np.isin(facts.parents, np.concatenate([source.ids for source in sources]))
        if not known.all():
            yield damage_of(step, f"goes on from {int((~known).sum())} rollouts that no step before it holds")


def _check_order(step: StepFacts, facts: RolloutFacts) -> Iterator[Damage]:
    num_twice = facts.num_rows - len(np.unique(facts.ids))
    if num_twice:
        yield damage_of(step, f"holds {num_twice} rows whose keys stand there before")
    if "n" not in step.fingerprint:
        return
    if facts.misplaced or facts.num_rows != step.fingerprint["n"] * len(facts.keys):
        yield damage_of(step, "its rows are not complete requests, sample by sample, in order")
    if len(set(facts.keys)) != len(facts.keys) or len({name for name, _ in facts.runs}) != len(facts.runs):
        yield damage_of(step, "its rows are not ordered by problem and request")


def _ancestors(steps: Mapping[str, StepFacts], step: StepFacts) -> list[StepFacts]:
    waiting, found = list(step.inputs), dict[str, StepFacts]()
    while waiting:
        name = waiting.pop()
        if name in steps and name not in found:
            found[name] = steps[name]
            waiting += steps[name].inputs
    return list(found.values())


def _check_grade(rows: SealedRows, step: StepFacts) -> Iterator[Damage | Join]:
    scores = rows.scores(step)
    yield from _counts(
        step,
        num_rollouts=len(scores.values),
        num_correct=int(np.sum(scores.values >= 1.0)),
        num_ungraded=int(np.isnan(scores.values).sum()),
        reasons=dict(sorted(scores.reasons.items())),
    )
    sampled = rows.steps.get(step.inputs[0]) if step.inputs else None
    if sampled is None or sampled.verb != "sample":
        return
    rollouts = rows.rollouts(sampled)
    if rollouts.num_rows <= len(scores.values):  # of more rollouts a part was graded
        named = step.fingerprint.get("rollouts", rollouts.digest)
        agrees = rollouts.num_rows == len(scores.values) and rollouts.digest == named
        yield Join(source=sampled.name, reader=step.name, things="rollouts", agrees=agrees, promise="G21")


def _check_judge(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    scores = rows.scores(step)
    num_ungraded = int(np.isnan(scores.values).sum())
    yield from _counts(step, num_rollouts=len(scores.values), num_ungraded=num_ungraded)


def _check_pairs(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    num_rows = sum(len(part) for part in rows.parts(step, "rows", record_types(step)["rows"]))
    yield from _counts(step, num_pairs=num_rows)
    pairs = rows.steps.get(step.inputs[0])
    if (
        pairs is not None
        and pairs.digest == step.fingerprint.get("pairs")
        and pairs.result.get("num_examples", num_rows) != num_rows
    ):
        yield damage_of(step, f"scores {num_rows} pairs, and {pairs.name} holds {pairs.result['num_examples']}")


def _check_on_policy(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    facts, scores = rows.rollouts(step), rows.scores(step)
    types = record_types(step)
    credit = [reward for part in rows.parts(step, "credit", types["credit"]) for reward in part.column("reward")]
    if not facts.num_rows == len(scores.values) == len(credit):
        sizes = f"{facts.num_rows} rollouts, {len(scores.values)} scores and {len(credit)} credits"
        yield damage_of(step, f"holds {sizes}, which belong together row by row")
    yield from _counts(step, num_rollouts=facts.num_rows, num_left_out=sum(reward is None for reward in credit))


def _check_train(rows: SealedRows, step: StepFacts) -> Iterator[Damage]:
    wanted = step.fingerprint.get("rows", [])
    sources = [rows.steps[name] for name in step.inputs[: len(wanted)] if name in rows.steps]
    sizes = [source.result.get("num_examples") for source in sources]
    if sizes and [source.digest for source in sources] == wanted and None not in sizes:
        yield from _counts(step, num_examples=sum(sizes))


def _check_measure(rows: SealedRows, step: StepFacts) -> Iterator[Damage | Join]:
    """An evaluation was made from the verdicts that its inputs hold, and its accuracy is theirs."""
    if not rows.computes_digests_so or any(name not in rows.steps for name in step.inputs):
        return
    parts: dict[str, Any] = dict(step.fingerprint.get("parts", {}))
    tables = {part: step.result.get(part) for part in parts}
    if step.verb == "preflight":
        parts, tables = {"graded": step.fingerprint.get("graded")}, {"graded": step.result}
    found = {name: graded for name in step.inputs if (graded := rows.graded(name)) is not None}
    by_digest = {graded.digest: graded for graded in found.values()}
    lost = [part for part, wanted in parts.items() if wanted not in by_digest]
    others = [name for name, graded in found.items() if graded.digest not in parts.values()]
    for name in found:
        if lost or name not in others:
            yield Join(source=name, reader=step.name, things="verdicts", agrees=name not in others, promise="G21")
    if lost and not others:
        yield damage_of(step, f"its part {lost[0]} was measured on other verdicts than {', '.join(step.inputs)} hold")
    for part, wanted in parts.items():
        if part not in lost and isinstance(table := tables[part], dict):
            yield from _check_accuracy(step, part, table, by_digest[wanted])


def _check_accuracy(step: StepFacts, part: str, table: dict[str, Any], graded: GradedFacts) -> Iterator[Damage]:
    rollouts, scores = graded.rollouts, graded.scores
    if rollouts is None:
        return  # not the ones that were graded, which is said there
    sizes = np.array([size for _, size in rollouts.runs])
    starts = np.cumsum(sizes) - sizes
    right = np.add.reduceat((scores.values >= 1.0).astype(np.float64), starts) / sizes if len(sizes) else sizes
    counted = {"num_problems": len(sizes), "num_samples": len(scores.values), "accuracy": float(np.mean(right))}
    for name, value in counted.items():
        if abs(table.get(name, value) - value) > _TOLERANCE:
            yield damage_of(step, f"its part {part} says {name} {table[name]}, the verdicts say {value}")


def _check_nothing(rows: SealedRows, step: StepFacts) -> Iterator[Damage | Join]:
    """Of a verb that is not known here, or whose step seals no rows."""
    yield from ()


_CHECKS: dict[str, Check] = {
    "problems": _check_problem_step,
    "sample": _check_sample,
    "grade": _check_grade,
    "judge": _check_judge,
    "curate": check_curation,
    "cut": check_curation,
    "logprobs": _check_pairs,
    "train": _check_train,
    "train_on_policy": _check_on_policy,
    "evaluate": _check_measure,
    "preflight": _check_measure,
}
