"""``sample``: requests to an engine, completions into the ledger."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.asks import Ask, Asking, logged, named
from reasonrun.errors import RecipeError
from reasonrun.generation import Request
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.ledger.wal import Wal
from reasonrun.records import Checkpoint, Rollout, Sampling
from reasonrun.samples import Extent, ProblemSet, RolloutSet
from reasonrun.sets import Rows
from reasonrun.verbs.context import Context, Host, PlannedStep, Unit
from reasonrun.verbs.spending import affordable, check_affordable, count, count_committed, count_logged

_SMALLEST_SHARE = 4  # a smaller part of a unit leaves an engine's batch too empty


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleJob:
    """A sample step, complete. ``seed_parts`` start every request seed: run seed and step, or the evaluation seed."""

    name: str
    policy: Checkpoint
    asks: Sequence[Ask]
    kind: str
    n: int
    sampling: Sampling
    seed_parts: tuple[str | int, ...]
    problems: ProblemSet
    inputs: tuple[str, ...]
    extent: Extent  # of the asks

    @property
    def asking(self) -> Asking:
        return Asking(
            policy=self.policy.weights,
            tokenizer=self.policy.tokenizer,
            kind=self.kind,
            n=self.n,
            sampling=self.sampling,
            seed_parts=self.seed_parts,
            remote=self.policy.remote,
        )

    def fingerprint(self) -> dict[str, Any]:
        return {
            "verb": "sample",
            "policy": self.policy.weights,
            "tokenizer": self.policy.tokenizer,
            "kind": self.kind,
            "n": self.n,
            "sampling": self.sampling.model_dump(mode="json"),
            "seed": list(self.seed_parts),
            "problems": self.problems.digest,
            "prompts": _prompts_digest(self.asks),
            "inputs": list(self.inputs),
        }


def _prompts_digest(asks: Sequence[Ask]) -> str:
    running = hashlib.sha256()
    for ask in asks:
        content = [ask.parent_id, [[message.role, message.content] for message in ask.messages], list(ask.all_ids)]
        running.update(json.dumps(content).encode())
    return running.hexdigest()[:32]


def sample(ctx: Context, job: SampleJob) -> RolloutSet:
    """Run or replay one sample step.

    Raises:
        RecipeError: a prompt and its completion do not fit into the model's context.
    """
    _check_context(ctx, job)  # before the step is begun: what is corrected must not conflict with it
    step = ctx.open_step(job.name, job.fingerprint())
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(job.name, "sample"):
            step = _generate(ctx, job, step)
    else:
        count_committed(ctx, job.policy, step)
    ctx.record(step, "sample", new=new)
    _plan(ctx, job, step)
    rows = Rows.load(Rollout, step.table_paths("rows"), ctx.cache_dir)
    return RolloutSet(rows=rows, problems=job.problems, step=job.name, extent=job.extent.times(job.n))


def _plan(ctx: Context, job: SampleJob, step: Committed) -> None:
    """In a rehearsal: this step in the real run, with the completion length that the script had."""
    if ctx.planned is None:
        return
    rows = job.extent.times(job.n)
    num_rows = max(1, step.result["num_rollouts"])
    mean_tokens = ctx.tokens_per_completion or step.result["num_completion_tokens"] / num_rows
    bytes_per_row = sum(path.stat().st_size for path in step.table_paths("rows")) / num_rows
    ctx.planned.append(
        PlannedStep(
            step=job.name,
            verb="sample",
            unit="completions",
            units=rows,
            tokens=Extent(
                expected=rows.expected * mean_tokens, worst=rows.worst * job.sampling.max_new_tokens, exact=False
            ),
            disk_bytes=rows.times(bytes_per_row),
        )
    )


def _check_context(ctx: Context, job: SampleJob) -> None:
    longest = max(job.asks, key=lambda ask: len(ask.all_ids), default=None)
    if longest is None or job.policy.remote:  # an endpoint does not tell how much it can read
        return
    limit = ctx.renderer_of(job.policy).context_length
    needed = len(longest.all_ids) + job.sampling.max_new_tokens
    if needed <= limit:
        return
    room = limit - len(longest.all_ids)
    whole, hint = "", f"lower max_new_tokens to {room}, use fewer demonstrations, or take a model with a longer context"
    if job.kind == "turn":
        whole = ", with its earlier answers, which are never cut,"
        hint = (
            "lower max_new_tokens, which bounds those too, ask for fewer turns, or take a model with a longer context"
        )
    if room <= 0:
        hint = "take a model with a longer context, or leave this problem out: no answer fits after its prompt"
    num_over = sum(len(ask.all_ids) + job.sampling.max_new_tokens > limit for ask in job.asks)
    raise RecipeError(
        f"step {job.name}: {num_over} of {len(job.asks)} prompts do not fit. The longest ({named(longest.problem)})"
        f"{whole} has {len(longest.all_ids)} tokens and max_new_tokens is {job.sampling.max_new_tokens}: {needed} tokens, the"
        f" model's context holds {limit}",
        hint=hint,
    )


def _generate(ctx: Context, job: SampleJob, step: OpenStep) -> Committed:
    total = len(job.asks) * job.n
    wal = step.wal()
    missing = wal.missing(total)
    count_logged(ctx, job.policy, wal)
    ctx.progress.begin(job.name, total, total - len(missing))
    if len(missing):
        in_flight = _InFlight()
        units = affordable(ctx, job.policy, _units(job, missing, ctx.host, in_flight))
        for _, completions in ctx.host.generate(job.policy, units):
            wal.append([(in_flight.take(c.request) * job.n + c.index, logged(c)) for c in completions])
            for completion in completions:  # only after they are kept: they are paid for, and counting may end the run
                count(ctx, job.policy, completion.usage)
            ctx.progress.advance(job.name, len(completions))
            ctx.check_stop()
    wal.flush()
    check_affordable(ctx, job.policy, job.name, len(wal.missing(total)))
    counts: Counter[str] = Counter()
    step.seal_table("rows", Rollout, _counted(ctx, job, wal, total, counts))
    served = {name: counts.pop(name, 0) for name in ("num_prompt_tokens", "num_empty", "num_without_usage")}
    num_tokens = counts.pop("tokens", 0)
    result = {
        "num_rollouts": total,
        "num_prompt_tokens": sum(len(ask.all_ids) for ask in job.asks),
        "num_completion_tokens": num_tokens,
        "finish_reasons": dict(sorted(counts.items())),
        **(served if job.policy.remote else {}),
    }
    committed = step.commit(result)
    ctx.progress.end(job.name, f"{total} completions, {result['num_completion_tokens']} tokens")
    return committed


@dataclass
class _InFlight:
    """The ordinals of requests that were handed out, by key, until their last completion is back."""

    ordinals: dict[str, int] = field(default_factory=dict)
    num_left: Counter[str] = field(default_factory=Counter)

    def put(self, request: Request, ordinal: int) -> None:
        self.ordinals[request.key] = ordinal
        self.num_left[request.key] = request.n - len(request.done)

    def take(self, key: str) -> int:
        """The ordinal of a request, one completion of which is back."""
        self.num_left[key] -= 1
        if self.num_left[key]:
            return self.ordinals[key]
        del self.num_left[key]
        return self.ordinals.pop(key)


def _units(job: SampleJob, missing: npt.NDArray[np.int64], host: Host, in_flight: _InFlight) -> Iterator[Unit]:
    """Requests that are not complete, longest prompts first, in units of about ``host.unit_rows`` completions.

    Made when a worker asks for one, so that a million requests never stand in memory. Where several workers share them, the
    last units are smaller, so that the workers end at about the same time. A remote model is asked for what is missing
    only, and one request at a time: it is paid by the completion.
    """
    pending = [int(ordinal) for ordinal in np.unique(missing // job.n)]
    pending.sort(key=lambda ordinal: (-len(job.asks[ordinal].all_ids), ordinal))
    size = 1 if job.policy.remote else max(1, host.unit_rows // job.n)
    rows = {int(row) for row in missing} if job.policy.remote else set()
    asking = job.asking
    start = number = 0
    while start < len(pending):
        end = start + _unit_size(size, len(pending) - start, host.num_workers)
        requests = []
        for ordinal in pending[start:end]:
            done = tuple(n for n in range(job.n) if rows and ordinal * job.n + n not in rows)
            requests.append(asking.request(job.asks[ordinal], done))
            in_flight.put(requests[-1], ordinal)
        yield number, requests
        start, number = end, number + 1


def _unit_size(largest: int, num_left: int, num_workers: int) -> int:
    """Requests of the next unit: half of a worker's even share of what is left, within bounds."""
    if num_workers == 1:
        return largest
    return min(largest, max(-(-largest // _SMALLEST_SHARE), -(-num_left // (2 * num_workers))))


def _counted(ctx: Context, job: SampleJob, wal: Wal, total: int, counts: Counter[str]) -> Iterator[Rollout]:
    renderer = None if job.policy.remote else ctx.renderer_of(job.policy)
    asking = job.asking
    for row in range(total):
        ordinal, index = divmod(row, job.n)
        if not index:
            ask = job.asks[ordinal]
            request = asking.request(ask)
        completion = wal.read(row)
        rollout = asking.rollout(ask, request, index, completion, renderer)
        prompt_tokens, tokens = completion.get("usage", (0, len(completion["ids"])))
        counts["tokens"] += tokens
        counts["num_prompt_tokens"] += prompt_tokens
        counts["num_without_usage"] += "usage" not in completion
        counts["num_empty"] += not rollout.text
        counts[rollout.finish_reason] += 1
        yield rollout
