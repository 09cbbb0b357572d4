"""One prompt to sample from, the request that is made of it, and the record that is made of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reasonrun.errors import RecipeError
from reasonrun.generation import Completion, Request
from reasonrun.randomness import derive_seed
from reasonrun.records import Message, Problem, Rollout, Sampling, Segment, digest
from reasonrun.rendering import Renderer

_MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One prompt to sample from: a problem in a style, the next turn of a rollout, the beginning of one, a question
    about one.

    ``given`` is the beginning of the answer, put in the model's mouth. ``prompt_ids`` are empty for a remote model.
    ``in_words`` sends the messages along, too.
    """

    problem: Problem
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    given: tuple[Segment, ...] = ()
    parent_id: str | None = None
    in_words: bool = False

    @property
    def given_ids(self) -> tuple[int, ...]:
        return tuple(i for segment in self.given for i in segment.token_ids)

    @property
    def all_ids(self) -> tuple[int, ...]:
        """What the engine goes on from."""
        return self.prompt_ids + self.given_ids

    @property
    def identity(self) -> list[Any]:
        """What the completions depend on: the ids, or the words where there are none."""
        ids: list[Any] = list(self.all_ids)
        return ids or [[message.role, message.content] for message in self.messages]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """What the asks of one sampling have in common.

    ``policy`` and ``tokenizer`` are digests, ``kind`` is that of the rollouts, ``seed_parts`` start every request seed.
    """

    policy: str
    tokenizer: str
    kind: str
    n: int
    sampling: Sampling
    seed_parts: tuple[str | int, ...]
    remote: bool = False

    def request(self, ask: Ask, done: tuple[int, ...] = ()) -> Request:
        """The request of one ask; its key holds everything that the completions depend on."""
        all_ids, identity = ask.all_ids, ask.identity
        seed = derive_seed(*self.seed_parts, ask.problem.id, ask.parent_id or "", digest(identity))
        key = digest(
            [
                self.policy,
                self.tokenizer,
                ask.problem.id,
                ask.parent_id,
                identity,
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
            messages=ask.messages if ask.in_words else (),
            done=done,
        )

    def rollout(
        self, ask: Ask, request: Request, index: int, completion: dict[str, Any], renderer: Renderer | None
    ) -> Rollout:
        """The record of sample ``index`` of an ask from its logged completion."""
        logps = completion["logps"]
        sampled = Segment(token_ids=tuple(completion["ids"]), src="model", loss=True)
        return Rollout(
            id=f"{request.key}-{index}",
            problem_id=ask.problem.id,
            index=index,
            parent_id=ask.parent_id,
            kind=self.kind,
            messages=ask.messages,
            prompt_ids=ask.prompt_ids,
            segments=() if self.remote else (*ask.given, sampled),
            text=_whole_text(ask, completion, renderer) if renderer and ask.given else completion["text"],
            finish_reason=completion["finish"],
            logps=None if logps is None else tuple(logps),
            policy=self.policy,
            sampling=self.sampling,
            seed=request.seed,
        )


def logged(completion: Completion) -> dict[str, Any]:
    """What is kept of a completion, as JSON: what ``Asking.rollout`` makes a record of."""
    return {
        "ids": list(completion.token_ids),
        "text": completion.text,
        "finish": completion.finish_reason,
        "logps": None if completion.logps is None else list(completion.logps),
        **({} if completion.usage is None else {"usage": list(completion.usage)}),
    }


def ask_in_style(problem: Problem, messages: tuple[Message, ...], opening: str, renderer: Renderer) -> Ask:
    """``messages`` put to a model whose answer begins with ``opening``, if that is not empty."""
    ids = renderer.encode(opening)
    given = (Segment(token_ids=ids, src="prompt", loss=False),) if ids else ()
    return Ask(problem=problem, messages=messages, prompt_ids=renderer.render(messages), given=given)


def ask_next_turn(problem: Problem, rollout: Rollout, said: str, renderer: Renderer) -> Ask:
    """The turn after ``rollout``, whose ids are kept as they are."""
    message = Message(role="user", content=said)
    return Ask(
        problem=problem,
        messages=(*rollout.messages, Message(role="assistant", content=rollout.text), message),
        prompt_ids=renderer.next_turn(rollout.prompt_ids, rollout.completion_ids, [message]),
        parent_id=rollout.id,
    )


def require_room(
    asks: Iterable[Ask], turns: Sequence[str], max_new_tokens: int, limit: int, renderer: Renderer
) -> None:
    """Refuse, before anything is sampled, conversations that may not fit: none is ever cut.

    Args:
        asks: the first prompts.
        turns: what will be said after each answer but the last.
        max_new_tokens: longest answer of each turn.
        limit: tokens of the longest sequence that is allowed.
        renderer: their tokenizer and template.

    Raises:
        RecipeError: the longest prompt with the longest answers exceeds ``limit``.
    """
    lengths = [(len(ask.all_ids), ask.problem) for ask in asks]
    longest, problem = max(lengths, key=lambda pair: pair[0])
    between = sum(len(renderer.next_turn((), (), [Message(role="user", content=said)])) for said in turns)
    needed = longest + between + (1 + len(turns)) * max_new_tokens
    if needed <= limit:
        return
    room = (limit - longest - between) // (1 + len(turns))
    whole = f"a conversation of {1 + len(turns)} turns" if turns else "an answer with its prompt"
    allowed = " and the trainer's max_length allow" if turns else " holds"
    hint = f"lower max_new_tokens to {room}, " if room > 0 else ""
    hopeless = {asked.id: named(asked) for length, asked in lengths if length + between >= limit}
    if 0 < len(hopeless) < len({asked.id for _, asked in lengths}):  # shorter answers help the others, never these
        listed = ", ".join(list(hopeless.values())[:_MAX_NAMED]) + (" …" if len(hopeless) > _MAX_NAMED else "")
        hint = f"leave {'this row' if len(hopeless) == 1 else f'these {len(hopeless)} rows'} out: {listed}; or "
    raise RecipeError(
        f"{whole} may need {needed} tokens: the longest prompt ({named(problem)}) has {longest},"
        f" {'each turn' if turns else 'the answer'} up to {max_new_tokens}. The model's context"
        f"{allowed} {limit}",
        hint=f"{hint}{'raise max_length, ' if turns else 'use fewer demonstrations, '}or take a model with a longer context",
    )


def named(problem: Problem) -> str:
    """A problem as messages name it: its id, and the file and line that it comes from, where it has one."""
    source = problem.meta.get("source", "")
    return f"problem {problem.id}{f' of {source}' if source else ''}"


def _whole_text(ask: Ask, completion: dict[str, Any], renderer: Renderer) -> str:
    """Given and sampled tokens decoded together, without the stop string that the engine took off.

    A tokenizer may decode the first token of a text otherwise than the same one further on.
    """
    ids = tuple(completion["ids"])
    num_taken_off = len(renderer.decode(ids)) - len(completion["text"])
    whole = renderer.decode(ask.given_ids + ids)
    return whole[: len(whole) - num_taken_off]
