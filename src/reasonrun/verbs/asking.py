"""What ``sample`` asks a model: one prompt for each problem, rollout or prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from reasonrun.asks import Ask, ask_in_style, ask_next_turn
from reasonrun.errors import RecipeError
from reasonrun.records import Checkpoint, Message, Prefix, Problem, Rollout
from reasonrun.samples import PrefixSet, ProblemSet, RolloutSet
from reasonrun.verbs.context import Context

AskAbout = Callable[[Problem, Any], Sequence[Message]]
"""The messages of a new conversation about a rollout, or about the beginning of one."""
About = TypeVar("About", RolloutSet, PrefixSet)


def asks(
    ctx: Context,
    policy: Checkpoint,
    source: ProblemSet | RolloutSet | PrefixSet,
    *,
    style: str,
    turn: str | None,
    about: AskAbout | None,
) -> list[Ask]:
    """The prompts of one sample step; see ``Lab.sample``.

    Raises:
        RecipeError: the source does not go with ``turn`` and ``about``, or ids of one tokenizer would reach a model with
            another.
    """
    if isinstance(source, ProblemSet):
        return [_in_style(ctx, policy, problem, style) for problem in source]
    if about is not None:
        return list(_about(ctx, policy, source, about))
    if isinstance(source, PrefixSet):
        _refuse_other_tokenizer(ctx, policy)
        return [_continuation(ctx, prefix) for prefix in source]
    if turn is None:
        raise RecipeError(
            "sample from rollouts needs turn=, the user's next message, or prompt=, which asks about each"
        )
    return [_next_turn(ctx, policy, rollout, turn) for rollout in source]


def fitting(ctx: Context, policy: Checkpoint, source: About, about: AskAbout, max_new_tokens: int) -> About:
    """The rows whose questions leave room for an answer in the context of ``policy``; all when none does, so that
    sampling says what is wrong."""
    if policy.remote:
        return source
    limit = ctx.renderer_of(policy).context_length - max_new_tokens
    kept = source.where(lambda row: len(ctx.rendered(policy, about(ctx.problems_by_id[row.problem_id], row))) <= limit)
    return kept if len(kept) else source


def _in_style(ctx: Context, policy: Checkpoint, problem: Problem, style: str) -> Ask:
    messages = ctx.task.messages(problem, style)
    if not policy.remote:
        return ask_in_style(problem, messages, ctx.task.opening(style), ctx.renderer_of(policy))
    if ctx.task.opening(style):
        raise RecipeError(
            f"the style {style} begins every answer with words of its own, which no endpoint lets anybody do",
            hint=f"allowed: the other styles of {ctx.task.name}, or a local model",
        )
    return Ask(problem=problem, messages=messages, prompt_ids=(), in_words=True)


def _about(ctx: Context, policy: Checkpoint, source: RolloutSet | PrefixSet, about: AskAbout) -> Iterator[Ask]:
    for row in source:
        problem = ctx.problems_by_id[row.problem_id]
        messages = tuple(about(problem, row))
        yield Ask(
            problem=problem,
            messages=messages,
            prompt_ids=ctx.rendered(policy, messages),
            parent_id=row.rollout_ids[0] if isinstance(row, Prefix) else row.id,
            in_words=True,
        )


def _continuation(ctx: Context, prefix: Prefix) -> Ask:
    return Ask(
        problem=ctx.problems_by_id[prefix.problem_id],
        messages=prefix.messages,
        prompt_ids=prefix.prompt_ids,
        given=prefix.segments,
        parent_id=prefix.rollout_ids[0],
    )


def _next_turn(ctx: Context, policy: Checkpoint, rollout: Rollout, said: str) -> Ask:
    """Earlier ids are kept as they are where the model reads them; else the conversation is rendered anew."""
    problem = ctx.problems_by_id[rollout.problem_id]
    if not policy.remote and rollout.prompt_ids and ctx.tokenizer_of(rollout) == policy.tokenizer:
        return ask_next_turn(problem, rollout, said, ctx.renderer_of(policy))
    answered = Message(role="assistant", content=rollout.text)
    messages = (*rollout.messages, answered, Message(role="user", content=said))
    return Ask(
        problem=problem,
        messages=messages,
        prompt_ids=ctx.rendered(policy, messages),
        parent_id=rollout.id,
        in_words=policy.remote,
    )


def _refuse_other_tokenizer(ctx: Context, policy: Checkpoint) -> None:
    if policy.tokenizer != ctx.renderer.digest:
        raise RecipeError(
            "a prefix is made of the policy's token ids, and this model does not read them"
            + (": it is behind an endpoint" if policy.remote else ": its tokenizer is another one"),
            hint="ask about the prefix instead: lab.sample(model, prefixes, prompt=…)",
        )
