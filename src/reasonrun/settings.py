"""Settings: what a recipe can say, each field with its meaning and the effect of changing it under a run."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Effect(StrEnum):
    """What it means to change a field of a run that has begun (design: fields are classed, a test counts them)."""

    SEMANTIC = "semantic"  # another experiment: stops with exit 4
    HORIZON = "horizon"  # how far to go: may grow
    NUMERIC = "numeric"  # same experiment, other arithmetic: allowed, ends the bitwise claim
    OPERATIONAL = "operational"  # free


WHEN_CHANGED = {
    Effect.SEMANTIC: "another experiment. The same command stops with exit 4 and names step and field: take the change"
    " back, begin another run (--run NEW), or make the step again (--redo STEP). As an override on the command line it"
    " begins a run of its own, in a directory named after it.",
    Effect.HORIZON: "how far to go. It may grow, and the run goes on from what is committed; a smaller value stops with"
    " exit 4 unless --prune is given. As an override on the command line it names a directory of its own, so say --run DIR"
    " to go further there.",
    Effect.NUMERIC: "the same experiment with other arithmetic or batches. The run goes on and says so; from there on its"
    " bytes need not be those of a run that was not changed.",
    Effect.OPERATIONAL: "free. The run goes on in the same directory, and what its results depend on stays as it is.",
}
"""What changing a field of each effect under a run does."""


class Settings(BaseModel):
    """Base of every group of recipe fields: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def setting(default: Any, effect: Effect, description: str, **constraints: Any) -> Any:
    """Declare one recipe field.

    Args:
        default: the paper's value where there is one; ``...`` makes the field required.
        effect: what changing it under a run means.
        description: one sentence for ``reasonrun explain`` and the JSON schema.
        constraints: passed to ``pydantic.Field`` (``ge``, ``le``, ``min_length`` …); ``default_factory`` too.
    """
    if "default_factory" in constraints:
        return Field(description=description, json_schema_extra={"effect": effect.value}, **constraints)
    return Field(default, description=description, json_schema_extra={"effect": effect.value}, **constraints)


def semantic(settings: BaseModel) -> dict[str, Any]:
    """The JSON of ``settings`` without numeric and operational fields: the part that names the experiment."""
    kept: dict[str, Any] = {}
    for name, info in type(settings).model_fields.items():
        extra = info.json_schema_extra
        effect = extra.get("effect") if isinstance(extra, dict) else None
        if effect in (Effect.NUMERIC.value, Effect.OPERATIONAL.value):
            continue
        value = getattr(settings, name)
        kept[name] = semantic(value) if isinstance(value, BaseModel) else settings.model_dump(mode="json")[name]
    return kept
