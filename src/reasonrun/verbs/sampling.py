"""``sample``: requests to an engine, completions into the ledger."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reasonrun.errors import RecipeError
from reasonrun.generation import Completion, Request
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.ledger.wal import Wal
from reasonrun.randomness import derive_seed
from reasonrun.records import Checkpoint, Message, Problem, Rollout, Sampling, Segment, digest
from reasonrun.rendering import Renderer
from reasonrun.samples import Extent, ProblemSet, RolloutSet
from reasonrun.sets import Rows
from reasonrun.verbs.context import Context, PlannedStep, Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One prompt to sample from: a problem in a style, the next turn of a rollout, the beginning of one.

    ``given`` is the beginning of the answer, put in the model's mouth.
    """

    problem: Problem
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    given: tuple[Segment, ...] = ()
    parent_id: str | None = None

    @property
    def given_ids(self) -> tuple[int, ...]:
        return tuple(i for segment in self.given for i in segment.token_ids)

    @property
    def all_ids(self) -> tuple[int, ...]:
        """What the engine goes on from."""
        return self.prompt_ids + self.given_ids


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

    def request(self, ordinal: int) -> Request:
        """The request of one ask; its key holds everything that the completions depend on."""
        ask = self.asks[ordinal]
        all_ids = ask.all_ids
        seed = derive_seed(*self.seed_parts, ask.problem.id, ask.parent_id or "", digest(list(all_ids)))
        key = digest(
            [
                self.policy.weights,
                self.policy.tokenizer,
                ask.problem.id,
                ask.parent_id,
                list(all_ids),
                self.sampling.model_dump(mode="json"),
                list(self.seed_parts),
            ]
        )
        return Request(
            key=key,
            problem_id=ask.problem.id,
            prompt_ids=all_ids,
            num_given=len(all_ids) - len(ask.prompt_ids),
            n=self.n,
            seed=seed,
            sampling=self.sampling,
        )

    def rollout(self, row: int, completion: dict[str, Any], renderer: Renderer) -> Rollout:
        """The record of row ``row`` (ask-major) from its logged completion."""
        ask, request = self.asks[row // self.n], self.request(row // self.n)
        logps = completion["logps"]
        return Rollout(
            id=f"{request.key}-{row % self.n}",
            problem_id=ask.problem.id,
            index=row % self.n,
            parent_id=ask.parent_id,
            kind=self.kind,
            messages=ask.messages,
            prompt_ids=ask.prompt_ids,
            segments=(*ask.given, Segment(token_ids=tuple(completion["ids"]), src="model", loss=True)),
            text=_whole_text(ask, completion, renderer) if ask.given else completion["text"],
            finish_reason=completion["finish"],
            logps=None if logps is None else tuple(logps),
            policy=self.policy.weights,
            sampling=self.sampling,
            seed=request.seed,
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


def _whole_text(ask: Ask, completion: dict[str, Any], renderer: Renderer) -> str:
    """Given and sampled tokens decoded together, without the stop string that the engine took off.

    A tokenizer may decode the first token of a text otherwise than the same one further on.
    """
    ids = tuple(completion["ids"])
    num_taken_off = len(renderer.decode(ids)) - len(completion["text"])
    whole = renderer.decode(ask.given_ids + ids)
    return whole[: len(whole) - num_taken_off]


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
    step = ctx.open_step(job.name, job.fingerprint())
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        _check_context(ctx, job)
        with ctx.timed(job.name, "sample"):
            step = _generate(ctx, job, step)
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
    if longest is None:
        return
    limit = ctx.renderer.context_length
    needed = len(longest.all_ids) + job.sampling.max_new_tokens
    if needed <= limit:
        return
    num_over = sum(len(ask.all_ids) + job.sampling.max_new_tokens > limit for ask in job.asks)
    raise RecipeError(
        f"step {job.name}: {num_over} of {len(job.asks)} prompts do not fit. The longest (problem {longest.problem.id})"
        f" has {len(longest.all_ids)} tokens and max_new_tokens is {job.sampling.max_new_tokens}: {needed} tokens,"
        f" the model's context holds {limit}",
        hint="lower max_new_tokens, use fewer demonstrations, or take a model with a longer context",
    )


def _generate(ctx: Context, job: SampleJob, step: OpenStep) -> Committed:
    total = len(job.asks) * job.n
    wal = step.wal()
    missing = wal.missing(total)
    ctx.progress.begin(job.name, total, total - len(missing))
    if len(missing):
        in_flight: dict[str, int] = {}
        for _, completions in ctx.host.generate(job.policy, _units(job, missing, ctx.host.unit_rows, in_flight)):
            wal.append([(in_flight[c.request] * job.n + c.index, _logged(c)) for c in completions])
            for key in {completion.request for completion in completions}:
                del in_flight[key]
            ctx.progress.advance(job.name, len(completions))
            ctx.check_stop()
    wal.flush()
    counts: Counter[str] = Counter()
    step.seal_table("rows", Rollout, _counted(ctx, job, wal, total, counts))
    result = {
        "num_rollouts": total,
        "num_prompt_tokens": sum(len(ask.all_ids) for ask in job.asks),
        "num_completion_tokens": counts.pop("tokens", 0),
        "finish_reasons": dict(sorted(counts.items())),
    }
    committed = step.commit(result)
    ctx.progress.end(job.name, f"{total} completions, {result['num_completion_tokens']} tokens")
    return committed


def _units(job: SampleJob, missing: npt.NDArray[np.int64], unit_rows: int, in_flight: dict[str, int]) -> Iterator[Unit]:
    """Requests that are not complete, longest prompts first, in units of about ``unit_rows`` completions.

    Made when a worker asks for one, so that a million requests never stand in memory; ``in_flight`` maps the keys of
    handed-out requests to their ordinals.
    """
    pending = [int(ordinal) for ordinal in np.unique(missing // job.n)]
    pending.sort(key=lambda ordinal: (-len(job.asks[ordinal].all_ids), ordinal))
    size = max(1, unit_rows // job.n)
    for start in range(0, len(pending), size):
        ordinals = pending[start : start + size]
        requests = [job.request(ordinal) for ordinal in ordinals]
        in_flight.update({request.key: ordinal for request, ordinal in zip(requests, ordinals, strict=True)})
        yield start // size, requests


def _logged(completion: Completion) -> dict[str, Any]:
    return {
        "ids": list(completion.token_ids),
        "text": completion.text,
        "finish": completion.finish_reason,
        "logps": None if completion.logps is None else list(completion.logps),
    }


def _counted(ctx: Context, job: SampleJob, wal: Wal, total: int, counts: Counter[str]) -> Iterator[Rollout]:
    for row in range(total):
        rollout = job.rollout(row, wal.read(row), ctx.renderer)
        counts["tokens"] += len(rollout.completion_ids) - rollout.num_given_tokens
        counts[rollout.finish_reason] += 1
        yield rollout
