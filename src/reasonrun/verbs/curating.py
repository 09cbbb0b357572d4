"""``curate``: a pure function from one problem's rows to examples, with a reason for every row left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from reasonrun.curate.group import Group
from reasonrun.errors import RecipeError, RunConflict, RunFailed
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.records import Example, Graded, LeftOut, Problem, Segment, SFTExample, digest
from reasonrun.samples import ExampleSet, Extent, GradedSet, ProblemSet
from reasonrun.sets import Rows
from reasonrun.verbs.context import Context, PlannedStep

Curation = Callable[..., Iterator[Example | LeftOut]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateJob:
    name: str
    function: Curation
    sets: tuple[GradedSet | ProblemSet, ...]
    params: dict[str, Any]

    @property
    def graded(self) -> tuple[GradedSet, ...]:
        return tuple(rows for rows in self.sets if isinstance(rows, GradedSet))

    @property
    def dotted(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


def curate(ctx: Context, job: CurateJob) -> ExampleSet:
    """Run or replay one curation step.

    Raises:
        RecipeError: the function is a lambda or a bound method, or carries no version.
        RunConflict: changed code chooses other rows than the committed ones.
        RunFailed: the function lost or repeated a row.
    """
    version = _version(job)
    fingerprint = {
        "verb": "curate",
        "function": job.dotted,
        "version": version,
        "params": digest(job.params),
        "sets": [rows.digest for rows in job.sets],
        "tokenizer": ctx.renderer.digest,
        "prompts": ctx.task.prompt_version,
        "inputs": [rows.step for rows in job.sets],
    }
    step = ctx.open_step(job.name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(job.name, "curate"):
            step = _curate(ctx, job, step)
    elif ctx.code_changed:
        _compare(ctx, job, step)
    ctx.record(step, "curate", new=new)
    return _example_set(ctx, job, step)


def _version(job: CurateJob) -> int:
    version = getattr(job.function, "version", None)
    if "<" in job.dotted or not isinstance(version, int):
        raise RecipeError(
            f"step {job.name}: curate takes a module-level function marked with @curation(version=...), not {job.dotted}",
            hint="move it to the top of its module and mark it: its results are compared by name and version",
        )
    return version


def _curate(ctx: Context, job: CurateJob, step: OpenStep) -> Committed:
    examples: list[Example] = []
    left_out: list[LeftOut] = []
    for outcome in _outcomes(ctx, job):
        (left_out if isinstance(outcome, LeftOut) else examples).append(outcome)  # type: ignore[arg-type]
    _conserve(job, examples, left_out)
    step.seal_table("rows", type(examples[0]) if examples else SFTExample, iter(examples))
    step.seal_table("left_out", LeftOut, iter(left_out))
    reasons = dict(sorted(Counter(row.reason for row in left_out).items()))
    num_rows = sum(len(rows) for rows in job.sets)
    result = {
        "num_rows": num_rows,
        "num_examples": len(examples),
        "sources": dict(sorted(Counter(example.source for example in examples).items())),
        "left_out": reasons,
        "kept_share": round(len(examples) / num_rows, 6) if num_rows else 0.0,
    }
    committed = step.commit(result)
    ctx.progress.end(job.name, f"kept {len(examples)} of {num_rows}")
    return committed


def _outcomes(ctx: Context, job: CurateJob) -> Iterator[Example | LeftOut]:
    problems: dict[str, Problem] = {problem.id: problem for rows in job.sets for problem in rows.problems}
    for problem in problems.values():

        def prompt(style: str, problem: Problem = problem) -> Segment:
            return Segment(token_ids=ctx.prompt(problem, style)[1], src="prompt", loss=False)

        def gold(problem: Problem = problem) -> Segment:
            ids = (*ctx.renderer.encode(ctx.task.direct_answer(problem)), ctx.renderer.eos_ids[0])
            return Segment(token_ids=ids, src="gold", loss=True)

        rows: list[list[Graded]] = [graded.of_problem(problem.id) for graded in job.graded]
        yield from job.function(Group(problem=problem, prompt=prompt, gold=gold), *rows, **job.params)


def _conserve(job: CurateJob, examples: list[Example], left_out: list[LeftOut]) -> None:
    """Rows in = rows used + rows left out (promise G17). A row may serve several examples, never none in silence."""
    given = {id_ for graded in job.graded for id_ in graded.rollouts.rows.ids()}
    used = set(chain.from_iterable(example.rollout_ids for example in examples))
    dropped = [row.rollout_id for row in left_out]
    missing, twice = given - used - set(dropped), len(dropped) - len(set(dropped)) + len(used & set(dropped))
    if missing or twice or not used <= given:
        raise RunFailed(
            f"step {job.name}: {job.dotted} must use every row or leave it out with a reason: {len(missing)} rows were"
            f" neither, {twice} were both or left out twice, {len(used - given)} are not rows of its inputs",
            hint="yield a LeftOut for each row that is not used",
        )


def _compare(ctx: Context, job: CurateJob, step: Committed) -> None:
    """Run a committed curation again under changed code and stop when it chooses other rows."""
    committed = [
        example.model_dump_json() for example in Rows.load(_row_type(step), step.table_paths("rows"), ctx.cache_dir)
    ]
    again = [outcome.model_dump_json() for outcome in _outcomes(ctx, job) if not isinstance(outcome, LeftOut)]
    if committed == again:
        ctx.progress.say(f"{job.name}: the code changed, the curated rows are equal")
        return
    changed = sum(a != b for a, b in zip(committed, again, strict=False)) + abs(len(committed) - len(again))
    raise RunConflict(
        f"step {job.name}: the code of the method or of curation changed, and it now makes {len(again)} examples"
        f" instead of {len(committed)} ({changed} differ)",
        hint="revert the code; or keep the committed rows with --accept-code; or run again from this step with"
        f" --redo {job.name}; or start a new run with --run NEW",
    )


def _row_type(step: Committed) -> type[SFTExample]:
    return SFTExample


def _example_set(ctx: Context, job: CurateJob, step: Committed) -> ExampleSet:
    paths = step.table_paths("rows")
    result = step.result
    extent = Extent.of(0)
    for rows in job.sets:
        extent = extent.plus(rows.extent)
    if ctx.planned is not None:
        zero = Extent.of(0)
        ctx.planned.append(
            PlannedStep(step=job.name, verb="curate", unit="rows", units=extent, tokens=zero, disk_bytes=zero)
        )
    return ExampleSet(
        rows=Rows.load(_row_type(step), paths, ctx.cache_dir),
        paths=tuple(str(path) for path in paths),
        left_out=dict(result["left_out"]),
        step=job.name,
        digest=step.digest,
        extent=extent.share(result["kept_share"]),
        sources=dict(result["sources"]),
    )
