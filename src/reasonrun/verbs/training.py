"""``train``: one job for a trainer, committed with its weights."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.errors import Finding, RecipeError
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.models import weights_digest
from reasonrun.randomness import derive_seed
from reasonrun.records import Checkpoint
from reasonrun.samples import ExampleSet, Extent
from reasonrun.settings import semantic
from reasonrun.training import OptimizerSettings, TrainJob, TrainKind, TrainResult
from reasonrun.verbs.context import Context, PlannedStep


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """A training step as the method asked for it."""

    name: str
    kind: TrainKind
    rows: Sequence[ExampleSet]
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
    _refuse_empty(ctx, request)
    _refuse_other_kinds(request)
    _plan(ctx, request)
    seed = derive_seed("train", ctx.seed, request.name)
    fingerprint = {
        "verb": "train",
        "kind": request.kind,
        "rows": [rows.digest for rows in request.rows],
        "start": request.start.weights,
        "reference": request.reference.weights if request.reference else None,
        "optimizer_of": request.start.step if request.carry_optimizer else None,
        "settings": semantic(request.settings),
        "num_steps": request.num_steps,
        "seed": seed,
        "inputs": [*(rows.step for rows in request.rows), *_made_by(request.start), *_made_by(request.reference)],
        **({"keep_optimizer": True} if request.keep_optimizer else {}),  # the step then holds one folder more
    }
    step = ctx.open_step(request.name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(request.name, "train"):
            step = _train(ctx, request, step, seed)
    ctx.record(step, "train", new=new)
    model = step.folder("model")
    return Checkpoint(
        path=str(model),
        weights=step.result["weights"],
        tokenizer=request.start.tokenizer,
        parent=request.start.weights,
        step=request.name,
        optimizer_path=str(step.folder("optimizer")) if (step.path / "optimizer").is_dir() else None,
    )


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
    raise Finding(
        f"step {request.name}: nothing to learn from. Of {num_rows} rows none was kept",
        evidence=dict(evidence),
        hint="the same command says this again without work; sample more (num_samples, temperature), make the task"
        " easier, or start from a stronger model",
    )


def _refuse_other_kinds(request: TrainRequest) -> None:
    for rows in request.rows:
        if len(rows) and rows.kind != request.kind:
            raise RecipeError(
                f"step {request.name}: the trainer {request.kind} cannot learn from {rows.step}, whose examples are of"
                f" kind {rows.kind}",
                hint=f'call lab.train("{rows.kind}", …), or curate other examples',
            )


def _plan(ctx: Context, request: TrainRequest) -> None:
    if ctx.planned is None:
        return
    tokens = Extent.of(0)
    for rows in request.rows:
        num_tokens = sum(row.num_tokens for row in rows.rows)
        mean = num_tokens / max(1, len(rows))
        share = mean * request.settings.batch_size / len(request.rows)
        tokens = tokens.plus(request.planned_steps.times(share))
    size = sum(path.stat().st_size for path in Path(ctx.base.path).iterdir() if path.is_file())
    ctx.planned.append(
        PlannedStep(
            step=request.name,
            verb="train",
            unit="optimizer steps",
            units=request.planned_steps,
            tokens=Extent(expected=tokens.expected, worst=tokens.worst, exact=False),
            disk_bytes=Extent.of(size * (3 if request.keep_optimizer else 1)),
        )
    )


def _train(ctx: Context, request: TrainRequest, step: OpenStep, seed: int) -> Committed:
    curve = _Curve(ctx, step, request.name)

    def job() -> TrainJob:
        curve.forget()
        return _job(ctx, request, step, seed)

    ctx.progress.begin(request.name, request.num_steps, (step.latest_checkpoint() or (None, 0))[1])
    outcome = ctx.host.train(job(), curve.receive, job)
    curve.commit()
    return _seal(ctx, request, step, _out_dir(ctx, request), outcome)


def _out_dir(ctx: Context, request: TrainRequest) -> Path:
    return ctx.attempt_dir / "train" / request.name


def _job(ctx: Context, request: TrainRequest, step: OpenStep, seed: int) -> TrainJob:
    """The job from the last committed checkpoint on, with an empty folder to write into."""
    out_dir = _out_dir(ctx, request)
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    resume = step.latest_checkpoint()
    return TrainJob(
        kind=request.kind,
        rows=tuple(path for rows in request.rows for path in rows.paths),
        start=request.start,
        reference=request.reference,
        carry_optimizer=request.carry_optimizer,
        settings=request.settings.model_dump(mode="json"),
        num_steps=request.num_steps,
        seed=seed,
        out_dir=str(out_dir),
        resume_from=str(resume[0]) if resume else None,
    )


class _Curve:
    """The log lines of a training step, committed with the checkpoint that covers them: a rerun of uncommitted steps
    on a device that is not deterministic must not contradict them."""

    def __init__(self, ctx: Context, step: OpenStep, name: str) -> None:
        self._ctx, self._step, self._name = ctx, step, name
        self._wal = step.wal("curve")
        self._waiting: list[tuple[int, dict[str, Any]]] = []

    def receive(self, event: dict[str, Any]) -> None:
        if event["event"] == "log":
            line = {key: value for key, value in event.items() if key != "event"}
            self._waiting.append((int(event["step"]), line))
            self._ctx.progress.advance(self._name, 1, note=f"loss {event['loss']:.4f}")
        elif event["event"] == "checkpoint":
            self.commit()
            self._step.adopt_checkpoint(Path(event["path"]), int(event["step"]))
        elif event["event"] == "note":
            self._ctx.progress.say(f"{self._name}: {event['text']}")
        self._ctx.check_stop()

    def forget(self) -> None:
        """Drop the lines after the last checkpoint: the trainer starts again from there."""
        self._waiting = []

    def commit(self) -> None:
        self._wal.append(self._waiting)
        self._wal.flush()
        self._waiting = []


def _seal(ctx: Context, request: TrainRequest, step: OpenStep, out_dir: Path, outcome: TrainResult) -> Committed:
    curve = step.wal("curve")
    step.put_json("curve", [curve.read(int(number)) for number in curve.ordinals()])
    weights = weights_digest(out_dir / "final")
    step.adopt_folder(out_dir / "final", "model")
    for extra in ("adapter", *(["optimizer"] if request.keep_optimizer else [])):
        if (out_dir / extra).is_dir():
            step.adopt_folder(out_dir / extra, extra)
    result = {
        "weights": weights,
        "num_steps": outcome.num_steps,
        "num_examples": sum(len(rows) for rows in request.rows),
        "num_tokens": outcome.num_tokens,
        "num_padded_tokens": outcome.num_padded_tokens,
        **{key: float(value) for key, value in sorted(outcome.metrics.items())},
    }
    committed = step.commit(result)
    ctx.progress.end(request.name, f"{outcome.num_steps} steps, loss {outcome.metrics.get('loss', float('nan')):.4f}")
    return committed
