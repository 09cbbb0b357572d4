r"""Where a completion states its answer, and what that answer says as a number.

Every function here is linear in its input, and no input makes one of them raise: they read what a policy wrote.

Extraction follows the recipe's markers in order. The first marker that occurs with something behind it decides, its
last occurrence wins, and the answer is the rest of that line up to the end of the sentence. ``boxed`` stands for the
content of ``\boxed{…}``, found by counting braces.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import islice

BOXED = "boxed"
MAX_NUMBER_CHARS = 500  # longer answers are no numbers: int() of 200,000 digits takes seconds
MAX_RECORDED_CHARS = 200
_NUM_CANDIDATES = 16  # occurrences of one marker that are tried from the end; a repeating policy writes thousands
_MAX_BOXED_BRACES = 10_000

_ANSWER_LINE = re.compile(r"[\s*:]*([^\n]*)")
_SENTENCE_END = re.compile(r"\.(?=\s)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LAST_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?")

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", "\u2009"),  # kinds of narrow space, which may group digits
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", None),
        **dict.fromkeys("$£€¥¢₹`", None),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "\u2044": "/",
        "\uff0c": ",",
        "\uff0e": ".",
        "½": " 1/2",
        "⅓": " 1/3",
        "⅔": " 2/3",
        "¼": " 1/4",
        "¾": " 3/4",
        "⅕": " 1/5",
        "⅛": " 1/8",
        "~": " ",
    }
)
_TEX_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_TEX_NOISE = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[()\[\]!$]")
_TEX_SPACE = re.compile(r"\\(?:[,;: ]|quad|qquad)")
_TEX_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_GROUPED = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\u2009[0-9]{3})+))(?![0-9,\u2009])")
_INTEGER = re.compile(r"-?[0-9]{1,18}")

_PARTS = re.compile(
    r"""(?P<sign>[+-]?)\s*(?:
      (?:(?P<whole>[0-9]+)\s*)?\\frac\s*\{\s*(?P<top>-?[0-9]+)\s*\}\s*\{\s*(?P<bottom>[0-9]+)\s*\}
    | (?P<mixed>[0-9]+)\s+(?P<mixed_top>[0-9]+)\s*/\s*(?P<mixed_bottom>[0-9]+)
    | (?P<numerator>[0-9]+(?:\.[0-9]+)?)\s*/\s*(?P<denominator>[0-9]+(?:\.[0-9]+)?)
    | 10\s*\^\s*\{?(?P<power>[+-]?[0-9]{1,3})\}?
    | (?P<decimal>[0-9]+\.?[0-9]*|\.[0-9]+)
      (?:[eE](?P<exponent>[+-]?[0-9]{1,3})(?![0-9.])
       |\s*(?:\\times|\\cdot|[x×*])\s*10\s*\^\s*\{?(?P<tens>[+-]?[0-9]{1,3})\}?)?
    )""",
    re.VERBOSE,
)
# What may follow a number as its unit: words without digits or operators. A lone letter is a variable or a scale (5k),
# and "or", "to" … announce a second number.
_UNIT = re.compile(
    r"\s*(?:\\?%|°|\^\s*\{?\s*\\circ\s*\}?)?\s*"
    r"(?:(?P<scale>hundred|thousand|million|billion|trillion)\b\s*)?"
    r"(?:(?![xyznkieKMB]\b|(?:or|and|to|times|plus|minus|over|squared|hundred|thousand|million|billion|trillion)\b)"
    r"[A-Za-z,;(][^0-9=+*^\\<>{}]{0,80})?"
)
_STRICT_UNIT = re.compile(r"\s*(?:\\?%|°|\^\s*\{?\s*\\circ\s*\}?)?\s*")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LEFT_SIDE = re.compile(r"[A-Za-z0-9_(){}+\-*/^. \\×÷%]{0,200}")
_CONJUNCTION = re.compile(r"\b(?:or|and)\b")


def compile_markers(markers: Sequence[str]) -> tuple[re.Pattern[str] | None, ...]:
    """The markers' patterns in order; None stands for ``boxed``. Raises re.error for an invalid pattern."""
    return tuple(None if marker == BOXED else re.compile(marker) for marker in markers)


def find_answer(text: str, patterns: Sequence[re.Pattern[str] | None], *, last_number: bool = False) -> str | None:
    """The stated answer as it was written, or None when no marker has anything behind it.

    Args:
        text: the completion.
        patterns: from ``compile_markers``.
        last_number: fall back to the last number of the text.
    """
    for pattern in patterns:
        answer = last_boxed(text) if pattern is None else _after_last(text, pattern)
        if answer is not None:
            return answer
    if last_number:
        found = deque(_LAST_NUMBER.finditer(text), maxlen=1)
        return found[0].group().rstrip(",") if found else None
    return None


def _after_last(text: str, pattern: re.Pattern[str]) -> str | None:
    for end in reversed(deque((match.end() for match in pattern.finditer(text)), maxlen=_NUM_CANDIDATES)):
        line = _ANSWER_LINE.match(text, end)
        answer = _SENTENCE_END.split(line[1], maxsplit=1)[0].rstrip(" \t\r.*") if line else ""
        if answer:
            return answer
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{…}`` that is not empty, or None."""
    end = len(text)
    for _ in range(_NUM_CANDIDATES):
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            return None
        content = _balanced(text, start + len("\\boxed{"))
        if content:
            return content
        end = start
    return None


def _balanced(text: str, start: int) -> str | None:
    depth = 1
    for token in islice(_BRACE.finditer(text, start), _MAX_BOXED_BRACES):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start : token.start()].strip()
    return None


def normalise(answer: str) -> str:
    """One spelling for what differs only in typography: spaces, minus signs, currency, digit groups, LaTeX wrappers."""
    text = (last_boxed(answer) or answer).replace("{,}", ",").replace("\\$", "").replace("\\%", "%")
    text = text.translate(_CHARACTERS)
    if "\\" in text:
        text = _TEX_TEXT.sub(r" \1", text)
        text = _TEX_SPACE.sub("\u2009", _TEX_NOISE.sub("", text))
        text = _TEX_FRACTION.sub(r"\\frac", text)
    text = _GROUPED.sub(lambda match: match[1].replace(",", "").replace("\u2009", ""), text)
    return _without_outer("{}", " ".join(text.split()).lstrip(' *_":,;').rstrip(' *_".:,;'))


def _without_outer(brackets: str, text: str) -> str:
    inner = text[1:-1]
    wrapped = text[:1] + text[-1:] == brackets and not set(brackets) & set(inner)
    return inner.strip() if wrapped else text


def read_number(answer: str, *, units: bool = True) -> Fraction | None:
    """The number that ``answer`` states, exactly, or None.

    Reads integers, decimals, digit groups, fractions, mixed numbers, ``a e b`` and powers of ten. A percent sign is
    read as a unit: 10% is 10.

    Args:
        answer: as extracted.
        units: also read ``72 clips``, ``2 million``, ``x = 72`` and ``48 + 24 = 72``; otherwise nothing but a number.
    """
    return None if len(answer) > MAX_NUMBER_CHARS else _read_number(answer, units)


@lru_cache(maxsize=65_536)
def _read_number(answer: str, units: bool) -> Fraction | None:
    if _INTEGER.fullmatch(answer):
        return Fraction(int(answer))
    text = _without_outer("()", normalise(answer))
    if units and "=" in text:
        left, _, text = text.rpartition("=")
        if any(not _LEFT_SIDE.fullmatch(part) or _CONJUNCTION.search(part) for part in left.split("=")):
            return None
        text = text.strip()
    match = _PARTS.match(text)
    unit = (_UNIT if units else _STRICT_UNIT).fullmatch(text, match.end()) if match else None
    if match is None or unit is None:
        return None
    number = _value(match.groupdict())
    scale = _SCALES[unit["scale"]] if units and unit["scale"] else 1
    return None if number is None else number * scale


def _value(parts: dict[str, str | None]) -> Fraction | None:
    sign = -1 if parts["sign"] == "-" else 1
    top = parts["top"] or parts["mixed_top"] or parts["numerator"]
    bottom = parts["bottom"] or parts["mixed_bottom"] or parts["denominator"]
    if top is not None and bottom is not None:
        whole = Fraction(parts["whole"] or parts["mixed"] or 0)
        divisor = Fraction(bottom)
        return sign * (whole + Fraction(top) / divisor) if divisor else None
    if parts["power"] is not None:
        return sign * Fraction(10) ** int(parts["power"])
    exponent = int(parts["exponent"] or parts["tens"] or 0)
    return sign * Fraction(parts["decimal"] or 0) * Fraction(10) ** exponent


@lru_cache(maxsize=65_536)
def write_number(number: Fraction) -> str:
    """One spelling of each number: ``72``, ``0.5`` where the decimal ends, ``1/3`` where it does not."""
    if number.denominator == 1:
        return str(number.numerator)
    rest, twos, fives = number.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{number.numerator}/{number.denominator}"
    places = max(twos, fives)
    digits = str(abs(number.numerator) * 10**places // number.denominator).rjust(places + 1, "0")
    return f"{'-' if number < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def recorded(answer: str) -> str:
    """``answer`` in a form that every file format takes: cut, and without lone surrogates."""
    return answer[:MAX_RECORDED_CHARS].encode("utf-8", "backslashreplace").decode("utf-8")
