"""What every recipe can say besides its plug-ins' settings, and the list of all fields with their effects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import GenericAlias
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, create_model, model_validator
from pydantic.fields import FieldInfo

from reasonrun.generation import EndpointSettings
from reasonrun.recipe_errors import models_in
from reasonrun.settings import Effect, Settings, setting

_PREFLIGHT: Any = Literal["refuse", "report", "off"]
_NAME_EFFECTS = {"launcher": Effect.OPERATIONAL}


class ModelSettings(Settings):
    """The base policy: exactly one of ``name``, ``path`` and ``hub``."""

    sources: ClassVar[tuple[str, ...]] = ("name", "path", "hub")

    name: Literal["tiny", "smollm2"] | None = setting(
        None, Effect.SEMANTIC, "A model that comes as a package: tiny with reasonrun, smollm2 with its extra."
    )
    path: str | None = setting(None, Effect.SEMANTIC, "Folder with safetensors weights, config and tokenizer.")
    hub: str | None = setting(
        None, Effect.SEMANTIC, "Model on the Hugging Face Hub, as owner/name.", pattern=r"^[\w.-]+/[\w.-]+$"
    )
    revision: str | None = setting(None, Effect.SEMANTIC, "Branch, tag or commit of a hub model; null takes main.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", Effect.NUMERIC, "Arithmetic of the weights; auto is bfloat16 on a GPU, float32 on the CPU."
    )
    trust_remote_code_commit: str | None = setting(
        None,
        Effect.SEMANTIC,
        "Commit (40 hex digits) of a hub model whose own Python code may run; null runs none.",
        pattern=r"^[0-9a-f]{40}$",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in self.sources if getattr(self, key) is not None]
        if len(given) != 1:
            allowed = f"{', '.join(self.sources[:-1])} and {self.sources[-1]}"
            raise ValueError(
                f"exactly one of {allowed} says where the model is; given: {', '.join(given) or 'none'}"
                " (null takes one back: model.name=null)"
            )
        if self.hub is None and (self.revision is not None or self.trust_remote_code_commit is not None):
            raise ValueError("revision and trust_remote_code_commit belong to a hub model")
        pinned = self.trust_remote_code_commit
        if pinned is not None and self.revision not in (None, pinned):
            raise ValueError(
                "code may run from the commit in trust_remote_code_commit only, and revision names another one;"
                " leave revision out, or give the same commit there"
            )
        return self


class RoleModelSettings(ModelSettings):
    """A further model (judge, teacher, critic …): exactly one of ``name``, ``path``, ``hub`` and ``endpoint``."""

    sources: ClassVar[tuple[str, ...]] = ("name", "path", "hub", "endpoint")

    endpoint: EndpointSettings | None = setting(None, Effect.SEMANTIC, "A model behind an OpenAI-compatible server.")


class EvaluateSettings(Settings):
    """How policies are measured: dev in every round, test once at the end, always with the same seed."""

    seed: int = setting(17, Effect.SEMANTIC, "Seed of sampled evaluations; the same in every round and arm.")
    style: str = setting("plain", Effect.SEMANTIC, "Prompt style; the task must know it.", min_length=1)
    greedy: bool = setting(True, Effect.SEMANTIC, "Measure greedy decoding.")
    num_samples: int = setting(0, Effect.SEMANTIC, "Samples per problem for pass@k and maj@k; 0 is none.", ge=0)
    temperature: float = setting(1.0, Effect.SEMANTIC, "Temperature of those samples.", gt=0)
    max_new_tokens: int | None = setting(
        None, Effect.SEMANTIC, "Longest completion in tokens; null takes the method's.", ge=1
    )
    turns: int = setting(
        1,
        Effect.SEMANTIC,
        "Attempts in a row; from the second on, the task's correction turn asks for the solution again.",
        ge=1,
        le=8,
    )
    num_problems: int = setting(0, Effect.SEMANTIC, "Problems of a split at most, the first ones; 0 is all.", ge=0)

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if not self.greedy and not self.num_samples:
            raise ValueError("nothing to measure: greedy is false and num_samples is 0")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeField:
    """One field of a recipe: what changing it under a run means, its default (None where required), its meaning.

    ``info`` is its declaration; ``stated_keys`` are the keys of a group that its default sets itself.
    """

    effect: Effect
    default: Any
    description: str
    info: FieldInfo = field(repr=False, compare=False)
    stated_keys: frozenset[str] = field(default=frozenset(), repr=False, compare=False)


def recipe_model(
    settings: Mapping[str, type[Settings] | None],
    trackers: Sequence[type[Settings] | None] | None,
    roles: Sequence[str] = (),
) -> type[Settings]:
    """The model of a whole recipe.

    Args:
        settings: the settings class of each section; None accepts anything (its name is wrong, and reported).
        trackers: the settings class of each tracker; None when the value is no list.
        roles: the further models that the recipe names; each is a field, so that it has paths and effects like any other.
    """
    by_role: dict[str, Any] = {
        role: (RoleModelSettings, setting(..., Effect.SEMANTIC, f"The model in the role {role}.")) for role in roles
    }
    models = create_model("Models", __base__=Settings, **by_role)
    sections: dict[str, Any] = {
        section: (cls or Any, setting(... if cls else None, Effect.SEMANTIC, f"The {section}; see its own fields."))
        for section, cls in settings.items()
    }
    each = (Any, ...) if trackers is None else tuple(cls or Any for cls in trackers)
    tracker_type: Any = GenericAlias(tuple, each)
    return create_model(
        "Recipe",
        __base__=Settings,
        **sections,
        models=(
            models,
            setting(..., Effect.SEMANTIC, "Further models by role: judge, teacher …")
            if roles
            else setting(models(), Effect.SEMANTIC, "Further models by role: judge, teacher …"),
        ),
        trackers=(tracker_type, setting((), Effect.OPERATIONAL, "Where metrics are exported to.")),
        preflight=(
            _PREFLIGHT,
            setting(
                "refuse",
                Effect.OPERATIONAL,
                "Look at a small sample of the base first; refuse stops where there is nothing to learn from.",
            ),
        ),
        seed=(int, setting(0, Effect.SEMANTIC, "Seed of the run: samples, batches, shuffles.", ge=0)),
        evaluate=(
            EvaluateSettings,
            setting(None, Effect.SEMANTIC, "How policies are measured.", default_factory=EvaluateSettings),
        ),
    )


def over_defaults(model: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` laid over the groups that fields of ``model`` have as defaults.

    A method may declare ``sft: SFTSettings = SFTSettings(warmup_steps=100)``. A recipe that changes ``sft.lr`` keeps
    the 100; pydantic alone would go back to the default of SFTSettings.
    """
    filled: dict[str, Any] = {}
    for key, value in given.items():
        info = model.model_fields.get(key)
        inner = next(models_in(info.annotation), None) if info else None
        if info and inner and isinstance(value, Mapping):
            default = _default(info)
            chosen = default.model_dump(mode="json", exclude_unset=True) if isinstance(default, inner) else {}
            value = over_defaults(inner, _laid_over(chosen, value))
        filled[key] = value
    return filled


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _laid_over(below[key], above[key])
    return merged


def fields_of(
    model: type[BaseModel], prefix: str = "", instance: BaseModel | None = None
) -> Iterator[tuple[str, RecipeField]]:
    """Every field below ``model`` by dotted path: groups first, then what is in them.

    Args:
        model: a settings class.
        prefix: its own path.
        instance: the default that a field of this class has, whose values then are the defaults.
    """
    for name, info in model.model_fields.items():
        path = f"{prefix}.{name}" if prefix else name
        default = getattr(instance, name) if instance is not None else _default(info)
        group = default if isinstance(default, BaseModel) else None
        plain = group.model_dump(mode="json") if group is not None else default
        yield (
            path,
            RecipeField(
                effect=_effect(path, info),
                default=plain,
                description=info.description or "",
                info=info,
                stated_keys=frozenset(group.model_fields_set) if group is not None else frozenset(),
            ),
        )
        if path != "trackers":
            for inner in models_in(info.annotation):
                yield from fields_of(inner, path, group if isinstance(group, inner) else None)


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def _effect(path: str, info: FieldInfo) -> Effect:
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "effect" in extra:
        return Effect(str(extra["effect"]))
    section, _, rest = path.partition(".")
    return _NAME_EFFECTS.get(section, Effect.SEMANTIC) if rest == "name" else Effect.SEMANTIC
