"""``train``: one job for a trainer, committed with its weights."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonrun.errors import Finding, RecipeError
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.models import weights_digest
from reasonrun.randomness import derive_seed
from reasonrun.records import Adapter, Checkpoint
from reasonrun.samples import ExampleSet, Extent, OnPolicy
from reasonrun.settings import semantic
from reasonrun.training import OptimizerSettings, TrainJob, TrainKind, TrainResult
from reasonrun.verbs.context import Context, PlannedStep
from reasonrun.verbs.on_policy import described, on_policy_job, refuse_changed_code, rehearsed, rehearsed_tokens
from reasonrun.verbs.training_log import TrainingLog

_REHEARSED_STEPS = 2  # of an on-policy step; the plan scales what they took


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """A training step as the method asked for it."""

    name: str
    kind: TrainKind
    rows: Sequence[ExampleSet]
    on_policy: OnPolicy | None  # instead of rows
    start: Checkpoint
    reference: Checkpoint | None
    settings: OptimizerSettings
    given_steps: int  # 0 when epochs say how many
    num_epochs: float
    carry_optimizer: bool
    keep_optimizer: bool

    @property
    def num_steps(self) -> int:
        """Optimizer steps over the examples at hand."""
        return self.given_steps or self._steps(sum(len(rows) for rows in self.rows))

    @property
    def planned_steps(self) -> Extent:
        """Optimizer steps in the real run; they depend on data when epochs count them."""
        if self.given_steps:
            return Extent.of(self.given_steps)
        expected, worst = (sum(getattr(rows.extent, which) for rows in self.rows) for which in ("expected", "worst"))
        return Extent(expected=self._steps(expected), worst=self._steps(worst), exact=False)

    def _steps(self, num_examples: float) -> int:
        return max(1, math.ceil(self.num_epochs * num_examples / self.settings.batch_size))


def train(ctx: Context, request: TrainRequest) -> Checkpoint:
    """Run or replay one training step.

    Raises:
        RecipeError: the examples are of another kind than the trainer, or a model is behind an endpoint.
        Finding: there is nothing to train on; the evidence counts the rows left out, by reason.
        RunFailed: the trainer met a non-finite loss or died again and again.
    """
    if request.start.remote or (request.reference and request.reference.remote):
        raise RecipeError(
            f"step {request.name}: a model behind an endpoint has no weights here to start from, or to compare with",
            hint="train the policy, lab.base",
        )
    if request.on_policy is None:
        _refuse_empty(ctx, request)
        _refuse_other_kinds(request)
    seed = derive_seed("train", ctx.seed, request.name)
    source = request.on_policy
    made_of = {"rows": [rows.digest for rows in request.rows]} if source is None else described(ctx, source)
    inputs = [rows.step for rows in request.rows] if source is None else source.steps
    fingerprint = {
        # On-policy rows depend on the method's functions too, which conditions of borrowing know by the verb.
        "verb": "train" if source is None else "train_on_policy",
        "kind": request.kind,
        **made_of,
        "start": request.start.weights,
        "reference": request.reference.weights if request.reference else None,
        "optimizer_of": request.start.step if request.carry_optimizer else None,
        "settings": semantic(request.settings),
        "num_steps": request.num_steps,
        "seed": seed,
        "inputs": [*inputs, *_made_by(request.start), *_made_by(request.reference)],
        **({"keep_optimizer": True} if request.keep_optimizer else {}),  # the step then holds one folder more
    }
    step = ctx.open_step(request.name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(request.name, "train"):
            step = _train(ctx, request, step, seed)
    ctx.record(step, "train", new=new)
    _plan(ctx, request, step)
    model = step.folder("model")
    return Checkpoint(
        path=str(model),
        weights=step.result["weights"],
        tokenizer=request.start.tokenizer,
        parent=request.start.weights,
        step=request.name,
        optimizer_path=str(step.folder("optimizer")) if (step.path / "optimizer").is_dir() else None,
        adapter=Adapter(path=str(step.folder("adapter")), base=request.start.weights, base_path=request.start.path)
        if (step.path / "adapter").is_dir()
        else None,
    )


_REMEDY = "sample more (num_samples, temperature), make the task easier, or start from a stronger model"
_REMEDIES = {  # by what most rows were left out for
    "truncated": "raise method.max_new_tokens: most answers were cut off",
    "no_gold_judgement": "give the items gold scores and feedbacks (task.layout and task.score_field say how the files are"
    " read), or leave the first training out (method.seed_judge.epochs=0)",
    "no_counterpart": "choose pairs with method.pairs.balance=winning or none: these scores only ever win, or only lose",
    "no_gold": "take items with gold scores, or method.pairs.strategy=majority",
}
_NOT_LOST = ("correct", "evidence", "searched")  # left out of a choice because they have served, or need nothing


def _made_by(checkpoint: Checkpoint | None) -> list[str]:
    return [checkpoint.step] if checkpoint and checkpoint.step else []


def _refuse_empty(ctx: Context, request: TrainRequest) -> None:
    if any(len(rows) for rows in request.rows):
        return
    evidence: Counter[str] = Counter()
    for rows in request.rows:
        evidence.update(rows.left_out)
    num_rows = sum(evidence.values())
    scope, own = request.name.rpartition("/")[0], {rows.step for rows in request.rows}
    for step, left_out in ctx.left_out.items():  # what earlier choices of the round took away
        if step.startswith(f"{scope}/") and step not in own:
            lost = {reason: n for reason, n in left_out.items() if reason not in _NOT_LOST}
            evidence.update({f"{step.removeprefix(scope + '/')}: {reason}": n for reason, n in lost.items()})
    leading = evidence.most_common(1)[0][0] if evidence else ""
    remedy = next((text for reason, text in _REMEDIES.items() if reason in leading), _REMEDY)
    raise Finding(
        f"step {request.name}: nothing to learn from. Of {num_rows} rows none was kept",
        evidence=dict(evidence),
        hint=f"the same command says this again without work; {remedy}",
    )


def _refuse_other_kinds(request: TrainRequest) -> None:
    for rows in request.rows:
        if len(rows) and rows.kind != request.kind:
            raise RecipeError(
                f"step {request.name}: the trainer {request.kind} cannot learn from {rows.step}, whose examples are of"
                f" kind {rows.kind}",
                hint=f'call lab.train("{rows.kind}", …), or curate other examples',
            )


def _plan(ctx: Context, request: TrainRequest, step: Committed) -> None:
    if ctx.planned is None:
        return
    tokens, generated = Extent.of(0), Extent.of(0)
    for rows in request.rows:
        num_tokens = sum(row.num_tokens for row in rows.rows)
        mean = num_tokens / max(1, len(rows))
        share = mean * request.settings.batch_size / len(request.rows)
        tokens = tokens.plus(request.planned_steps.times(share))
    if request.on_policy is not None:
        tokens, generated = rehearsed_tokens(request.settings, request.on_policy, request.given_steps, step.result)
    size = sum(path.stat().st_size for path in Path(ctx.base.path).iterdir() if path.is_file())
    ctx.planned.append(
        PlannedStep(
            step=request.name,
            verb="train",
            unit="optimizer steps",
            units=request.planned_steps,
            tokens=Extent(expected=tokens.expected, worst=tokens.worst, exact=False),
            generated=Extent(expected=generated.expected, worst=generated.worst, exact=False),
            disk_bytes=Extent.of(size * (3 if request.keep_optimizer else 1)),
        )
    )


def _train(ctx: Context, request: TrainRequest, step: OpenStep, seed: int) -> Committed:
    out_dir = ctx.attempt_dir / "train" / request.name
    log = TrainingLog(ctx, step, out_dir, on_policy=request.on_policy is not None)

    def job() -> TrainJob:
        resume = step.latest_checkpoint()
        if resume and request.on_policy is not None:
            refuse_changed_code(ctx, request.name, request.on_policy, resume[0])
        log.rewind(resume[1] if resume else 0)
        return _job(ctx, request, seed, out_dir, resume)

    ctx.progress.begin(request.name, request.num_steps, (step.latest_checkpoint() or (None, 0))[1])
    outcome = ctx.host.train(job(), log.receive, job)
    if log.seconds:
        ctx.note({"step": request.name, "parts": {key: round(value, 3) for key, value in sorted(log.seconds.items())}})
    return _seal(ctx, request, step, log, out_dir, outcome)


def _job(ctx: Context, request: TrainRequest, seed: int, out_dir: Path, resume: tuple[Path, int] | None) -> TrainJob:
    """The job from the last committed checkpoint on, with an empty folder to write into."""
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    num_steps, settings = request.num_steps, request.settings
    if ctx.planned is not None and request.on_policy is not None:
        num_steps, settings = min(num_steps, _REHEARSED_STEPS), rehearsed(settings, request.on_policy)
    return TrainJob(
        kind=request.kind,
        rows=tuple(path for rows in request.rows for path in rows.paths),
        start=request.start,
        reference=request.reference,
        carry_optimizer=request.carry_optimizer,
        settings=settings.model_dump(mode="json"),
        num_steps=num_steps,
        seed=seed,
        out_dir=str(out_dir),
        resume_from=str(resume[0]) if resume else None,
        on_policy=None if request.on_policy is None else on_policy_job(ctx, request.on_policy, out_dir),
    )


def _seal(
    ctx: Context, request: TrainRequest, step: OpenStep, log: TrainingLog, out_dir: Path, outcome: TrainResult
) -> Committed:
    log.seal()
    weights = weights_digest(out_dir / "final")
    step.adopt_folder(out_dir / "final", "model")
    for extra in ("adapter", *(["optimizer"] if request.keep_optimizer else [])):
        if (out_dir / extra).is_dir():
            step.adopt_folder(out_dir / extra, extra)
    result = {
        "weights": weights,
        "num_steps": outcome.num_steps,
        **({"num_examples": sum(len(rows) for rows in request.rows)} if request.on_policy is None else log.sampled),
        "num_tokens": outcome.num_tokens,
        "num_padded_tokens": outcome.num_padded_tokens,
        **{key: float(value) for key, value in sorted(outcome.metrics.items())},
    }
    committed = step.commit(result)
    ctx.progress.end(request.name, f"{outcome.num_steps} steps, loss {outcome.metrics.get('loss', float('nan')):.4f}")
    return committed
