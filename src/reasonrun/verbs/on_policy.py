"""On-policy training as the supervisor sees it: what goes into the fingerprint, and what goes to the worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reasonrun.errors import RecipeError
from reasonrun.on_policy import part, plugin_part, write_records
from reasonrun.records import digest
from reasonrun.samples import OnPolicy
from reasonrun.settings import Settings, semantic
from reasonrun.training import OnPolicyJob
from reasonrun.verbs.context import Context


def described(ctx: Context, source: OnPolicy) -> dict[str, Any]:
    """What the rows depend on besides the weights.

    Raises:
        RecipeError: a function cannot be named across processes, or has no version.
    """
    return {
        "problems": digest([[problem.id, problem.reference] for problem in source.problems]),
        "rollout": _function(source.rollout, source.rollout_settings),
        "rewards": _function(source.rewards, source.rewards_settings),
        "task": semantic(ctx.task.config),
        "prompts": ctx.task.prompt_version,
        "tokenizer": ctx.renderer.digest,
        **({} if source.given is None else {"given": source.given.digest}),
        "grader": [ctx.grader.id, semantic(ctx.grader.settings)],
    }


def on_policy_job(ctx: Context, source: OnPolicy, out_dir: Path) -> OnPolicyJob:
    """What the worker needs; problems and given rollouts go into files."""
    problems, given = out_dir / "problems.jsonl", out_dir / "given.jsonl"
    write_records(problems, source.problems)
    if source.given is not None:
        write_records(given, source.given)
    return OnPolicyJob(
        tokenizer=ctx.renderer.source,
        problems=str(problems),
        given="" if source.given is None else str(given),
        task=plugin_part(type(ctx.task), ctx.task.config),
        engine=plugin_part(ctx.recipe.classes["engine"], ctx.recipe.engine),
        rollout=part(source.rollout, source.rollout_settings),
        rewards=part(source.rewards, source.rewards_settings),
    )


def _function(function: Callable[..., Any], settings: Settings) -> dict[str, Any]:
    found, version = part(function, settings), getattr(function, "version", None)
    if not isinstance(version, int):
        raise RecipeError(
            f"{found.path} has no version, so that results could not be told apart when it changes",
            hint="mark it with @versioned(1), and bump the number whenever it behaves otherwise",
        )
    return {"function": found.path, "version": version, "settings": semantic(settings)}
