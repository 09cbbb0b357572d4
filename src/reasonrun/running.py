"""One run from recipe to result: open the directory, call the method, measure, finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonrun.code_digest import code_changed, code_digests, versions
from reasonrun.conditions import conditions
from reasonrun.contracts import Task
from reasonrun.errors import Finding, RecipeError, RunConflict, Stopped
from reasonrun.hosts import engine_is_scripted, further_models, scripted_host, with_endpoints
from reasonrun.lab import Lab
from reasonrun.ledger.borrowing import CONDITIONS, Donors
from reasonrun.ledger.catalogue import holds_work, run_identity
from reasonrun.ledger.run_dir import RunDir
from reasonrun.models import resolve
from reasonrun.preflight import preflight
from reasonrun.recipe import FieldChange, ResolvedRecipe, diff
from reasonrun.records import Checkpoint, Problem
from reasonrun.rendering import Renderer
from reasonrun.settings import Effect
from reasonrun.verbs.context import Context, Progress
from reasonrun.verbs.evaluating import Evaluation
from reasonrun.worker_host import WorkerHost


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line adds to a recipe; none of it changes the experiment."""

    directory: Path
    command: str = "reasonrun train"
    redo: str | None = None
    prune: bool = False
    accept_code: bool = False
    donors: tuple[Path, ...] = ()  # runs from which equal steps are taken instead of made again
    interrupted: Callable[[], int] = lambda: 0  # the exit code of a stop that was asked for, or 0
    on_row: Callable[[dict[str, Any]], None] = lambda row: None


@dataclass(kw_only=True)
class Outcome:
    """How a run ended: its directory, its result, the metrics of every step, and whether any work was done."""

    directory: Path
    result: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    already_finished: bool = False


def run(recipe: ResolvedRecipe, options: RunOptions, progress: Progress) -> Outcome:
    """Run the recipe in ``options.directory``, or continue what is there.

    Raises:
        RunConflict: another process owns the directory, or recipe or code changed under the run.
        Finding: the experiment ended without a model worth keeping; what was committed stays.
        Stopped: a signal arrived; the same command continues.
    """
    further = goes_further(options.directory, recipe)
    method = recipe.classes["method"]
    given = (
        None if (options.directory / "run.json").exists() else inputs(recipe)
    )  # a mistake in them leaves no run behind
    with RunDir.open(
        options.directory,
        identity={"recipe": recipe.resolved},
        command=options.command,
        attempt={
            "code": code_digests(method, recipe.classes["task"]),
            "versions": versions(),
            CONDITIONS: conditions(recipe),
            "endpoints": _endpoints(recipe),  # read by report/spending.py
        },
        reopen=options.redo is not None or further,
    ) as run_dir:
        # A step that is still to be made can be named, too, to say that it is meant to be made by the changed recipe.
        moved: list[str] = []
        if options.redo and (options.redo in run_dir.steps() or not diff(run_dir.identity["recipe"], recipe)):
            moved = run_dir.redo(options.redo)
            progress.say(f"to quarantine: {', '.join(moved) or 'nothing, its files are gone'}")
        if run_dir.finished is not None and not further:
            _refuse_other_recipe(run_dir, recipe)
            return Outcome(directory=options.directory, result=run_dir.finished, already_finished=True)
        for orphan in run_dir.ended_orphans:
            progress.say(f"ended what an earlier attempt had left behind: {orphan}")
        context = make_context(recipe, run_dir, progress, options, *(given or inputs(recipe)))
        context.recipe_changes = _changes(run_dir, recipe, options, progress)
        context.takes_changes_at = "*" if moved else options.redo or ""
        with closing(context.host), _tracking(context, recipe):
            return _run(context, recipe, options)


@contextmanager
def _tracking(context: Context, recipe: ResolvedRecipe) -> Iterator[None]:
    """Exporters beside the run; they read what it commits, and their end is not its end."""
    trackers = [cls(settings) for cls, settings in zip(recipe.classes["trackers"], recipe.trackers, strict=True)]
    with ExitStack() as stack:
        for tracker in trackers:
            tracker.start(context.run_dir.path, recipe.resolved)
            stack.callback(tracker.finish)
        if trackers:
            own = context.on_row

            def log(row: dict[str, Any]) -> None:
                own(row)
                for tracker in trackers:
                    tracker.log(row)

            context.on_row = log
        yield


def inputs(recipe: ResolvedRecipe) -> tuple[Task, Checkpoint]:
    """Task and base, with every problem read: what is missing at the end is said at the beginning."""
    task, base = recipe.classes["task"](recipe.task), resolve(recipe.model)
    measured = getattr(recipe.method, "split", None)  # of a method that trains nothing
    for split in ("train", "dev", "test") if recipe.classes["method"].trains else filter(None, [measured]):
        task.problems(split)
    return task, base


def make_context(
    recipe: ResolvedRecipe, run_dir: RunDir, progress: Progress, options: RunOptions, task: Task, base: Checkpoint
) -> Context:
    """Everything that the verbs need for one attempt."""
    renderer = Renderer.load(Path(base.path))
    problems: dict[str, Problem] = {}

    def check_stop() -> None:
        exit_code = options.interrupted()
        if exit_code:
            raise Stopped(
                f"stopped; what is committed in {options.directory} is safe",
                exit_code=exit_code,
                hint="the same command continues this run",
            )

    if engine_is_scripted(recipe):
        host: Any = scripted_host(recipe.engine, task, problems, renderer)
    else:
        host = WorkerHost(recipe, run_dir, options.interrupted)
    return Context(
        run_dir=run_dir,
        recipe=recipe,
        task=task,
        grader=task.grader(),
        renderer=renderer,
        base=base,
        models=further_models(recipe),
        host=with_endpoints(host, recipe, check_stop),
        progress=progress,
        check_stop=check_stop,
        accept_code=options.accept_code,
        code_changed=not options.accept_code
        and code_changed(run_dir.earlier_attempts, recipe.classes["method"], recipe.classes["task"]),
        problems_by_id=problems,
        on_row=options.on_row,
        donors=Donors(run_dir.path, options.donors, conditions(recipe), run_dir.files) if options.donors else None,
    )


def _run(context: Context, recipe: ResolvedRecipe, options: RunOptions) -> Outcome:
    lab = Lab(context)
    method = recipe.classes["method"](recipe.method)
    try:
        method.before(lab)
        preflight(lab, method, recipe.preflight)
        last = method.run(lab)
        result = conclude(lab, last) if method.trains else measured(lab)
        findings = method.findings(lab)
        if findings:
            result["findings"] = findings
    except Finding as finding:
        finding.hint = "\n  ".join(filter(None, [finding.hint, _best_so_far(lab)]))
        raise
    run_dir = context.run_dir
    run_dir.write_projection("metrics.jsonl", context.rows)  # before anything is pruned: it names what is there
    unreached, states = run_dir.unreached(), run_dir.steps()
    committed = sorted(name for name in unreached if states[name] == "committed")
    if unreached and options.prune:
        run_dir.prune(unreached)  # those that were only begun, too: their inputs leave
    elif committed:
        context.progress.say(
            f"{len(committed)} committed steps are not part of this recipe any more and are left out of every report:"
            f" {', '.join(committed[:5])}. --prune removes them"
        )
    run_dir.finish(result)
    return Outcome(directory=run_dir.path, result=result, rows=context.rows)


def conclude(lab: Lab, last: Checkpoint) -> dict[str, Any]:
    """Dev of the last policy, then test once for the base, the last, the dev-selected checkpoint, and those that the
    method nominated."""
    with lab.scope("final", trainings=len(lab.evaluations)):  # more rounds later are another end of the run
        lab.evaluate(last)
        dev = _of_policies(lab)
        best = _best(dev)
        chosen = {"base": lab.base, "last": last, "best": best.policy, **lab.nominees}
        tests: dict[str, Evaluation] = {}
        for name, policy in chosen.items():
            twin = next((e for e in tests.values() if e.policy.weights == policy.weights), None)
            if lab.is_rehearsal and name not in (
                "base",
                "last",
            ):  # a real run may choose others than the rehearsal does
                with lab.only_possible():
                    twin = lab.evaluate(policy, split="test", name=f"test-{name}")
            tests[name] = twin or lab.evaluate(policy, split="test", name=f"test-{name}")
    return {
        "last": _checkpoint(last),
        "best": _checkpoint(best.policy),
        "selected_by": best.step,
        **({"nominees": {name: _checkpoint(made) for name, made in lab.nominees.items()}} if lab.nominees else {}),
        "test": {name: evaluation.metrics for name, evaluation in tests.items()},
    }


def measured(lab: Lab) -> dict[str, Any]:
    """The result of a method that trains nothing: its last evaluation."""
    evaluation = lab.evaluations[-1]
    return {"policy": _checkpoint(evaluation.policy), "step": evaluation.step, **evaluation.metrics}


def _best(dev: Sequence[Evaluation]) -> Evaluation:
    """The earliest of the best on dev; the last one where dev tells nothing."""
    measured = [evaluation for evaluation in dev if evaluation.is_measured]
    return max(measured, key=lambda evaluation: evaluation.rank) if measured else dev[-1]


def _of_policies(lab: Lab) -> list[Evaluation]:
    """The evaluations of what the run may end with: a judge or teacher that was measured, too, was not trained here."""
    return [e for e in lab.evaluations if e.policy.step or e.policy.weights == lab.base.weights]


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"step": checkpoint.step or "base", "weights": checkpoint.weights}


def _best_so_far(lab: Lab) -> str:
    evaluations = _of_policies(lab)
    if not evaluations:
        return ""
    best = _best(evaluations)
    where = best.policy.path if best.policy.step else "the base model"
    return f"best model so far: {where} ({best.step}, {best.headline:.1%} on {best.split})"


def _changes(run_dir: RunDir, recipe: ResolvedRecipe, options: RunOptions, progress: Progress) -> list[str]:
    """Recipe fields that differ from the run's own and must stop it at the first step to work on, as text.

    A horizon that grew, or shrank under ``--prune``, is taken over; numeric changes are noted; operational ones free. A
    run that has done nothing but read problems takes every change, and says so.
    """
    stopping, moved = [], False
    for change in diff(run_dir.identity["recipe"], recipe):
        if change.effect is Effect.SEMANTIC or (_smaller(change) and not options.prune):
            hint = "; --prune lets it shrink" if change.effect is Effect.HORIZON else ""
            stopping.append(f"{_described(change)}{hint}")
        elif change.effect is Effect.HORIZON:
            moved = True
        elif change.effect is Effect.NUMERIC:
            progress.say(f"{_described(change)}: this run is no longer comparable bit for bit")
    if stopping and not holds_work(run_dir.path):  # a mistake was corrected before it cost anything
        progress.say(f"nothing was made yet in {run_dir.path}, so it takes the changed recipe:")
        for line in stopping:
            progress.say(f"  {line}")
        run_dir.set_aside(run_dir.steps())
        stopping, moved = [], True
    if moved and not stopping:
        run_dir.amend({"recipe": recipe.resolved})
    return stopping


def goes_further(directory: Path, recipe: ResolvedRecipe) -> bool:
    """Whether the recipe asks a run in ``directory``, finished or not, for more of the same."""
    if not (directory / "run.json").exists():
        return False
    changes = [
        c for c in diff(run_identity(directory)["recipe"], recipe) if c.effect in (Effect.SEMANTIC, Effect.HORIZON)
    ]
    return bool(changes) and all(c.effect is Effect.HORIZON and not _smaller(c) for c in changes)


def _smaller(change: FieldChange) -> bool:
    return (
        change.effect is Effect.HORIZON
        and isinstance(change.old, int)
        and isinstance(change.new, int)
        and change.new < change.old
    )


def _described(change: FieldChange) -> str:
    return f"{change.path}: {change.old!r} -> {change.new!r} ({change.effect})"


def _endpoints(recipe: ResolvedRecipe) -> dict[str, dict[str, Any]]:
    """Models and prices of endpoints by role: prices may change under a run, and reports take the last ones."""
    fields = {"model", "prompt_price", "completion_price"}
    found = recipe.further_models.items()
    return {role: model.endpoint.model_dump(mode="json", include=fields) for role, model in found if model.endpoint}


def _refuse_other_recipe(run_dir: RunDir, recipe: ResolvedRecipe) -> None:
    changes = [c for c in diff(run_dir.identity["recipe"], recipe) if c.effect in (Effect.SEMANTIC, Effect.HORIZON)]
    if changes:
        lines = "\n  ".join(_described(change) for change in changes[:10])
        raise RunConflict(
            f"{run_dir.path} holds a finished run of another recipe:\n  {lines}",
            hint="give this one a directory of its own with --run NEW, or revert the change",
        )


def run_directory(recipe: ResolvedRecipe, given: Path | None) -> Path:
    """``--run DIR``, or ``runs/<recipe>[-<override slug>]`` under the current folder."""
    if given is not None:
        if given.exists() and not given.is_dir():
            raise RecipeError(f"--run {given}: that is a file", hint="name a folder")
        return given
    name = recipe.name if not recipe.slug else f"{recipe.name}-{recipe.slug}"
    return Path("runs") / name
