"""``reasonrun check``."""

from __future__ import annotations

from typing import Any

import typer

from reasonrun.cli.main import echo, error_document, print_json
from reasonrun.recipe import ResolvedRecipe, load
from reasonrun.recipe_errors import RecipeProblems
from reasonrun.recipe_source import label_of


def check(recipe: str, overrides: list[str], *, as_json: bool) -> None:
    """Validate a recipe and print one line about it, or all its mistakes (exit code 2).

    Raises:
        RecipeError: the recipe has mistakes; with ``as_json`` they are printed and only the exit code remains.
    """
    try:
        resolved = load(recipe, overrides)
    except RecipeProblems as error:
        if not as_json:
            raise
        print_json({"ok": False, **error_document(error)})
        raise typer.Exit(error.exit_code) from None
    if as_json:
        print_json({"ok": True, "name": resolved.name, "slug": resolved.slug, "resolved": resolved.resolved})
        return
    echo(f"OK {label_of(resolved.source_path)}: {summary(resolved)}")


def summary(recipe: ResolvedRecipe) -> str:
    """The parts that a recipe puts together, in one line."""
    parts: dict[str, Any] = {section: recipe.resolved[section]["name"] for section in ("method", "task", "engine")}
    parts["model"] = recipe.model.name or recipe.model.path or recipe.model.hub
    for role, model in recipe.further_models.items():
        parts[role] = model.endpoint.model if model.endpoint else model.name or model.path or model.hub
    parts["launcher"] = recipe.resolved["launcher"]["name"]
    if recipe.trackers:
        parts["trackers"] = "+".join(tracker["name"] for tracker in recipe.resolved["trackers"])
    parts["seed"] = recipe.seed
    return ", ".join(f"{name} {value}" for name, value in parts.items())
