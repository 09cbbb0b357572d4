"""The JSON schema of recipes, for editors, and the types of their fields in words.

A recipe may be a part of one: it names a parent or group files in ``defaults`` and states what differs. So nothing is
required here; whether a recipe is complete, and what its values ask of each other, says ``reasonrun check``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from reasonrun import plugins
from reasonrun.recipe_errors import models_in
from reasonrun.recipe_fields import ModelSettings, RecipeField, RoleModelSettings, fields_of, recipe_model
from reasonrun.recipe_files import recipes_dir
from reasonrun.recipe_values import SECTIONS

DIALECT = "http://json-schema.org/draft-07/schema#"
SCHEMA_FILE = "recipe.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
"""How a recipe names the schema beside it to an editor."""

_REFERENCE = {"$ref": "#/definitions/reference"}
_REFERENCE_TEXT = {
    "type": "string",
    "pattern": r"\$\{",
    "description": "Another value, ${section.key}, or the environment, ${oc.env:NAME}.",
}
_DOTTED = {"type": "string", "pattern": r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$", "description": "A class of your own."}
_TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
_MAX_LINE = 320
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def schema_text() -> str:
    """The schema as the text of a file."""
    return _laid_out(recipe_schema(), "") + "\n"


def _laid_out(value: Any, indent: str) -> str:
    """JSON with what fits on a line on one, so that a changed field is a changed line."""
    compact = json.dumps(value, ensure_ascii=True)
    if len(indent) + len(compact) <= _MAX_LINE or not isinstance(value, dict | list):
        return compact
    inner = indent + " "
    if isinstance(value, list):
        items = [f"{inner}{_laid_out(item, inner)}" for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    items = [f"{inner}{json.dumps(key)}: {_laid_out(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def recipe_schema() -> dict[str, Any]:
    """The schema of recipe files: every built-in plug-in, every field with its type, default and meaning."""
    definitions: dict[str, Any] = {"reference": _REFERENCE_TEXT}
    properties: dict[str, Any] = {"defaults": _defaults_schema()}
    for section, kind in SECTIONS.items():
        if kind:
            properties[section] = _plugin_schema(section, kind, definitions)
        else:
            properties[section] = _by_word("The base policy.", ModelSettings, definitions)
    whole = recipe_model({}, ())
    about = dict(fields_of(whole))
    properties["models"] = {
        "description": about["models"].description,
        "type": "object",
        "propertyNames": {"pattern": "^[a-z][a-z0-9_]*$"},
        "additionalProperties": _by_word("A further model.", RoleModelSettings, definitions),
    }
    properties["trackers"] = {
        "description": about["trackers"].description,
        "type": "array",
        "items": _plugin_schema("tracker", "trackers", definitions),
    }
    rest = group_schema(whole)["properties"]
    properties |= {name: rest[name] for name in ("preflight", "seed", "evaluate")}
    return {
        "$schema": DIALECT,
        "title": "Recipe of reasonrun",
        "description": "Method, task, model and engine of one experiment; `reasonrun check` says whether it is complete.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "definitions": definitions,
    }


def group_schema(model: type[BaseModel], *, instance: BaseModel | None = None) -> dict[str, Any]:
    """The schema of a group of fields.

    Args:
        model: its settings class.
        instance: the default that the group has where it stands; its values are the fields' defaults there.
    """
    known = dict(fields_of(model, instance=instance))
    properties = {}
    for name, info in model.model_fields.items():
        default = getattr(instance, name) if instance is not None else _default(info)
        properties[name] = _property(known[name], info, default)
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})


def _property(known: RecipeField, info: FieldInfo, default: Any) -> dict[str, Any]:
    about: dict[str, Any] = {"description": "Which."}
    if known.description:
        about["description"] = f"{known.description} (Changed under a run: {known.effect}.)"
    if not info.is_required():
        about["default"] = TypeAdapter(Any).dump_python(known.default, mode="json")
    groups = list(models_in(info.annotation))
    if not groups:
        return about | _or_reference(value_schema(info))
    options = [group_schema(group, instance=default if isinstance(default, group) else None) for group in groups]
    if type(None) in get_args(info.annotation):
        options.append({"type": "null"})
    return about | (options[0] if len(options) == 1 else {"anyOf": options})


def _or_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema``, or a text that stands for a value of it; a list cannot be referred to, what is in it can."""
    if schema.get("type") in ("array", "object"):
        return schema | ({"items": _or_reference(schema["items"])} if schema.get("items") else {})
    options = [
        _or_reference(option) if option.get("type") == "array" else option for option in schema.get("anyOf", [schema])
    ]
    takes_any_text = any(
        option.get("type") == "string" and option.keys() <= {"type", "minLength"} for option in options
    )
    if not takes_any_text:
        options.append(_REFERENCE)
    return options[0] if len(options) == 1 else {"anyOf": options}


def _plugin_schema(section: str, kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """A plug-in: its name alone, or a group whose ``name`` decides about the other keys.

    Without ``name``, which then comes from a parent or a group file, the keys must be those of one of them.
    """
    names = plugins.names(kind)
    references = {name: {"$ref": f"#/definitions/{section}.{name}"} for name in names}
    for name in names:
        settings = plugins.settings_class(kind, name, plugins.find(kind, name))
        definitions[f"{section}.{name}"] = {"title": f"{section} {name}", **group_schema(settings)}
    word = {"anyOf": [{"enum": list(names)}, _DOTTED]}
    cases: list[dict[str, Any]] = [
        {"if": {"required": ["name"], "properties": {"name": {"const": name}}}, "then": reference}
        for name, reference in references.items()
    ]
    cases.append({"if": {"not": {"required": ["name"]}}, "then": {"anyOf": list(references.values())}})
    about = f"The {section}: its name, or a group with its name and settings."
    group = {"type": "object", "properties": {"name": {"description": f"Which {section}.", **word}}, "allOf": cases}
    return {"description": about, "anyOf": [*word["anyOf"], group]}


def _by_word(about: str, model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """A model: the name of one that comes as a package, or a group."""
    definitions[model.__name__] = group_schema(model)
    name = value_schema(model.model_fields["name"])["anyOf"][0]
    return {"description": about, "anyOf": [name, {"$ref": f"#/definitions/{model.__name__}"}]}


def _defaults_schema() -> dict[str, Any]:
    groups = sorted({path.parent.name for path in recipes_dir().glob("*/*.yaml")})
    choices = {group: sorted(path.stem for path in recipes_dir().glob(f"{group}/*.yaml")) for group in groups}
    choice = {group: {"anyOf": [{"enum": [*names, None]}, {"type": "string"}]} for group, names in choices.items()}
    choices_of_groups = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": choice | {f"override {group}": value for group, value in choice.items()},
        "additionalProperties": {"type": ["string", "null"]},
    }
    return {
        "description": "What is laid below this recipe, in order: a parent recipe by its name, files of groups; _self_ is"
        " the recipe itself.",
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, choices_of_groups]},
    }


def value_schema(info: FieldInfo) -> dict[str, Any]:
    """The schema of one field's value, without groups' fields."""
    constrained: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    schema = TypeAdapter(constrained).json_schema()
    definitions = schema.pop("$defs", {}) | {"JsonValue": {}}  # any JSON is what no schema forbids
    named: dict[str, Any] = _inlined(schema, definitions)
    return {key: value for key, value in named.items() if key not in ("title", "description")}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def type_in_words(info: FieldInfo) -> str:
    """What a field takes: ``whole number, at least 1``, ``base or previous``."""
    if next(models_in(info.annotation), None):
        return "group of fields" + (" or null" if type(None) in get_args(info.annotation) else "")
    return _words(value_schema(info))


def _words(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return _either(_words(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _either(_written(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        least = schema.get("minItems")
        items = _words(schema["items"]) if schema.get("items") else "anything"
        return f"list, each {items}" + (f"; at least {least}" if least else "")
    if schema.get("type") == "object":
        return "keys and values"
    bounds = [words.format(_written(schema[key])) for key, words in _BOUNDS.items() if key in schema]
    if schema.get("minLength"):
        bounds.append("not empty")
    if "pattern" in schema:
        bounds.append(f"as {schema['pattern']}")
    return ", ".join([_TYPES.get(schema.get("type", ""), "anything"), *bounds])


def _either(options: Iterable[str]) -> str:
    listed = list(options)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"


def _written(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
