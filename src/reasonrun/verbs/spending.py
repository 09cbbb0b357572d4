"""What this run has spent on the models behind endpoints, and the limit that a recipe may set."""

from __future__ import annotations

from collections.abc import Iterator

from reasonrun.errors import EnvironmentProblem, Stopped
from reasonrun.generation import EndpointSettings, Usage
from reasonrun.ledger.steps import Committed
from reasonrun.ledger.wal import Wal
from reasonrun.records import Checkpoint
from reasonrun.verbs.context import Context, Unit


def count_committed(ctx: Context, policy: Checkpoint, step: Committed) -> None:
    """Add a finished step of an endpoint, as its server counted."""
    if policy.remote:
        _add(ctx, policy, Usage(step.result["num_prompt_tokens"], step.result["num_completion_tokens"]))


def count_logged(ctx: Context, policy: Checkpoint, wal: Wal) -> None:
    """Add what earlier attempts were answered in a step that is not finished."""
    if policy.remote:
        for row in wal.rows():
            count(ctx, policy, Usage(*row["usage"]) if "usage" in row else None)


def count(ctx: Context, policy: Checkpoint, usage: Usage | None) -> None:
    """Add one answer; nothing is known of one without usage.

    Raises:
        EnvironmentProblem: there is a limit, and the server does not tell what an answer used.
    """
    if not policy.remote or ctx.planned is not None:
        return
    if usage is not None:
        _add(ctx, policy, usage)
        return
    role, endpoint = _endpoint(ctx, policy)
    if endpoint.max_cost:
        raise EnvironmentProblem(
            f"models.{role} ({endpoint.model}) answers without usage, so models.{role}.endpoint.max_cost cannot be kept",
            hint=f"take the limit out (models.{role}.endpoint.max_cost=0), or use a server that reports usage",
        )


def _add(ctx: Context, policy: Checkpoint, usage: Usage) -> None:
    key = (policy.weights, policy.path)
    before = ctx.spent.get(key, Usage(0, 0))
    ctx.spent[key] = Usage(before.prompt + usage.prompt, before.completion + usage.completion)


def affordable(ctx: Context, policy: Checkpoint, units: Iterator[Unit]) -> Iterator[Unit]:
    """The units to ask for while there is money left: all of them for a model without a limit."""
    while not _exhausted(ctx, policy):
        unit = next(units, None)
        if unit is None:
            return
        yield unit


def check_affordable(ctx: Context, policy: Checkpoint, step: str, num_missing: int) -> None:
    """Raises Stopped when answers are missing because the limit of the endpoint is reached."""
    if not num_missing or not _exhausted(ctx, policy):
        return
    role, endpoint = _endpoint(ctx, policy)
    cost = endpoint.cost(ctx.spent[policy.weights, policy.path])
    raise Stopped(
        f"step {step}: this run has spent {cost:.4f} USD on models.{role} ({endpoint.model}), and"
        f" models.{role}.endpoint.max_cost is {endpoint.max_cost:g}; {num_missing} answers are missing",
        hint=f"what was answered is kept; the same command with a higher models.{role}.endpoint.max_cost continues this run",
    )


def _exhausted(ctx: Context, policy: Checkpoint) -> bool:
    if not policy.remote or ctx.planned is not None:  # a rehearsal pays for nothing
        return False
    endpoint = _endpoint(ctx, policy)[1]
    spent = ctx.spent.get((policy.weights, policy.path), Usage(0, 0))
    return bool(endpoint.max_cost) and (endpoint.cost(spent) or 0.0) >= endpoint.max_cost


def _endpoint(ctx: Context, policy: Checkpoint) -> tuple[str, EndpointSettings]:
    for role, model in ctx.recipe.further_models.items():
        endpoint = model.endpoint
        if endpoint and (endpoint.weights, endpoint.url) == (policy.weights, policy.path):
            return role, endpoint
    raise ValueError(f"the recipe names no endpoint {policy.path}")
