"""Where recipes are: those that ship with the package, and those that a user names."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from reasonrun.errors import RecipeError
from reasonrun.recipe_errors import nearest


@cache
def recipes_dir() -> Path:
    """The folder of the shipped recipes: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return folder
    raise RecipeError("the shipped recipes are missing from this installation", hint="install reasonrun again")


def shipped() -> tuple[str, ...]:
    """Names of the shipped recipes, sorted."""
    return tuple(sorted(path.stem for path in recipes_dir().glob("*.yaml")))


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe, given as a path or as the name of a shipped one.

    Raises:
        RecipeError: there is no such file and no such recipe.
    """
    path = Path(recipe)
    try:
        found = path.is_file()
    except OSError as error:  # a name too long for a file
        raise RecipeError(f"{str(recipe)[:80]!r} … cannot be a recipe: {error.strerror}") from None
    if found:
        return path
    if str(recipe) in shipped():
        return recipes_dir() / f"{recipe}.yaml"
    if path.is_dir():
        raise RecipeError(f"{recipe} is a folder", hint="name a recipe file in it")
    here = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.suffix else []
    guess = nearest(str(recipe), here) or nearest(path.stem, shipped())
    also = f"; nearest is {guess}" if guess else ""
    raise RecipeError(
        f"there is no recipe {str(recipe)!r}{also}. Shipped: {', '.join(shipped())}",
        hint="give a file, or a shipped recipe by its bare name; `reasonrun recipes` says what each is for",
    )
