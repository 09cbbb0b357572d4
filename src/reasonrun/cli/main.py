"""The command line: one place where errors become messages and exit codes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from reasonrun import __version__
from reasonrun.cli.completion import complete_key, complete_override, complete_recipe, complete_task
from reasonrun.errors import EXIT_CODES, ExitCode, ReasonrunError
from reasonrun.report.printable import printable

app = typer.Typer(
    name="reasonrun",
    help="Run LLM self-training experiments from a recipe. The same command continues a stopped run.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
err = Console(stderr=True)

Recipe = Annotated[
    str, typer.Argument(help="A recipe file, or the name of a shipped recipe.", autocompletion=complete_recipe)
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: key=value.", autocompletion=complete_override)]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on standard output.")]


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", help="Run directory; default runs/<recipe>.")] = None,
    redo: Annotated[str | None, typer.Option("--redo", help="Set this step and all that depends on it aside.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Move steps that the recipe no longer reaches away.")] = False,
    accept_code: Annotated[bool, typer.Option("--accept-code", help="Keep rows that changed code made.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe, or continue its run."""
    from reasonrun.cli.train import train_command

    train_command(recipe, overrides or [], run, redo=redo, prune=prune, accept_code=accept_code, as_json=as_json)


@app.command()
def sweep(
    recipes: Annotated[
        str | None,
        typer.Argument(help="A recipe, or several with commas between them.", autocompletion=complete_recipe),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides: key=value, or key=a,b,c.", autocompletion=complete_override)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs; default runs/sweep-<name>.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of the runs that have ended.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Run every combination of values and recipes, sharing equal steps, and compare them over seeds."""
    from reasonrun.cli.sweep import SweepRequest, sweep_command

    request = SweepRequest(
        recipes=recipes,
        overrides=tuple(overrides or []),
        out=out,
        table_only=table,
        as_markdown=markdown,
        as_json=as_json,
    )
    raise typer.Exit(sweep_command(request))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    assume: Annotated[list[str] | None, typer.Option("--assume", help="Change an assumption: accuracy=0.3.")] = None,
    as_json: Json = False,
) -> None:
    """Rehearse a recipe without a model: its steps, counts, tokens, seconds and disk."""
    from reasonrun.cli.plan import plan_command

    plan_command(recipe, overrides or [], assume or [], as_json=as_json)


@app.command()
def check(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Validate a recipe; all errors at once, with their places."""
    from reasonrun.cli.check import check as check_command

    check_command(recipe, overrides or [], as_json=as_json)


@app.command()
def status(
    run: Annotated[Path | None, typer.Argument(help="Run directory; default: all under runs/.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run has done so far."""
    from reasonrun.cli.status import status_command

    status_command(run, as_json=as_json)


@app.command()
def samples(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    round_number: Annotated[int | None, typer.Option("--round", help="Only this round.", min=1)] = None,
    step: Annotated[str | None, typer.Option("--step", help="Only this step, or names that begin so.")] = None,
    verdict: Annotated[
        str | None,
        typer.Option("--verdict", help="correct, incorrect, ungraded, or a reason: wrong, no_answer, truncated …"),
    ] = None,
    min_tokens: Annotated[int | None, typer.Option("--min-tokens", help="Fewest tokens.", min=0)] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Most tokens.", min=0)] = None,
    problem: Annotated[
        str | None, typer.Option("--problem", help="Only the problem whose id begins so, through all rounds.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Rollouts to show at most.", min=1)] = 10,
    prompt: Annotated[bool, typer.Option("--prompt", help="Show the whole prompt too.")] = False,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="Include evaluations.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a model wrote and why it was scored so."""
    from reasonrun.cli.samples import samples_command
    from reasonrun.report.rollouts import RolloutFilters

    filters = RolloutFilters(
        round=round_number,
        step=step,
        verdict=verdict,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        problem=problem,
        evaluation=evaluation,
        limit=limit,
    )
    samples_command(run, filters, with_prompt=prompt, as_json=as_json)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the baseline.")],
    as_json: Json = False,
) -> None:
    """Compare runs with the first: recipes, scores item by item, and what they cost."""
    from reasonrun.cli.compare import compare_command

    compare_command(runs, as_json=as_json)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every file and every row, too.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether a run is as it was written; everything that is damaged at once. Changes nothing."""
    from reasonrun.cli.verify import verify_command

    raise typer.Exit(verify_command(run, deep=deep, as_json=as_json))


@app.command()
def repair(
    run: Annotated[Path, typer.Argument(help="Run directory, finished or not.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this only say what would be done.")] = False,
    as_json: Json = False,
) -> None:
    """Move what is damaged, and all that was made from it, to quarantine, so that train makes it again."""
    from reasonrun.cli.repair import repair_command

    raise typer.Exit(repair_command(run, do_it=yes, as_json=as_json))


@app.command(name="eval")
def evaluate(
    task: Annotated[str, typer.Argument(help="A task, such as arith or gsm8k.", autocompletion=complete_task)],
    overrides: Overrides = None,
    model: Annotated[str, typer.Option("--model", help="tiny, smollm2, a folder, or hub:owner/name.")] = "tiny",
    k: Annotated[int, typer.Option("--k", help="Samples per problem for pass@k and maj@k; 0 is greedy only.")] = 0,
    turns: Annotated[
        int, typer.Option("--turns", help="Attempts in a row; the later ones are asked to correct the one before.")
    ] = 1,
    split: Annotated[str, typer.Option("--split", help="train, dev or test.")] = "test",
    num_problems: Annotated[int, typer.Option("--num-problems", help="Only the first so many; 0 is all.")] = 0,
    style: Annotated[str, typer.Option("--style", help="The task's prompt style.")] = "plain",
    engine: Annotated[str, typer.Option("--engine", help="hf or scripted.")] = "hf",
    data: Annotated[str, typer.Option("--data", help="File of items, for tasks that read one: task.data.")] = "",
    run: Annotated[Path | None, typer.Option("--run", help="Directory of the results.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model: greedy accuracy, pass@k, maj@k, with 95 % intervals and every item kept."""
    from reasonrun.cli.evaluate import EvalRequest, eval_command

    request = EvalRequest(
        task=task,
        overrides=tuple(overrides or []),
        model=model,
        k=k,
        turns=turns,
        split=split,
        num_problems=num_problems,
        style=style,
        engine=engine,
        directory=run,
        data=data,
    )
    eval_command(request, as_json=as_json)


@app.command()
def recipes(
    action: Annotated[str | None, typer.Argument(help="copy, to copy a recipe out.")] = None,
    name: Annotated[str | None, typer.Argument(help="The recipe to copy.", autocompletion=complete_recipe)] = None,
    destination: Annotated[Path | None, typer.Argument(help="Where to.")] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or copy one out to edit."""
    from reasonrun.cli.recipes import recipes as recipes_command

    recipes_command(action, name, destination, as_json=as_json)


@app.command()
def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A field such as sft.lr, a section, a plug-in, or an exit code.", autocompletion=complete_key
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of --recipe: key=value.", autocompletion=complete_override)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Only what this recipe has, with its value.", autocompletion=complete_recipe),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
    as_json: Json = False,
) -> None:
    """Explain a field of recipes or an exit code: what it means, takes, and does when changed."""
    from reasonrun.cli.explain import explain_command

    explain_command(key, overrides or [], recipe=recipe, schema=schema, as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine has and what a run here would use."""
    from reasonrun.cli.doctor import doctor_command

    doctor_command(as_json=as_json)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def echo(line: str) -> None:
    """Print to standard output what a terminal shows and never obeys."""
    typer.echo(printable(line))


def print_json(document: Any) -> None:
    """The one JSON document of ``--json``; ASCII, so that no text in it can steer the terminal that shows it."""
    typer.echo(json.dumps(document, ensure_ascii=True, indent=2, sort_keys=True))


def main() -> None:
    """Entry point. A user's mistake prints a message, never a traceback."""
    as_json = "--json" in sys.argv
    try:
        sys.exit(app(standalone_mode=not as_json))
    except KeyboardInterrupt:  # a second Ctrl-C: workers are dead, what is committed is safe
        sys.exit(ExitCode.INTERRUPTED)
    except typer.TyperException as error:  # an unknown option, a missing argument
        print_json({"error": "UsageError", "message": error.format_message(), "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    except ReasonrunError as error:
        if as_json:
            print_json(error_document(error))
        else:
            label = EXIT_CODES[ExitCode(error.exit_code)].label
            err.print(printable(f"{label}: {error}"), markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()
        sys.exit(error.exit_code)


def error_document(error: ReasonrunError) -> dict[str, Any]:
    """What ``--json`` prints about an error; every mistake of a recipe by itself too."""
    document = {"error": type(error).__name__, "message": printable(str(error)), "exit_code": error.exit_code}
    problems = [asdict(problem) for problem in getattr(error, "problems", ())]
    return {**document, "problems": problems} if problems else document


if __name__ == "__main__":
    main()
