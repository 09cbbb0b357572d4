"""What a step depends on besides its fingerprint, so that a run knows from which others it may take steps."""

from __future__ import annotations

from typing import Any

from reasonrun.code_digest import code_digests, versions
from reasonrun.ledger.borrowing import OTHER_VERBS
from reasonrun.recipe import ResolvedRecipe
from reasonrun.records import digest
from reasonrun.settings import Effect

_HOLD_ALL_ELSE = (
    "problems",
    "sample",
    "grade",
    "judge",
    "evaluate",
    "preflight",
    "logprobs",
    "evaluate_pairs",
    "merge",
)
"""Verbs whose fingerprints hold all that a method passes to them, so that methods may differ."""


def conditions(recipe: ResolvedRecipe) -> dict[str, str]:
    """A digest for each verb; ``other`` is for verbs that are not listed.

    The engine is in all of them, although most of its fields are semantic: fingerprints name what was asked of it, not
    who answered. ``train`` gets its settings from the method, numeric fields included. A curation function is
    fingerprinted by name and version, so it also counts the method's source, where it may stand.
    """
    code = code_digests(recipe.classes["method"], recipe.classes["task"])
    method_code = code.pop("method")
    numeric = {path: _value(recipe, path) for path, effect in recipe.effects.items() if effect is Effect.NUMERIC}
    of_method = {path: value for path, value in numeric.items() if path.startswith("method.")}
    common = {
        "versions": versions(),
        "code": code,
        "engine": _engine(recipe),
        "model_code": recipe.model.trust_remote_code_commit,
        "numeric": {path: value for path, value in numeric.items() if path not in of_method},
    }
    train = {**common, "numeric_of_method": of_method}
    return {
        **{verb: digest(common) for verb in _HOLD_ALL_ELSE},
        "train": digest(train),
        OTHER_VERBS: digest({**train, "method_code": method_code}),
    }


def _engine(recipe: ResolvedRecipe) -> dict[str, Any]:
    effects = recipe.effects
    return {
        key: value
        for key, value in recipe.engine.model_dump(mode="json").items()
        if effects.get(f"engine.{key}") is not Effect.OPERATIONAL
    }


def _value(recipe: ResolvedRecipe, path: str) -> Any:
    """The validated value: the stored recipe may hold an expression that reads the environment instead."""
    value: Any = recipe
    for part in path.split("."):
        value = getattr(value, part, None)
    return list(value) if isinstance(value, tuple) else value
