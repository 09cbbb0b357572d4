"""``reasonrun explain``."""

from __future__ import annotations

import re
import signal
import textwrap
from dataclasses import asdict

import typer

from reasonrun.cli.main import echo, print_json
from reasonrun.errors import EXIT_CODES, ExitCode, ExitMeaning, RecipeError

_HINT = "write a field such as sft.lr, a section such as engine, a plug-in such as star, or an exit code such as 4"
_WIDTH = 110
_CODE = re.compile(r"(?:exit(?: ?code)? ?)?(\d+)", re.IGNORECASE)
_KILLED = 128  # what a shell adds to the number of the signal that ended a command


def explain_command(key: str | None, overrides: list[str], *, recipe: str | None, schema: bool, as_json: bool) -> None:
    """Explain a field of recipes or an exit code, or print the schema of recipes.

    Args:
        key: a field by its path or the end of it, a section, a plug-in by its name, or an exit code.
        overrides: changes of ``recipe``.
        recipe: narrows to what this recipe has, and shows the value there.
        schema: print the JSON schema of recipes instead.
        as_json: print one JSON document.

    Raises:
        RecipeError: there is no such field or code; or the recipe has mistakes.
    """
    if schema:
        from reasonrun.recipe_schema import schema_text

        typer.echo(schema_text(), nl=False)
    elif key is None:
        raise RecipeError("explain: no field or exit code is named", hint=_HINT)
    elif code := _CODE.fullmatch(" ".join([key, *overrides])):
        _explain_code(int(code[1]), as_json=as_json)
    elif overrides and recipe is None:
        raise RecipeError(f"explain: {overrides[0]} changes a recipe, and none is named", hint="add --recipe RECIPE")
    else:
        from reasonrun.cli.explain_field import explain_field

        explain_field(key.partition("=")[0], overrides, recipe, as_json=as_json)


def _explain_code(code: int, *, as_json: bool) -> None:
    meaning = exit_meaning(code)
    if as_json:
        print_json({"exit_code": code, **asdict(meaning)})
        return
    echo(f"exit {code}: {meaning.label}")
    for line in textwrap.wrap(meaning.meaning, _WIDTH, initial_indent="  ", subsequent_indent="  "):
        echo(line)
    for remedy in meaning.remedies:
        echo(f"  - {remedy}")


def exit_meaning(code: int) -> ExitMeaning:
    """What an exit code means, also one that a shell makes of a signal.

    Raises:
        RecipeError: no command ends with it.
    """
    if code in set(ExitCode):
        return EXIT_CODES[ExitCode(code)]
    if code - _KILLED in set(signal.Signals):
        name = signal.Signals(code - _KILLED).name
        remedies: tuple[str, ...] = ("the same command continues it",)
        if name == "SIGKILL":
            remedies = (*remedies, "Linux kills what takes the last memory: `dmesg | grep -i oom` says so")
        return ExitMeaning(
            label="killed",
            meaning=f"{name} ended the command before it could say anything. What is committed is safe.",
            remedies=remedies,
        )
    known = ", ".join(str(int(known)) for known in ExitCode)
    raise RecipeError(f"no command ends with the exit code {code}; there are {known}")
