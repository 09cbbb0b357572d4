"""Reinforcement learning on the policy's own rollouts: REINFORCE with a leave-one-out baseline, GRPO and their kin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrun.errors import RecipeError
from reasonrun.trainers.worker_trainer import WorkerTrainer
from reasonrun.training import OptimizerSettings, PolicyGradientSettings, TrainJob

if TYPE_CHECKING:
    from reasonrun.contracts import Engine
    from reasonrun.trainers.objective import Objective


class PolicyGradient(WorkerTrainer):
    """The trainer of kind ``policy_gradient``. Its rows come from the job's own ``rollout`` and ``rewards`` functions; the
    engine lives in the same process, or in a child if it needs another interpreter, and gets the weights before every
    sampling."""

    Settings = PolicyGradientSettings

    def __init__(self) -> None:
        super().__init__()
        self._engine: Engine | None = None

    @property
    def num_tokens_made(self) -> int:
        """Tokens sampled so far, in this process or in those that it started."""
        return super().num_tokens_made + int(getattr(self._engine, "num_tokens_made", 0))

    def prepare(self, job: TrainJob) -> tuple[OptimizerSettings, Objective, dict[str, int]]:
        """As in WorkerTrainer. Raises RecipeError when the job does not say how rows are made, or names a reference with
        another tokenizer."""
        from reasonrun.on_policy import Collector
        from reasonrun.parts import load_part
        from reasonrun.trainers.policy_gradient_objective import PolicyGradientObjective

        if job.on_policy is None:
            raise RecipeError(
                "the trainer policy_gradient makes its rows itself",
                hint='pass an OnPolicy source to lab.train("policy_gradient", …)',
            )
        if job.reference is not None and job.reference.tokenizer != job.start.tokenizer:
            raise RecipeError(
                f"the reference {job.reference.path} has another tokenizer than the model to train ({job.start.path})",
                hint="take a reference of the same model family",
            )
        settings = PolicyGradientSettings.model_validate(job.settings)
        engine_class, engine_settings = load_part(job.on_policy.engine)
        engine = self._engine = _engine(engine_class, engine_settings, Path(job.out_dir))
        engine.load(job.start)
        collector = Collector(job, job.on_policy, engine, settings)
        return settings, PolicyGradientObjective(collector, engine, settings, Path(job.out_dir)), {}


def _engine(engine_class: type[Engine], settings: Any, out_dir: Path) -> Engine:
    if not getattr(engine_class, "needs_own_process", False):
        engine: Engine = engine_class(settings)  # type: ignore[call-arg]
        return engine
    from reasonrun.workers.child_engine import ChildEngine

    return ChildEngine(f"{engine_class.__module__}.{engine_class.__qualname__}", settings, out_dir)
