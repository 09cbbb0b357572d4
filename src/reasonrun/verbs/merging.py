"""``merge``: one model whose weights are the weighted average of several, committed like a training step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from reasonrun.errors import RecipeError
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.models import weights_digest
from reasonrun.records import Checkpoint
from reasonrun.samples import Extent
from reasonrun.training import MergeJob
from reasonrun.verbs.context import Context, PlannedStep

_TOLERANCE = 1e-6  # of the sum of weights: thirds do not sum to 1 exactly


def merge(ctx: Context, name: str, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """Run or replay one merge.

    Raises:
        RecipeError: fewer than two models, one behind an endpoint, another tokenizer, other tensors, or weights that are
            no shares of 1.
        RunFailed: the result is not finite.
    """
    _check_models(name, models)
    _check_weights(name, models, weights)
    fingerprint = {
        "verb": "merge",
        "models": [model.weights for model in models],
        "tokenizer": models[0].tokenizer,
        "weights": list(weights),
        "inputs": list(dict.fromkeys(model.step for model in models if model.step)),
    }
    step = ctx.open_step(name, fingerprint)
    new = isinstance(step, OpenStep)
    if isinstance(step, OpenStep):
        with ctx.timed(name, "merge"):
            step = _merge(ctx, step, models, weights)
    ctx.record(step, "merge", new=new)
    _plan(ctx, name, models)
    return Checkpoint(
        path=str(step.folder("model")),
        weights=step.result["weights"],
        tokenizer=models[0].tokenizer,
        parent=models[0].weights,
        step=name,
    )


def _check_models(name: str, models: Sequence[Checkpoint]) -> None:
    if len(models) < 2:
        raise RecipeError(f"step {name}: a merge needs two models or more, and got {len(models)}")
    if any(model.remote for model in models):
        raise RecipeError(
            f"step {name}: a model behind an endpoint has no weights here to merge", hint="merge local models"
        )
    for number, model in enumerate(models[1:], start=2):
        if model.tokenizer != models[0].tokenizer:
            raise RecipeError(
                f"step {name}: models 1 ({models[0].path}) and {number} ({model.path}) differ in tokenizer or chat template, so"
                " their weights speak of other tokens",
                hint="merge models that were trained from the same base",
            )


def _check_weights(name: str, models: Sequence[Checkpoint], weights: Sequence[float]) -> None:
    given = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(models):
        raise RecipeError(f"step {name}: {len(models)} models were given, and {len(weights)} weights ({given})")
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
        raise RecipeError(f"step {name}: the weights of an average are 0 or more, these are {given}")
    if abs(math.fsum(weights) - 1) > _TOLERANCE:
        raise RecipeError(
            f"step {name}: the weights {given} sum to {math.fsum(weights):g}, not to 1",
            hint="divide each by their sum; nothing is normalised silently",
        )


def _plan(ctx: Context, name: str, models: Sequence[Checkpoint]) -> None:
    if ctx.planned is None:
        return
    # What a rehearsal trains has no size; a model that the run starts from has its own.
    folder = Path((ctx.base if models[0].step else models[0]).path)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    nothing = Extent.of(0)
    ctx.planned.append(
        PlannedStep(
            step=name,
            verb="merge",
            unit="models",
            units=Extent.of(len(models)),
            tokens=nothing,
            disk_bytes=Extent.of(size),
        )
    )


def _merge(ctx: Context, step: OpenStep, models: Sequence[Checkpoint], weights: Sequence[float]) -> Committed:
    out_dir = ctx.attempt_dir / "merge" / step.name
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    ctx.progress.begin(step.name, len(models), 0)
    ctx.host.merge(MergeJob(models=tuple(models), weights=tuple(weights), out_dir=str(out_dir)))
    made = weights_digest(out_dir / "final")
    step.adopt_folder(out_dir / "final", "model")
    committed = step.commit({"weights": made, "num_models": len(models)})
    ctx.progress.end(step.name, f"{len(models)} models, weights {', '.join(f'{weight:g}' for weight in weights)}")
    return committed
