"""Fingerprints: what a step is a function of, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reasonrun.errors import RunConflict
from reasonrun.ledger.files import decode_json, encode_json

MAX_SHOWN = 10
_MAX_VALUE_CHARACTERS = 60
_ABSENT = object()


def as_json(value: Any) -> Any:
    """``value`` as it reads back from a JSON file: tuples become lists, keys strings."""
    return decode_json(encode_json(value))


def differences(old: Any, new: Any) -> list[str]:
    """One line ``dotted.path: old -> new`` for each leaf in which two JSON values differ."""
    return [f"{path or '(all)'}: {_short(a)} -> {_short(b)}" for path, a, b in _walk(old, new, "")]


def conflict(step: str, old: Any, new: Any) -> RunConflict:
    """The error for a step whose fingerprint is not the one in the run directory."""
    lines = differences(old, new)
    shown = [f"  {line}" for line in lines[:MAX_SHOWN]]
    if len(lines) > MAX_SHOWN:
        shown.append(f"  … and {len(lines) - MAX_SHOWN} more")
    return RunConflict(
        "\n".join([f"Step {step} of this run was made from something else (in the run -> now):", *shown]),
        hint=f"revert the change, start another run with --run NEW, or make the step again with --redo {step}",
    )


def _walk(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _walk(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            a, b = (items[index] if index < len(items) else _ABSENT for items in (old, new))
            yield from _walk(a, b, f"{path}.{index}" if path else str(index))
    elif type(old) is not type(new) or old != new:
        yield path, old, new


def _short(value: Any) -> str:
    text = "(absent)" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 1] + "…"
