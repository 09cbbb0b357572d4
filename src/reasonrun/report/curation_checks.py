"""Whether curation lost no row: rows in = rows used + rows left out with a reason, counted again from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from reasonrun.ledger.damage import Damage, Promise
from reasonrun.records import LeftOut
from reasonrun.report.joins import Join
from reasonrun.report.record_checks import StepFacts
from reasonrun.report.sealed_rows import Ids, SealedRows, hashed, record_types


def check_curation(rows: SealedRows, step: StepFacts) -> Iterator[Damage | Join]:
    """A ``curate`` or ``cut`` step against its own counts, and against the graded rollouts that it read."""

    used, sources = _used(rows, step)
    dropped, reasons = _left_out(rows, step)
    counted = {
        "num_examples": sources.total(),
        "sources": dict(sorted(sources.items())),
        "left_out": dict(sorted(reasons.items())),
    }
    for name, value in counted.items():
        if step.result.get(name, value) != value:
            yield _damage(step, f"its result says {name} {step.result[name]}, its rows say {value}")
    if len(dropped) != reasons.total():
        yield _damage(step, f"leaves {reasons.total() - len(dropped)} rows out a second time")
    both = np.intersect1d(used, dropped)
    if len(both):
        yield _damage(step, f"uses {len(both)} rows that it also leaves out")
    if not rows.computes_digests_so or any(name not in rows.steps for name in step.inputs):
        return  # damaged, and reported there
    yield from _conserved(rows, step, np.union1d(used, dropped))


def _damage(step: StepFacts, what: str, promise: Promise = "G17") -> Damage:
    return Damage(path=f"steps/{step.name}", what=what, promise=promise, remedy="redo", step=step.name)


def _conserved(rows: SealedRows, step: StepFacts, named: Ids) -> Iterator[Damage | Join]:
    """Every row of the graded sets is named, and nothing else."""
    given, others, num_given, num_other_sets = [], [], 0, 0
    for name, wanted in zip(step.inputs, step.fingerprint.get("sets", []), strict=False):
        graded = rows.graded(name)
        if graded is None and rows.steps[name].verb in ("grade", "judge"):
            return  # of no samples
        if graded is None:
            num_other_sets += 1
            continue
        if graded.digest == wanted:
            yield Join(source=name, reader=step.name, things="verdicts", agrees=True)
        if graded.rollouts is None:
            return  # of a part of some rollouts, which is not on record, or the samples are damaged
        if graded.digest == wanted:
            given.append(graded.rollouts.ids)
            num_given += graded.rollouts.num_rows
        elif np.isin(graded.rollouts.ids, named).any():
            yield Join(source=name, reader=step.name, things="verdicts", agrees=False)
            return
        else:  # a choice of problems, made with the help of these verdicts
            others.append(name)
            num_other_sets += 1
    if not num_other_sets and step.result["num_rows"] != num_given:
        yield _damage(
            step, f"its result says num_rows {step.result['num_rows']}, the sets that it read hold {num_given}"
        )
    if not given:
        if num_other_sets == 1 and step.result["num_rows"] != len(named):
            yield _damage(
                step, f"its result says num_rows {step.result['num_rows']}, its rows name {len(named)} problems"
            )
        return
    whole = np.unique(np.concatenate(given))
    lost, foreign = len(np.setdiff1d(whole, named)), len(np.setdiff1d(named, whole))
    if foreign and others:  # rows of sets that stand there no more
        yield from (Join(source=name, reader=step.name, things="verdicts", agrees=False) for name in others)
    elif lost or foreign:
        yield _damage(
            step,
            f"{lost} rows that it read are neither used nor left out, and {foreign} that it names are none of them",
        )


def _used(rows: SealedRows, step: StepFacts) -> tuple[Ids, Counter[str]]:
    """Rows that examples name; problems, where a curation read problems alone, name themselves."""
    found, sources = [np.empty(0, np.int64)], Counter[str]()
    of_problems = not any(rows.graded(name) for name in step.inputs)
    for part in rows.parts(step, "rows", record_types(step)["rows"]):
        sources.update(part.column("source"))
        named = [rollout_id for ids in part.column("rollout_ids") for rollout_id in ids]
        found.append(hashed(part.column("problem_id") if of_problems and not named else named))
    return np.unique(np.concatenate(found)), sources


def _left_out(rows: SealedRows, step: StepFacts) -> tuple[Ids, Counter[str]]:
    found, reasons = [np.empty(0, np.int64)], Counter[str]()
    for part in rows.parts(step, "left_out", LeftOut):
        reasons.update(part.column("reason"))
        found.append(hashed(part.column("rollout_id")))
    return np.unique(np.concatenate(found)), reasons
