"""``logprobs`` and ``evaluate_pairs``: how probable a model finds given continuations, and which of two it prefers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from reasonrun.errors import RunFailed
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.metrics import clustered_interval
from reasonrun.records import Checkpoint, PreferenceExample, Record
from reasonrun.samples import ExampleSet
from reasonrun.sets import Rows
from reasonrun.verbs.context import Context, PlannedStep, TokenPair

_UNIT_PAIRS = 256


class PairLogprobs(Record):
    """Log-probabilities of the two continuations of a pair, summed over their tokens."""

    problem_id: str
    chosen_logp: float
    rejected_logp: float
    num_chosen_tokens: int
    num_rejected_tokens: int


@dataclass(frozen=True, kw_only=True)
class LogprobSet:
    """What a model makes of pairs, in their order."""

    rows: Rows[PairLogprobs]
    pairs: ExampleSet
    step: str
    digest: str


def logprobs(ctx: Context, name: str, policy: Checkpoint, pairs: ExampleSet) -> LogprobSet:
    """Run or replay one scoring step.

    Raises:
        RunFailed: the examples are no pairs, or the model is behind an endpoint.
    """
    if policy.remote:
        raise RunFailed(
            f"step {name}: an endpoint gives no log-probabilities of token ids", hint="score with a local model"
        )
    if len(pairs) and pairs.kind != "preference":
        raise RunFailed(
            f"step {name}: {pairs.step} holds {pairs.kind} examples, not pairs",
            hint="score what a curation function made as PreferenceExample",
        )
    fingerprint = {
        "verb": "logprobs",
        "policy": policy.weights,
        "pairs": pairs.digest,
        "inputs": [pairs.step, *([policy.step] if policy.step else [])],
    }
    step = ctx.open_step(name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(name, "logprobs"):
            step = _score(ctx, step, policy, pairs)
    ctx.record(step, "logprobs", new=new)
    _plan(ctx, name, pairs)
    rows = Rows.load(PairLogprobs, step.table_paths("rows"), ctx.cache_dir)
    return LogprobSet(rows=rows, pairs=pairs, step=name, digest=step.digest)


def _plan(ctx: Context, name: str, pairs: ExampleSet) -> None:
    if ctx.planned is not None:
        tokens = pairs.extent.times(sum(row.num_tokens for row in pairs.rows) / max(1, len(pairs)))
        zero = pairs.extent.times(0)
        ctx.planned.append(
            PlannedStep(step=name, verb="logprobs", unit="pairs", units=pairs.extent, tokens=tokens, disk_bytes=zero)
        )


def _score(ctx: Context, step: OpenStep, policy: Checkpoint, pairs: ExampleSet) -> Committed:
    """In units with fixed borders: sums of floats depend on the rows of a batch, and a resumed step must not show it."""
    total, wal = len(pairs), step.wal()
    missing = {int(row) for row in wal.missing(total)}
    ctx.progress.begin(step.name, total, total - len(missing))
    for start in range(0, total, _UNIT_PAIRS):
        numbers = range(start, min(start + _UNIT_PAIRS, total))
        if missing.isdisjoint(numbers):
            continue
        found = _unit(ctx, policy, [_pair(pairs.rows[number]) for number in numbers])
        lines = [(n, row.model_dump(mode="json")) for n, row in zip(numbers, found, strict=True) if n in missing]
        wal.append(lines)
        ctx.progress.advance(step.name, len(lines))
        ctx.check_stop()
    wal.flush()

    def rows() -> Iterator[PairLogprobs]:
        for number in range(total):
            yield PairLogprobs.model_validate(wal.read(number))

    step.seal_table("rows", PairLogprobs, rows())
    committed = step.commit({"num_pairs": total})
    ctx.progress.end(step.name, f"{total} pairs")
    return committed


def _pair(row: Any) -> PreferenceExample:
    assert isinstance(row, PreferenceExample)
    return row


def _unit(ctx: Context, policy: Checkpoint, pairs: list[PreferenceExample]) -> list[PairLogprobs]:
    sequences: list[TokenPair] = [
        (pair.prefix_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)
    ]
    sums = [float(np.sum(logps)) for logps in ctx.host.logprobs(policy, sequences)]
    return [
        PairLogprobs(
            problem_id=pair.problem_id,
            chosen_logp=sums[2 * n],
            rejected_logp=sums[2 * n + 1],
            num_chosen_tokens=len(pair.chosen_ids),
            num_rejected_tokens=len(pair.rejected_ids),
        )
        for n, pair in enumerate(pairs)
    ]


def evaluate_pairs(ctx: Context, name: str, policy: LogprobSet, reference: LogprobSet, beta: float) -> dict[str, Any]:
    """Run or replay a measurement of a policy on pairs: implicit rewards beta (log pi - log pi_ref) of both sides
    (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).

    Returns:
        ``reward_margin`` (chosen minus rejected, mean over pairs) and ``pair_accuracy`` (share of pairs with a positive
        margin), each with its 95 % interval over problems; mean log-probabilities; ``reference_logp_per_token`` of both
        sides, which says how far they are from what the reference would write. Only ``num_pairs`` when there is none.
    """
    fingerprint = {
        "verb": "evaluate_pairs",
        "policy": policy.digest,
        "reference": reference.digest,
        "beta": beta,
        "inputs": [policy.step, reference.step],
    }
    step = ctx.open_step(name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(name, "evaluate_pairs"):
            step = step.commit(pair_table(policy.rows, reference.rows, beta))
    ctx.record(step, "evaluate_pairs", new=new)
    result: dict[str, Any] = step.result
    if new and result["num_pairs"]:
        margin, accuracy = result["reward_margin"], result["pair_accuracy"]
        ctx.progress.end(name, f"reward margin {margin:.3f}, pair accuracy {accuracy:.1%}")
    return result


def pair_table(policy: Rows[PairLogprobs], reference: Rows[PairLogprobs], beta: float) -> dict[str, Any]:
    """The numbers that ``evaluate_pairs`` returns, from both models' log-probabilities of the same pairs."""
    if not len(policy):
        return {"num_pairs": 0}
    chosen, rejected = policy.column("chosen_logp"), policy.column("rejected_logp")
    margin = beta * (chosen - reference.column("chosen_logp") - rejected + reference.column("rejected_logp"))
    problems = policy.column("problem_id")
    tokens = {side: reference.column(f"num_{side}_tokens").sum() for side in ("chosen", "rejected")}
    return {
        "num_pairs": len(margin),
        "reward_margin": float(margin.mean()),
        "reward_margin_interval": list(clustered_interval(margin, problems)),
        "pair_accuracy": float((margin > 0).mean()),
        "pair_accuracy_interval": list(clustered_interval(margin > 0, problems)),
        "chosen_logp": float(chosen.mean()),
        "rejected_logp": float(rejected.mean()),
        "reference_logp_per_token": {
            side: float(reference.column(f"{side}_logp").sum() / max(1, tokens[side])) for side in tokens
        },
    }
