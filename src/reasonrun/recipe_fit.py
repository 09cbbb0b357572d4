"""What the parts of a recipe ask of each other: method and task, method and models; which of its models a recipe means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from reasonrun.contracts import Method
from reasonrun.errors import RecipeError
from reasonrun.recipe_compose import Composition, Override
from reasonrun.recipe_errors import Path as KeyPath
from reasonrun.recipe_errors import nearest
from reasonrun.recipe_fields import ModelSettings, RoleModelSettings
from reasonrun.recipe_values import expand_names, without
from reasonrun.settings import Settings

POLICY = "policy"
_ROLE = re.compile(r"[a-z][a-z0-9_]*")


def choose_models(composition: Composition) -> None:
    """Leave each model one of its sources: what a recipe or the command line names replaces what was named below it.

    Two that stand side by side are reported.
    """
    data = expand_names(composition.data)
    models = data.get("models")
    further = models.items() if isinstance(models, Mapping) else ()
    replaced: set[KeyPath] = set()
    for path, model, cls in (
        (("model",), data.get("model"), ModelSettings),
        *((("models", str(role)), model, RoleModelSettings) for role, model in further),
    ):
        given = [key for key in cls.sources if isinstance(model, Mapping) and model.get(key) is not None]
        if len(given) > 1:
            replaced |= _replaced(composition, path, given)
    composition.data = without(data, replaced)


def _replaced(composition: Composition, path: KeyPath, given: Sequence[str]) -> set[KeyPath]:
    """The paths of the sources that count no more; none where it cannot be told which of them is meant."""
    standing = {key: place for key in given if (place := _standing(composition, (*path, key))) is not None}
    if len(standing) < len(given) or (path == ("model",) and _overrides_group(composition)):
        return set()
    *below, last = sorted(given, key=lambda key: standing[key])
    layer = standing[last][0]
    beside = [key for key in below if standing[key][0] == layer]
    if beside:
        back = ".".join(str(part) for part in (*path, beside[0]))
        _report_several(composition, (*path, last), [*beside, last], f"leave one out ({back}=null takes it back)")
    elif layer < len(composition.sources) and composition.sources[layer].package:
        # what the recipe says itself would be ignored in silence
        advice = f"let `_self_` come after `{path[0]}` in `defaults`"
        _report_several(composition, (*path, below[-1]), [below[-1], last], advice)
    return {(*path, key) for key in below}


def _report_several(composition: Composition, path: KeyPath, given: Sequence[str], advice: str) -> None:
    message = f"exactly one source says where the model is; given: {', '.join(given)}; {advice}"
    composition.report(path, message)


def _standing(composition: Composition, path: KeyPath) -> tuple[int, int] | None:
    """Where ``path`` is set last: the number of the file in merge order and the position there; the command line is
    behind all files."""
    command_line = len(composition.sources)
    for number, override in enumerate(composition.overrides):
        if not override.group and _sets(override, path):
            return command_line, number
    chosen = {override.key: number for number, override in enumerate(composition.overrides) if override.group}
    found = None
    for number, source in enumerate(composition.sources):
        depth, _, value = source.locate(path)
        is_word = depth == len(path) - 1 and path[-1] == "name" and isinstance(value, yaml.ScalarNode)
        if value is not None and (depth == len(path) or is_word):
            found = (number, value.start_mark.index)
            if source.package in chosen:
                found = (command_line, chosen[source.package])
    return found


def _sets(override: Override, path: KeyPath) -> bool:
    if override.key[: len(path)] == path:
        return True
    if path[: len(override.key)] != override.key:
        return False
    value, rest = override.value, path[len(override.key) :]
    if isinstance(value, str):
        return rest == ("name",)
    for part in rest:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value is not None


def _overrides_group(composition: Composition) -> bool:
    """Whether a recipe puts another model in the place of its parent's, which stands below what the parent says itself."""
    nodes = [node for source in composition.sources for node in source.defaults()]
    keys = [key.value for node in nodes if isinstance(node, yaml.MappingNode) for key, _ in node.value]
    return any(str(key).split() == ["override", "model"] for key in keys)


def roles_of(composition: Composition, data: dict[str, Any]) -> list[str]:
    """The roles that ``models`` names; what can be none is reported and taken out of ``data``."""
    model, models = data.get("model"), data.get("models")
    if isinstance(model, Mapping) and model.get("endpoint") is not None:
        message = (
            "the policy cannot be an endpoint, because its weights are trained here; a judge or a teacher can:"
            " models.judge.endpoint"
        )
        inner = list(model["endpoint"])[:1] if isinstance(model["endpoint"], Mapping) else []  # for the position
        composition.report(("model", "endpoint", *inner), message)
        data["model"] = {key: value for key, value in model.items() if key != "endpoint"} or {"name": "tiny"}
    if not isinstance(models, Mapping):
        return []
    wrong = {role: why for role in models if (why := _why_no_role(str(role)))}
    for role, why in wrong.items():
        composition.report(("models", role), why)
    data["models"] = {role: value for role, value in models.items() if role not in wrong}
    return list(data["models"])


def _why_no_role(role: str) -> str:
    if role == POLICY:
        return "the policy is what `model` names"
    if not _ROLE.fullmatch(role) or hasattr(Settings, role) or role.startswith("model_"):
        return "cannot name a role: small letters, digits and _, such as judge, teacher, critic"
    return ""


def check_pair(composition: Composition, classes: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """The task must offer what the method and the evaluation ask for."""
    method, task = classes["method"], classes["task"]
    if task is None:
        return
    offered = task.styles | task.capabilities
    names = {section: data[section]["name"] for section in ("method", "task") if classes[section]}
    lacking = sorted(method.requires - offered) if method else []
    if lacking:
        message = f"{names['method']} needs {', '.join(lacking)}, which the task {names['task']} does not offer"
        composition.report(("method", "name"), message, allowed=tuple(sorted(offered)))
    evaluate = data.get("evaluate")
    evaluate = evaluate if isinstance(evaluate, Mapping) else {}
    turns = evaluate.get("turns")
    if isinstance(turns, int) and turns > 1 and "correction" not in task.capabilities:
        message = f"several turns need correction, which the task {names['task']} does not offer; it can be asked once"
        composition.report(("evaluate", "turns"), message, allowed=("1",))
    style = evaluate.get("style")
    if isinstance(style, str) and style not in task.styles:
        allowed = tuple(sorted(task.styles))
        message = f"the task {names['task']} has no style {style!r}"
        composition.report(("evaluate", "style"), message, allowed=allowed, nearest=nearest(style, allowed))


def construct(composition: Composition, classes: Mapping[str, Any], valid: Any, roles: Sequence[str]) -> None:
    """Build task and method once: their constructors know which settings exclude each other, and the method what its
    settings ask of the task and of the models."""
    built: dict[str, Any] = {}
    for section in ("task", "method"):
        try:
            built[section] = classes[section](getattr(valid, section))
        except RecipeError as error:
            composition.report((section,), f"{error.message} ({error.hint})" if error.hint else error.message)
    if "method" in built:
        least = built["method"].evaluation_turns
        if valid.evaluate.turns < least:
            message = f"{valid.method.name} is measured by {least} attempts in a row, not {valid.evaluate.turns}"
            composition.report(("evaluate", "turns"), message, allowed=(f"{least} to 8",))
        _check_needs(composition, built["method"], built.get("task", classes["task"]), roles)


def _check_needs(composition: Composition, method: Method, task: Any, roles: Sequence[str]) -> None:
    offered = task.styles | task.capabilities
    # its settings may leave it fewer than its class has, which check_pair has looked at
    for needed in () if isinstance(task, type) else sorted(method.requires - offered):
        message = f"{method.config.name} needs {needed}, which the task {task.name} with these settings does not offer"
        composition.report(("task",), message, allowed=tuple(sorted(offered)))
    for needed, setting in method.needs().items():
        if needed not in offered:
            message = f"this needs {needed}, which the task {task.name} does not offer"
            composition.report(_path(setting), message, allowed=tuple(sorted(offered)))
    allowed = (POLICY, *roles)
    for role, setting in method.roles().items():
        if role not in allowed:
            message = f"no model has the role {role!r}; add `models: {{{role}: …}}`"
            composition.report(_path(setting), message, allowed=allowed, nearest=nearest(role, allowed))


def _path(setting: str) -> tuple[str, ...]:
    return ("method", *setting.split("."))
