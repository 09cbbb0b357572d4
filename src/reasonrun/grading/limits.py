"""What is refused before a computer-algebra system sees it: too long, too deep, too large.

The pool's CPU deadline catches the rest; this filter only saves those seconds for what is hopeless at a glance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

MAX_CHARS = 2_000
MAX_DEPTH = 50
MAX_POWER_DIGITS = 10_000  # decimal digits of a literal power such as 9^{9^9}
MAX_FACTORIAL = 10_000

Refusal = Literal["unparseable", "too_large"]

_BRACKET = re.compile(r"[({\[)}\]]")
_TOWER = re.compile(r"[0-9]+(?:[\s(){}]*\^[\s(){}]*[0-9]+)*")
_DIGITS = re.compile(r"[0-9]+")
_FACTORIAL = re.compile(r"((?<![0-9])[0-9]+|[)}\]])[\s}]*!")
_LARGEST = 10**MAX_POWER_DIGITS


def refusal(text: str) -> Refusal | None:
    """Why ``text`` is not worth parsing, or None.

    Returns:
        ``unparseable`` when its length or nesting is that of no answer (a policy's failure); ``too_large`` when it is
        well-formed but names a number that cannot be computed (nobody can tell).
    """
    if len(text) > MAX_CHARS or _depth(text) > MAX_DEPTH:
        return "unparseable"
    towers = [_tower_size(match.group()) for match in _TOWER.finditer(text)]
    if any(size > _LARGEST for size in towers):
        return "too_large"
    if any(_factorial_argument(text, match) > MAX_FACTORIAL for match in _FACTORIAL.finditer(text)):
        return "too_large"
    return None


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match.group() in "({[" else -1
        deepest = max(deepest, abs(depth))
    return deepest


def _tower_size(text: str) -> int:
    """Value of ``a^b^c`` over literals, right to left, or anything beyond the limit when it is beyond the limit."""
    return _power([int(digits) for digits in _DIGITS.findall(text)])


def _power(literals: Sequence[int]) -> int:
    value = 1
    for base in reversed(literals):
        if base < 2:
            value = base if value else 1
        elif value * (base.bit_length() - 1) > 4 * MAX_POWER_DIGITS:
            value = _LARGEST + 1
        else:
            value = base**value
    return value


def _factorial_argument(text: str, match: re.Match[str]) -> int:
    """The largest literal (or tower) in what the factorial is taken of."""
    operand = match[1]
    if not operand.isdigit():
        operand = text[_opening(text, match.start(1)) : match.start(1)]
    return max((_tower_size(tower.group()) for tower in _TOWER.finditer(operand)), default=0)


def _opening(text: str, closing: int) -> int:
    depth = 0
    for position in range(closing, -1, -1):
        depth += {")": 1, "}": 1, "]": 1, "(": -1, "{": -1, "[": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return 0
