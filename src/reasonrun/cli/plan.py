"""``reasonrun plan``."""

from __future__ import annotations

from pydantic import ValidationError

from reasonrun.cli.main import echo, print_json
from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import RecipeError
from reasonrun.planning import Assumptions, format_plan, plan
from reasonrun.recipe import load


def plan_command(recipe: str, overrides: list[str], assume: list[str], *, as_json: bool) -> None:
    """Print the plan of a recipe as a table or as one JSON document."""
    outcome = plan(load(recipe, overrides), parse_assumptions(assume), SilentProgress())
    if as_json:
        print_json(outcome.to_json())
        return
    for line in format_plan(outcome):
        echo(line)


def parse_assumptions(pairs: list[str]) -> Assumptions:
    """``key=value`` pairs over the defaults. Raises RecipeError that lists the keys."""
    given = dict(pair.partition("=")[::2] for pair in pairs)
    try:
        return Assumptions.model_validate(given)
    except ValidationError as error:
        known = ", ".join(f"{key} ({info.default:g})" for key, info in Assumptions.model_fields.items())
        first = error.errors()[0]
        raise RecipeError(
            f"--assume {'.'.join(map(str, first['loc']))}: {first['msg']}", hint=f"assumptions: {known}"
        ) from None
