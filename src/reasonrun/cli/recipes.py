"""``reasonrun recipes``."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from reasonrun.cli.main import echo, print_json
from reasonrun.errors import RecipeError
from reasonrun.recipe_errors import nearest
from reasonrun.recipe_files import recipes_dir, shipped
from reasonrun.recipe_schema import EDITOR_LINE, SCHEMA_FILE, schema_text


def recipes(action: str | None, name: str | None, destination: Path | None, *, as_json: bool) -> None:
    """List the shipped recipes, or copy one out to edit.

    Args:
        action: None to list, ``copy`` to copy.
        name: the recipe to copy.
        destination: a file or a folder; the current folder by default.
        as_json: print one JSON document.

    Raises:
        RecipeError: an unknown action or recipe, or a file in the way: nothing is overwritten.
    """
    if action is None:
        purposes = {known: first_sentence(recipes_dir() / f"{known}.yaml") for known in shipped()}
        if as_json:
            print_json({"recipes": [{"name": known, "purpose": purpose} for known, purpose in purposes.items()]})
            return
        width = max((len(known) for known in purposes), default=0)
        for known, purpose in purposes.items():
            echo(f"{known:{width}}  {purpose}")
        return
    if action != "copy" or name is None:
        raise RecipeError(
            f"reasonrun recipes {action}: not understood",
            hint="write `reasonrun recipes` for the list, `reasonrun recipes copy NAME [DESTINATION]` for a copy",
        )
    target = copy_recipe(name, destination or Path())
    if as_json:
        print_json({"copied": name, "to": str(target)})
    else:
        echo(f"copied {name} to {target}; check it with `reasonrun check {target}`")


def copy_recipe(name: str, destination: Path) -> Path:
    """Copy a shipped recipe to a file or into a folder; group files stay where they are and are still found.

    Its first line names the JSON schema to editors; the schema is put beside it unless there is one.

    Raises:
        RecipeError: no such recipe, no such folder, or the file exists.
    """
    if name not in shipped():
        guess = nearest(name, shipped())
        also = f"; nearest is {guess}" if guess else ""
        raise RecipeError(f"no shipped recipe is named {name!r}{also}", hint=f"there are {', '.join(shipped())}")
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    content = (recipes_dir() / f"{name}.yaml").read_bytes()
    try:
        with target.open("xb") as copy:
            copy.write(EDITOR_LINE.encode() + content)
        with suppress(FileExistsError), (target.parent / SCHEMA_FILE).open("x", encoding="utf-8") as file:
            file.write(schema_text())
    except FileExistsError:
        raise RecipeError(f"{target} exists already", hint="name another destination; nothing is overwritten") from None
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error.strerror}", hint="name a folder that exists") from None
    return target


def first_sentence(path: Path) -> str:
    """The first sentence of the comment at the top of a recipe, or an empty text."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").rstrip())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", " ".join(comment), maxsplit=1)[0]
