"""Commands whose launcher hands them to a queue instead of running them here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from reasonrun.cli.main import echo, print_json
from reasonrun.contracts import Submission
from reasonrun.ledger.catalogue import check_is_ours, finished_content
from reasonrun.ledger.files import Files
from reasonrun.recipe import ResolvedRecipe
from reasonrun.running import goes_further

_PROGRAM = (sys.executable, "-P", "-m", "reasonrun.cli.main")


def submitted_run(
    recipe: ResolvedRecipe, folder: Path, arguments: Sequence[str], *, once: Sequence[str] = (), as_json: bool
) -> bool:
    """Submit the command that makes one run, unless it runs here or has nothing to do.

    Args:
        recipe: names the launcher.
        folder: the run directory.
        arguments: the command line after ``reasonrun``, without ``once``.
        once: flags that a second start of the same job must not see again.
        as_json: print what was submitted as one JSON document.

    Returns:
        Whether the command is done: it was submitted, and how to follow it is printed.

    Raises:
        RunConflict: the folder holds something else, or is submitted already.
        EnvironmentProblem: the queue is missing, does not answer, or refuses.
    """
    is_over = finished_content(folder, Files()) is not None and not once and not goes_further(folder, recipe)
    return not is_over and submitted(recipe, folder, arguments, once=once, as_json=as_json, is_run=True)


def submitted(
    recipe: ResolvedRecipe,
    folder: Path,
    arguments: Sequence[str],
    *,
    once: Sequence[str] = (),
    as_json: bool,
    is_run: bool = False,
) -> bool:
    """``submitted_run`` for a folder that is not a single run's."""
    launcher = recipe.classes["launcher"]
    if not hasattr(launcher, "submit"):
        return False
    if is_run:
        check_is_ours(folder)
    submission = launcher(recipe.launcher).submit(arguments, once=once, folder=folder, program=_PROGRAM)
    if submission is None:
        return False
    _show(submission, folder, as_json=as_json)
    return True


def own_arguments() -> list[str]:
    """The command line of this process after ``reasonrun``, without ``--json``: a log is for people."""
    return [argument for argument in sys.argv[1:] if argument != "--json"]


def _show(submission: Submission, folder: Path, *, as_json: bool) -> None:
    if as_json:
        paths = {"script": str(submission.script), "log": str(submission.log)}
        print_json({"directory": str(folder), "job_id": submission.job_id, "queue": submission.queue, **paths})
        return
    echo(f"submitted: {submission.queue} job {submission.job_id}, which runs the same command")
    echo(f"script: {submission.script}")
    echo(f"log:    {submission.log}")
    for command in submission.follow:
        echo(f"follow: {command}")
