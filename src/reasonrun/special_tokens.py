"""Special tokens that stand in a text by accident or by intent, told from those that a chat template writes.

A tokenizer finds ``<|im_end|>`` wherever it stands, so a question or an answer could end its own turn and open one of
another role. ``tokenizers`` can switch that off for a whole text only (``Tokenizer.encode_special_tokens``), and encoding
the text in pieces would change what the tokenizer does at their edges. So such a text goes, whole, through a twin of the
tokenizer whose special tokens have the same ids and other, private spellings: only what the template wrote is put into
those spellings.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from reasonrun.errors import EnvironmentProblem

_FIRST_NUMBER = 708_155_093  # any long number: digits pass through filters and normalizers as they are


@dataclass(frozen=True)
class Hidden:
    """What ``SpecialTokens.hide`` took out of some texts: ``number`` marks the places, which count ``spellings``."""

    number: int
    spellings: list[str] = field(default_factory=list)

    def mark(self, spelling: str) -> str:
        """A text without letters and blanks, so that a template that trims or changes case keeps it."""
        if spelling not in self.spellings:
            self.spellings.append(spelling)
        return f"[[{self.number}-{self.spellings.index(spelling)}]]"

    def restore(self, text: str) -> str:
        """The text with what was hidden in its place."""
        return re.sub(rf"\[\[{self.number}-(\d+)\]\]", lambda found: self.spellings[int(found[1])], text)


class SpecialTokens:
    """The special tokens of a tokenizer: those that it calls so, and those that end a turn.

    Args:
        tokenizer: read, never changed.
        eos_ids: ends of a turn; some folders forget to call them special.
        reserved: a text that private spellings must not meet, the chat template.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int], reserved: str) -> None:
        self._tokenizer, self._reserved = tokenizer, reserved
        added = tokenizer.get_added_tokens_decoder()
        ends = set(eos_ids)
        self._ids = {token.content: number for number, token in added.items() if token.special or number in ends}
        # Where a normalizer runs first, other spellings are found, too, such as one in capital letters.
        self._finds_more = tokenizer.normalizer is not None and any(
            added[number].normalized for number in self._ids.values()
        )
        self._special = _any_of(self._ids)
        self._added = _any_of(token.content for token in added.values())
        self._twin: tuple[int, Tokenizer] | None = None

    def hide(self, texts: Sequence[str]) -> tuple[list[str], Hidden | None]:
        """The texts with a mark for each special token in them; None, and the texts themselves, when there is nothing that
        the tokenizer could mistake."""
        if not (self._finds_more or any(map(self._special.search, texts))):
            return list(texts), None
        known = (self._reserved, *texts)
        number = next(n for n in itertools.count(_FIRST_NUMBER) if not any(str(n) in text for text in known))
        hidden = Hidden(number)
        return [self._special.sub(lambda found: hidden.mark(found[0]), text) for text in texts], hidden

    def encode(self, text: str, hidden: Hidden) -> tuple[int, ...]:
        """Ids of a rendered text: its special tokens become such, those that were hidden become the text they are."""

        def private(found: re.Match[str]) -> str:
            number = self._ids.get(found[0])
            return found[0] if number is None else _private(hidden.number, number)

        spelt = hidden.restore(self._added.sub(private, text))
        return tuple(self._twin_of(hidden.number).encode(spelt, add_special_tokens=False).ids)

    def _twin_of(self, number: int) -> Tokenizer:
        twin = self._twin
        if twin is None or twin[0] != number:
            names = {spelling: _private(number, token_id) for spelling, token_id in self._ids.items()}
            made = Tokenizer.from_str(json.dumps(respelt(json.loads(self._tokenizer.to_str()), names)))
            wrong = [old for old, new in names.items() if made.token_to_id(new) != self._ids[old]]
            if wrong:
                raise EnvironmentProblem(
                    f"This tokenizer does not let {', '.join(wrong[:3])} be told from a text that reads the same.",
                    hint="Take such tokens out of the questions and prompts, or report the model.",
                )
            self._twin = twin = (number, made)
        return twin[1]


def respelt(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """``tokenizer.json`` with other spellings of some tokens, under which no text leads to their ids any more.

    The vocabulary changes with them, since a model may reach its special tokens from there (Unigram does, and byte-pair
    encoding with ``ignore_merges``); merges that would make one leave.
    """
    model = dict(content["model"])
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), *score] for token, *score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if names.keys().isdisjoint(_made_and_parts(merge))]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in content["added_tokens"]]
    return {**content, "model": model, "added_tokens": added}


def _made_and_parts(merge: str | list[str]) -> tuple[str, ...]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return ("".join(parts), *parts)


def _private(number: int, token_id: int) -> str:
    return f"[[{number}:{token_id}]]"


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Finds any of them, the longest where several begin, as tokenizers does; nothing when there is none."""
    longest_first = sorted(filter(None, spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
