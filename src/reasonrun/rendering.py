"""Messages to token ids and back: the only place that does either, in supervisor and workers alike.

Built on ``tokenizers`` and a sandboxed ``jinja2``, because importing transformers costs seconds and torch. The result
equals ``AutoTokenizer.apply_chat_template``; three things differ on purpose. A special token that stands in a message, such
as ``<|im_end|>``, is encoded as the text it is, so that only the template ends turns and names roles; transformers makes
the token of it. A template that asks for today's date gets a fixed one, so that a prompt does not depend on the day. A
template that rewrites earlier turns is refused for a conversation that goes on, because its next turn could not be appended
to the ids that were sampled.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from reasonrun.errors import EnvironmentProblem, RecipeError
from reasonrun.model_folder import ModelFolder
from reasonrun.records import Message, digest
from reasonrun.special_tokens import Hidden, SpecialTokens

# The date that Meta's own Llama 3 template falls back to when it cannot read a clock.
_FIXED_DATE = datetime(2024, 7, 26, tzinfo=UTC)
_QUESTION = "reasonrun-probe-question"
_ANSWER = "reasonrun-probe-answer"
_THOUGHT = "<think>\nreasonrun-probe-thought\n</think>\n\n"


class Renderer:
    """Tokenizer and chat template of one model folder.

    ``eos_ids`` end a turn, the tokenizer's own first. ``context_length`` is the longest sequence, in tokens, that the
    model was made for.
    """

    def __init__(self, model_dir: Path) -> None:
        folder = ModelFolder(model_dir)
        self.source = str(model_dir)
        self._tokenizer_path = folder.tokenizer_path
        self._tokenizer = _load_tokenizer(folder.tokenizer_path)
        # Both may be stored with a tokenizer, and would cut or fill prompts silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template_source = folder.chat_template()
        self._special_tokens = folder.special_tokens
        self.eos_ids = folder.eos_ids(self._tokenizer.token_to_id)
        self.context_length = folder.context_length()
        self._specials = SpecialTokens(self._tokenizer, self.eos_ids, self._template_source)

    @classmethod
    def load(cls, model_dir: str | Path) -> Renderer:
        """Read a model folder; takes some ten milliseconds.

        Raises:
            EnvironmentProblem: a file, the chat template or the end-of-sequence token is missing or unreadable.
        """
        return cls(Path(model_dir))

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the tokenizer can produce, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides the ids: tokenizer, template, special tokens, end-of-sequence ids."""
        content = json.loads(self._tokenizer_path.read_text(encoding="utf-8"))
        for stored_state in ("truncation", "padding"):
            content.pop(stored_state, None)
        # A trainer's library may add tokens that nothing asks for, such as one for padding.
        named = {name: text for name, text in self._special_tokens.items() if name in self._template_source}
        return digest([digest(content), self._template_source, named, sorted(self.eos_ids)])

    def render(self, messages: Sequence[Message], opening: str = "") -> tuple[int, ...]:
        """Ids of a conversation up to the point where the assistant answers.

        Args:
            messages: the conversation; the last one is not the assistant's.
            opening: start of the assistant's answer, put in its mouth. It is tokenised on its own, so the ids of the
                prompt stay what they are without it.

        Raises:
            RecipeError: the model's chat template refuses these messages.
        """
        messages, hidden = self._hidden(messages)
        return self._ids(self._text(messages, generation_prompt=True), hidden) + self.encode(opening)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of ``text`` alone: no beginning- or end-of-sequence token is added, and none that it spells comes of it."""
        (shown,), hidden = self._specials.hide([text])
        return self._ids(shown, hidden)

    def _hidden(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Hidden | None]:
        """The messages with marks for the special tokens in them, which only ``_ids`` knows to read."""
        contents, hidden = self._specials.hide([message.content for message in messages])
        if hidden is None:
            return messages, None
        pairs = zip(messages, contents, strict=True)
        return [Message(role=message.role, content=content) for message, content in pairs], hidden

    def _ids(self, text: str, hidden: Hidden | None) -> tuple[int, ...]:
        if hidden is not None:
            return self._specials.encode(text, hidden)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; special tokens (turn marks, end of sequence) are left out unless asked for."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """``decode`` of many rows at once, special tokens left out."""
        return list(self._tokenizer.decode_batch([list(ids) for ids in rows], skip_special_tokens=True))

    def decode_with_places(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Text of ``ids`` without special tokens, and where each token stands in it.

        Returns:
            The text, and one more place than there are ids: place i counts the characters before token i. A token inside
            a character of several tokens has the place of that character; special tokens take no room.
        """
        stream, parts, places = DecodeStream(skip_special_tokens=True), [], [0]
        for token_id in ids:
            part = stream.step(self._tokenizer, token_id) or ""
            parts.append(part)
            places.append(places[-1] + len(part))
        return "".join(parts), tuple(places)

    def next_turn(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], messages: Sequence[Message]
    ) -> tuple[int, ...]:
        """Prompt of the turn that follows a completion: the stored ids, unchanged, and the ids between the turns.

        A completion that ended by itself keeps its end-of-sequence token; one that was cut gets the template's end of
        turn. Either way it stands there exactly once.

        Args:
            prompt_ids: what the engine saw.
            completion_ids: what it answered, the end-of-sequence token included when there was one.
            messages: what is said next, usually one user message.

        Raises:
            RecipeError: the template refuses the messages, or rewrites the turns before them.
        """
        messages, hidden = self._hidden(messages)
        bridge_ids = self._ids(self._bridge(messages), hidden)
        end = self._turn_end(bridge_ids)
        ended = bool(completion_ids) and completion_ids[-1] in self.eos_ids
        return (*prompt_ids, *completion_ids, *(bridge_ids[end:] if ended else bridge_ids))

    def _turn_end(self, bridge_ids: tuple[int, ...]) -> int:
        """How many of the bridge's first ids close the assistant's turn; 0 when the template closes it without EOS."""
        first = next((k for k, token_id in enumerate(bridge_ids) if token_id in self.eos_ids), None)
        if first is None or self.decode(bridge_ids[:first], skip_special=False).strip():
            return 0
        return first + 1

    def _bridge(self, messages: Sequence[Message]) -> str:
        """What the template writes between the end of an answer and the place of the next one."""
        bridge = self._text_after(_ANSWER, messages)
        if "</think>" in self._template_source:
            # Templates of reasoning models cut thoughts out of earlier turns, which a plain answer would not show.
            self._text_after(_THOUGHT + _ANSWER, messages)
        return bridge

    def _text_after(self, answer: str, messages: Sequence[Message]) -> str:
        question = Message(role="user", content=_QUESTION)
        before = self._text([question], generation_prompt=True)
        turns = [question, Message(role="assistant", content=answer), *messages]
        after = self._text(turns, generation_prompt=True)
        head, found, bridge = after.partition(answer)
        # A blank between the answer's mark and the answer is the template's style (Llama 2), not another history.
        if not found or head.rstrip() != before.rstrip():
            self._refuse_rewriting(before + answer, after)
        return bridge

    def _refuse_rewriting(self, sampled: str, rendered: str) -> NoReturn:
        changes = difflib.unified_diff(
            sampled.splitlines(), rendered.splitlines(), "as sampled", "as rendered one turn later", lineterm="", n=1
        )
        raise RecipeError(
            f"The chat template of {self.source} rewrites earlier turns when a conversation goes on:\n"
            + "\n".join(f"    {line}" for line in changes),
            hint="Use a model without this, or a copy of its folder whose chat_template.jinja keeps earlier turns.",
        )

    def _text(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                self._template.render(
                    messages=turns,
                    tools=None,
                    documents=None,
                    add_generation_prompt=generation_prompt,
                    **self._special_tokens,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages) or "none"
            raise RecipeError(
                f"The chat template of {self.source} refuses a conversation of roles [{roles}]: {error}",
                hint="Choose a prompt style that this model knows, or give the folder another chat_template.jinja.",
            ) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _FIXED_DATE.strftime
        try:
            return environment.from_string(self._template_source)
        except jinja2.TemplateSyntaxError as error:
            raise EnvironmentProblem(
                f"The chat template of {self.source} does not parse, line {error.lineno}: {error.message}",
                hint="Correct chat_template.jinja in that folder.",
            ) from error


class _GenerationBlock(Extension):
    """``{% generation %}``: marks the assistant's text for training libraries; the text itself is unchanged."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes HTML, which transformers' does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception; here it becomes a message
        raise EnvironmentProblem(
            f"{path} is not a tokenizer that this tokenizers version reads: {error}",
            hint="Copy the file again from its source, or upgrade tokenizers.",
        ) from error
