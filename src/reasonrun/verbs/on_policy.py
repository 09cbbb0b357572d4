"""On-policy training as the supervisor sees it: what goes into the fingerprint, and what goes to the worker."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import reasonrun
from reasonrun.errors import RecipeError, RunConflict
from reasonrun.parts import part, plugin_part, write_records
from reasonrun.records import digest
from reasonrun.samples import Extent, OnPolicy
from reasonrun.settings import Settings, semantic
from reasonrun.training import ON_POLICY_FILE, OnPolicyJob, OptimizerSettings, PolicyGradientSettings
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


def code_of(ctx: Context, source: OnPolicy) -> str:
    """Digest of the code that makes the rows and learns from them: optimizer steps of one step must not be made half by one
    code and half by another."""
    package = Path(reasonrun.__file__).parent
    paths = [package / name for name in ("credit.py", "on_policy.py", "asks.py", "rendering.py", "randomness.py")]
    paths += [path for folder in ("trainers", "engines", "grading") for path in sorted((package / folder).glob("*.py"))]
    paths += [Path(inspect.getfile(thing)) for thing in (source.rollout, source.rewards, type(ctx.task))]
    return digest([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])


def refuse_changed_code(ctx: Context, name: str, source: OnPolicy, checkpoint: Path) -> None:
    """Raises RunConflict when other code made the optimizer steps that this attempt would go on from."""
    made_with = json.loads((checkpoint / ON_POLICY_FILE).read_text("utf-8"))["code"]
    if made_with == code_of(ctx, source) or ctx.accept_code:
        return
    raise RunConflict(
        f"step {name}: the code of the method, the task or the trainer changed while this step was under way; its"
        " optimizer steps would be made half by one and half by the other",
        hint="revert the code; or go on with --accept-code; or begin the step again with"
        f" --redo {name}; or start a new run with --run NEW",
    )


def rehearsed(settings: OptimizerSettings, source: OnPolicy) -> OptimizerSettings:
    """The settings with no more rollouts than the problems of a rehearsal allow; too few in the real run are left to say so."""
    assert isinstance(settings, PolicyGradientSettings)
    enough = source.problems.extent.worst >= settings.problems_per_sampling
    num_problems = min(settings.problems_per_sampling, len(source.problems))
    return settings.model_copy(update={"batch_size": num_problems * settings.group_size}) if enough else settings


def rehearsed_tokens(
    settings: OptimizerSettings, source: OnPolicy, num_steps: int, result: Mapping[str, Any]
) -> tuple[Extent, Extent]:
    """Trained and generated tokens of the real step, from what the few steps of a rehearsal took."""
    assert isinstance(settings, PolicyGradientSettings)
    larger = settings.batch_size / rehearsed(settings, source).batch_size
    every = settings.num_iterations
    samplings = -(-num_steps // every) / -(-result["num_steps"] // every) * larger
    trained = result["num_padded_tokens"] * num_steps / result["num_steps"] * larger
    longest = getattr(source.rollout_settings, "max_new_tokens", 0) * result["num_rollouts"]
    most = max(longest, result["num_completion_tokens"]) / max(1, result["num_completion_tokens"])
    generated = result["num_completion_tokens"] * samplings
    return (
        Extent(expected=trained, worst=trained * most, exact=False),
        Extent(expected=generated, worst=generated * most, exact=False),
    )


def on_policy_job(ctx: Context, source: OnPolicy, out_dir: Path) -> OnPolicyJob:
    """What the worker needs; problems and given rollouts go into files."""
    problems, given = out_dir / "problems.jsonl", out_dir / "given.jsonl"
    write_records(problems, source.problems)
    if source.given is not None:
        write_records(given, source.given)
    return OnPolicyJob(
        code=code_of(ctx, source),
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
