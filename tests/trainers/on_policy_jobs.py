"""Policy-gradient jobs on the carried model and generated arithmetic, which a test can vary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_rows import Events

from reasonrun.curate.attempts import AttemptSettings, TurnRewards, attempts, turn_rewards
from reasonrun.engines.hf import HuggingFace
from reasonrun.models import resolve
from reasonrun.parts import part, plugin_part, read_records, write_records
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Checkpoint, Experience, Problem
from reasonrun.tasks.arith import Arith
from reasonrun.trainers.policy_gradient import PolicyGradient
from reasonrun.training import OnPolicyJob, PolicyGradientSettings, TrainJob, TrainResult, experience_path

TINY: Checkpoint = resolve(ModelSettings(name="tiny"))
TASK = Arith.Settings(num_train=12, num_dev=1, num_test=1)
# With job seed 11 the first two of them are solved by some of the four rollouts and not by others.
PROBLEMS = Arith(TASK).problems("train")


def make_job(
    folder: Path,
    out: str = "out",
    *,
    problems: Sequence[Problem] = PROBLEMS[:2],
    num_steps: int = 1,
    attempt: dict[str, Any] | None = None,
    rewards: dict[str, Any] | None = None,
    engine: type[HuggingFace] = HuggingFace,
    task: type[Arith] = Arith,
    reward_function: Any = turn_rewards,
    job: dict[str, Any] | None = None,
    **settings: Any,
) -> TrainJob:
    """One attempt rewarded with its verdict, eight rollouts of two problems; words that are not named are settings."""
    folder.joinpath(out).mkdir()
    write_records(folder / f"{out}.jsonl", problems)
    chosen = {"batch_size": 8, "group_size": 4, "lr": 1e-4, "max_length": 400, "checkpoint_every": 1000, **settings}
    drawn = AttemptSettings(**{"num_attempts": 1, "max_new_tokens": 64, **(attempt or {})})
    valued = TurnRewards(**{"rewarded": (1,), "learnt": (1,), "kl_coefs": (0.0,), **(rewards or {})})
    fields: dict[str, Any] = {
        "kind": "policy_gradient",
        "rows": (),
        "start": TINY,
        "reference": TINY,
        "settings": PolicyGradientSettings(**chosen).model_dump(mode="json"),
        "num_steps": num_steps,
        "seed": 11,
        "out_dir": str(folder / out),
        "on_policy": OnPolicyJob(
            tokenizer=TINY.path,
            problems=str(folder / f"{out}.jsonl"),
            task=plugin_part(task, TASK),
            engine=plugin_part(engine, HuggingFace.Settings(num_threads=1)),
            rollout=part(attempts, drawn),
            rewards=part(reward_function, valued),
        ),
    }
    return TrainJob(**{**fields, **(job or {})})


def train(job: TrainJob, events: Events | None = None) -> TrainResult:
    return PolicyGradient().train(job, Events() if events is None else events)


def experience(job: TrainJob, optimizer_step: int = 1) -> list[Experience]:
    """The rollouts of a sampling, and what was made of them."""
    return read_records(experience_path(Path(job.out_dir), optimizer_step), Experience)


def final(job: TrainJob) -> Path:
    return Path(job.out_dir) / "final"
