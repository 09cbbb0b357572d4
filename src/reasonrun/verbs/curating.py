"""``curate`` and ``cut``: a pure function from one problem's rows to examples or to prefixes, with a reason for every row
left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from reasonrun.curate.group import Curation, Group
from reasonrun.curate.steps import SEGMENTERS, Marks, Steps, on_tokens
from reasonrun.errors import RecipeError, RunConflict, RunFailed
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.records import CHOSEN_TYPES, Chosen, Graded, LeftOut, Message, Prefix, Problem, Segment, digest
from reasonrun.samples import ExampleSet, Extent, GradedSet, PrefixSet, ProblemSet
from reasonrun.sets import Rows
from reasonrun.verbs.context import Context, PlannedStep

if TYPE_CHECKING:
    from reasonrun.ledger.tables import TableWriter


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateJob:
    """A curation as the method asked for it; ``of_prefixes`` says what it must choose: prefixes, or examples."""

    name: str
    function: Curation
    sets: tuple[GradedSet | ProblemSet, ...]
    params: dict[str, Any]
    of_prefixes: bool = False

    @property
    def verb(self) -> str:
        return "cut" if self.of_prefixes else "curate"

    @property
    def graded(self) -> tuple[GradedSet, ...]:
        return tuple(rows for rows in self.sets if isinstance(rows, GradedSet))

    @property
    def problems(self) -> ProblemSet:
        """Those of the first set."""
        first = self.sets[0]
        return first.problems if isinstance(first, GradedSet) else first

    @property
    def dotted(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


def curate(ctx: Context, job: CurateJob) -> ExampleSet:
    """Run or replay one curation step.

    Raises:
        RecipeError: the function is a lambda or a bound method, or carries no version.
        RunConflict: changed code chooses other rows than the committed ones.
        RunFailed: the function lost or repeated a row, or chose prefixes.
    """
    step = _committed(ctx, job)
    return ExampleSet(
        rows=_chosen(ctx, step),
        paths=tuple(str(path) for path in step.table_paths("rows")),
        left_out=dict(step.result["left_out"]),
        step=job.name,
        digest=step.digest,
        extent=_extent(ctx, job, step),
        kind=step.result["kind"],
        sources=dict(step.result["sources"]),
    )


def cut(ctx: Context, job: CurateJob) -> PrefixSet:
    """Run or replay one step that chooses prefixes. Raises as ``curate`` does."""
    step = _committed(ctx, job)
    return PrefixSet(
        rows=_chosen(ctx, step),
        problems=job.problems,
        left_out=dict(step.result["left_out"]),
        step=job.name,
        extent=_extent(ctx, job, step),
    )


def _committed(ctx: Context, job: CurateJob) -> Committed:
    fingerprint = {
        "verb": job.verb,
        "function": job.dotted,
        "version": _version(job),
        "params": digest(job.params),
        "sets": [rows.digest for rows in job.sets],
        "tokenizer": ctx.renderer.digest,
        "prompts": ctx.task.prompt_version,
        "context_length": ctx.renderer.context_length,
        "inputs": [rows.step for rows in job.sets],
    }
    step = ctx.open_step(job.name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(job.name, job.verb):
            step = _curate(ctx, job, step)
    elif ctx.code_changed:
        _compare(ctx, job, step)
    ctx.record(step, job.verb, new=new)
    ctx.left_out[job.name] = dict(step.result["left_out"])
    return step


def _version(job: CurateJob) -> int:
    version = getattr(job.function, "version", None)
    if "<" in job.dotted or not isinstance(version, int):
        raise RecipeError(
            f"step {job.name}: curate takes a module-level function marked with @curation(version=...), not {job.dotted}",
            hint="move it to the top of its module and mark it: its results are compared by name and version",
        )
    return version


def _curate(ctx: Context, job: CurateJob, step: OpenStep) -> Committed:
    """Both tables are written as the rows come, so that memory does not grow with them."""
    num_rows = sum(len(rows) for rows in job.sets)
    reasons: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    with ExitStack() as tables:
        left_out = tables.enter_context(step.table("left_out", LeftOut))
        examples: TableWriter | None = None
        kind = "prefix" if job.of_prefixes else "sft"
        for outcome in _outcomes(ctx, job):
            if isinstance(outcome, LeftOut):
                reasons[outcome.reason] += 1
                left_out.append(outcome)
                continue
            if examples is None:
                _refuse_other_choice(job, outcome)
                examples, kind = tables.enter_context(step.table("rows", type(outcome))), outcome.kind
            elif outcome.kind != kind:
                raise RunFailed(
                    f"step {job.name}: {job.dotted} gave examples of kind {kind} and of kind {outcome.kind}",
                    hint="curate them in two steps: a trainer takes one kind",
                )
            sources[outcome.source] += 1
            examples.append(outcome)
        if examples is None:
            tables.enter_context(step.table("rows", CHOSEN_TYPES[kind]))
    num_examples = sources.total()
    result = {
        "kind": kind,
        "num_rows": num_rows,
        "num_examples": num_examples,
        "sources": dict(sorted(sources.items())),
        "left_out": dict(sorted(reasons.items())),
        "kept_share": round(num_examples / num_rows, 6) if num_rows else 0.0,
    }
    committed = step.commit(result)
    ctx.progress.end(job.name, f"kept {num_examples} of {num_rows}")
    return committed


def _refuse_other_choice(job: CurateJob, outcome: Chosen) -> None:
    if isinstance(outcome, Prefix) == job.of_prefixes:
        return
    raise RunFailed(
        f"step {job.name}: {job.dotted} chose {outcome.kind} rows, which lab.{job.verb} does not take",
        hint="prefixes come from lab.cut, examples from lab.curate",
    )


def _outcomes(ctx: Context, job: CurateJob) -> Iterator[Chosen | LeftOut]:
    problems: dict[str, Problem] = {problem.id: problem for rows in job.sets for problem in rows.problems}
    for problem in problems.values():
        rows: list[list[Graded]] = [graded.of_problem(problem.id) for graded in job.graded]
        outcomes = job.function(group_of(ctx, problem), *rows, **job.params)
        yield from _conserving(job, problem.id, rows, outcomes)


def group_of(ctx: Context, problem: Problem) -> Group:
    """What a curation function is told about ``problem``."""
    renderer, task = ctx.renderer, ctx.task

    @cache
    def prompt(style: str) -> Segment:
        return Segment(token_ids=ctx.prompt(problem, style)[1], src="prompt", loss=False)

    def gold() -> Segment:
        ids = (*renderer.encode(task.direct_answer(problem)), renderer.eos_ids[0])
        return Segment(token_ids=ids, src="gold", loss=True)

    def answer(style: str, text: str) -> tuple[Segment, ...]:
        opening = task.opening(style)
        given = Segment(token_ids=renderer.encode(opening), src="prompt", loss=False)
        ids = (*renderer.encode(text.removeprefix(opening)), renderer.eos_ids[0])
        learnt = Segment(token_ids=ids, src="gold", loss=True)
        return (given, learnt) if opening else (learnt,)

    def marks(text: str, how: str) -> Marks | str:
        return task.segment(text) if how == "task" else SEGMENTERS[how](text)

    def steps_of(ids: tuple[int, ...], how: str) -> Steps | str:
        text, places = renderer.decode_with_places(ids)
        found = marks(text, how)
        return found if isinstance(found, str) else on_tokens(text, places, found)

    def texts(text: str, how: str) -> list[str] | str:
        found = marks(text, how)
        if isinstance(found, str):
            return found
        ends = [start for start, _ in found[1:]] + [len(text)]
        return [text[body:end] for (_, body), end in zip(found, ends, strict=True)]

    def written_steps(text: str, how: str) -> list[tuple[int, ...]] | str:
        # Cut like a completion: a tokenizer may put a mark before the first token of a text, so not in pieces.
        ids = (*renderer.encode(text), renderer.eos_ids[0])
        found = steps_of(ids, how)
        if isinstance(found, str):
            return found
        return [ids[found.bodies[n] : found.end(n + 1)] for n in range(len(found))]

    return Group(
        problem=problem,
        prompt=prompt,
        gold=gold,
        direct_answer=lambda: task.direct_answer(problem),
        answer=answer,
        steps=lambda rollout, how: steps_of(rollout.completion_ids, how),
        written_steps=written_steps,
        texts=texts,
        encode=renderer.encode,
        decode=renderer.decode,
        next_turn=lambda rollout, said: renderer.next_turn(
            rollout.prompt_ids, rollout.completion_ids, [Message(role="user", content=said)]
        ),
        first_error=lambda text: task.first_error(problem, text),
        solution=lambda: task.solution(problem),
        gold_score=lambda: task.gold_score(problem),
        context_length=renderer.context_length,
    )


def _conserving(
    job: CurateJob, problem_id: str, rows: list[list[Graded]], outcomes: Iterator[Chosen | LeftOut]
) -> Iterator[Chosen | LeftOut]:
    """The outcomes of one problem, checked at the end: rows in = rows used + rows left out (promise G17).

    A row may serve several examples, never none in silence. Where only problems are curated, the problem is the row.
    """
    used: set[str] = set()
    dropped: list[str] = []
    for outcome in outcomes:
        if isinstance(outcome, LeftOut):
            dropped.append(outcome.rollout_id)
        else:
            used.update(outcome.rollout_ids if rows else [problem_id])
        yield outcome
    given = {row.rollout.id for graded in rows for row in graded} if rows else {problem_id}
    missing, twice = given - used - set(dropped), len(dropped) - len(set(dropped)) + len(used & set(dropped))
    foreign = (used | set(dropped)) - given
    if missing or twice or foreign:
        raise RunFailed(
            f"step {job.name}: {job.dotted} must use every row or leave it out with a reason. Of problem {problem_id}"
            f" {len(missing)} rows were neither, {twice} were both or left out twice, and {len(foreign)} that it named"
            " are not rows of this problem",
            hint="yield a LeftOut for each row that is not used",
        )


def _compare(ctx: Context, job: CurateJob, step: Committed) -> None:
    """Run a committed curation again under changed code and stop when it chooses other rows."""
    committed = iter(_chosen(ctx, step))
    again = (outcome for outcome in _outcomes(ctx, job) if not isinstance(outcome, LeftOut))
    num_again = changed = 0
    for old, new in zip_longest(committed, again):
        num_again += new is not None
        changed += old is None or new is None or old.model_dump_json() != new.model_dump_json()
    if not changed:
        ctx.progress.say(f"{job.name}: the code changed, the curated rows are equal")
        return
    raise RunConflict(
        f"step {job.name}: the code of the method or of curation changed, and it now makes {num_again} examples"
        f" instead of {step.result['num_examples']} ({changed} differ)",
        hint="revert the code; or keep the committed rows with --accept-code; or run again from this step with"
        f" --redo {job.name}; or start a new run with --run NEW",
    )


def _chosen(ctx: Context, step: Committed) -> Rows[Any]:
    return Rows.load(CHOSEN_TYPES[step.result["kind"]], step.table_paths("rows"), ctx.cache_dir)


def _extent(ctx: Context, job: CurateJob, step: Committed) -> Extent:
    """How many rows the step gives in the real run; in a rehearsal the step is planned, too.

    Prefixes are of the first set's rollouts; the other sets are evidence about them.
    """
    whole = Extent.of(0)
    for rows in job.sets:
        whole = whole.plus(rows.extent)
    if ctx.planned is not None:
        zero = Extent.of(0)
        ctx.planned.append(
            PlannedStep(step=job.name, verb=job.verb, unit="rows", units=whole, tokens=zero, disk_bytes=zero)
        )
    kept = step.result["kept_share"]
    if job.of_prefixes and len(job.sets[0]):
        whole, kept = job.sets[0].extent, step.result["num_examples"] / len(job.sets[0])
    return whole.times(max(1.0, kept)).share(min(1.0, kept))
