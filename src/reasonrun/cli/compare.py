"""``reasonrun compare``."""

from __future__ import annotations

from pathlib import Path

from reasonrun.cli.main import echo, print_json
from reasonrun.errors import RecipeError
from reasonrun.report.comparison import compare_runs, cost
from reasonrun.report.comparison_text import comparison_document, describe_comparison, describe_costs
from reasonrun.report.run_record import open_run


def compare_command(runs: list[Path], *, as_json: bool) -> None:
    """Compare every run with the first. Reads only; never takes a lock."""
    if len(runs) < 2:
        raise RecipeError("compare needs two runs or more", hint="reasonrun compare BASELINE RUN [RUN …]")
    twice = [str(path) for n, path in enumerate(runs) if path.resolve() in {earlier.resolve() for earlier in runs[:n]}]
    if twice:
        raise RecipeError(f"{', '.join(twice)} is named twice: a run does not differ from itself")
    records = [open_run(path) for path in runs]
    comparisons = [compare_runs(records[0], other) for other in records[1:]]
    costs = [cost(record) for record in records]
    if as_json:
        print_json(comparison_document(records, costs, comparisons))
        return
    for other, comparison in zip(records[1:], comparisons, strict=True):
        for line in [*describe_comparison(records[0], other, comparison), ""]:
            echo(line)
    for line in describe_costs(records, costs):
        echo(line)
