"""Rollouts that a trainer makes while it trains: with the weights of the moment, graded, turned into rows. No torch.

A method hands over two module-level functions with frozen settings. ``rollout(live, problems, settings)`` samples and
grades; ``rewards(state, graded, settings)`` gives the rows of a policy-gradient step and what is to be remembered of each
problem. They run where the weights are, in the training worker, and on the scripted engine just the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from reasonrun.asks import Ask, Asking, ask_in_style, ask_next_turn, logged, require_room
from reasonrun.contracts import Engine, Grader, Task
from reasonrun.credit import cells, zero_variance_share
from reasonrun.errors import Finding, RecipeError
from reasonrun.parts import load_part, read_records, write_records
from reasonrun.randomness import derive_seed
from reasonrun.records import Credit, Experience, Graded, PolicyGradientExample, Problem, Rollout, Sampling, digest
from reasonrun.rendering import Renderer
from reasonrun.training import OnPolicyJob, PolicyGradientSettings, TrainJob, experience_path

State = dict[str, JsonValue]
"""What a method remembers of each problem, by problem id; committed with every checkpoint."""


class RolloutFunction(Protocol):
    """Samples and grades: one group of rollouts for each problem, further turns after their first ones."""

    def __call__(self, live: Live, problems: Sequence[Problem], settings: Any) -> list[Graded]: ...


class RewardFunction(Protocol):
    """Rewards: the rows to learn from, and the state to go on with. Pure."""

    def __call__(
        self, state: State, graded: Sequence[Graded], settings: Any
    ) -> tuple[State, list[PolicyGradientExample]]: ...


class Live:
    """The policy as it is at this optimizer step. What it samples is not durable by itself.

    Args:
        engine: with the weights in place.
        renderer: its tokenizer and template.
        task: gives prompts and the verifier.
        problems: all that take part, by id.
        group_size: rollouts of each problem.
        max_length: longest row that may be learnt, in tokens; the model's context may allow less.
        given: rollouts that were sampled before the job, by problem.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        renderer: Renderer,
        task: Task,
        problems: Mapping[str, Problem],
        group_size: int,
        max_length: int,
        given: Mapping[str, Sequence[Rollout]] | None = None,
    ) -> None:
        self._given = given or {}
        self.task, self.group_size = task, group_size
        self._max_length = min(max_length, renderer.context_length)
        self._engine, self._renderer, self._problems = engine, renderer, problems
        self._grader: Grader = task.grader()
        self._policy = ""
        self._seed_parts: tuple[str | int, ...] = ()
        self._has_room: set[str] = set()
        self.seconds = {"generate": 0.0, "grade": 0.0}  # since the optimizer step began

    def begin(self, policy: str, seed_parts: tuple[str | int, ...]) -> None:
        """Another optimizer step: the digest that its rollouts carry, and the start of its seeds."""
        self._policy, self._seed_parts = policy, seed_parts
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    def sample(
        self,
        problems: Sequence[Problem],
        *,
        sampling: Sampling,
        style: str = "plain",
        turns: Sequence[str] = (),
    ) -> list[Rollout]:
        """``group_size`` rollouts of each problem.

        Args:
            problems: to be solved.
            sampling: at temperature 1 without filters, else the log-probabilities would not be the policy's.
            style: the task's prompt style.
            turns: what will be said in the further turns, so that room is kept for them.

        Raises:
            RecipeError: other sampling, or the longest conversation that may come does not fit into the context.
        """
        if sampling.temperature != 1 or sampling.top_p != 1 or sampling.top_k:
            raise RecipeError(
                "on-policy rollouts are drawn at temperature 1 without top_p and top_k: filtered or sharpened samples are"
                f" not the policy's own (asked for: temperature {sampling.temperature}, top_p {sampling.top_p}, top_k"
                f" {sampling.top_k})"
            )
        self._require_room(sampling, style, turns)
        asks = [self._in_style(problem, style) for problem in problems]
        return self._generate(asks, style, self.group_size, sampling)

    def turn(self, rollouts: Sequence[Rollout], said: str, *, sampling: Sampling) -> list[Rollout]:
        """One next turn of each rollout, after the user's message ``said``."""
        asks = [ask_next_turn(self._problems[r.problem_id], r, said, self._renderer) for r in rollouts]
        return self._generate(asks, "turn", 1, sampling)

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        """The verdict of the task's verifier on each."""
        began = time.monotonic()
        items = [(self._problems[r.problem_id], r.text, r.truncated) for r in rollouts]
        graded = [
            Graded(rollout=rollout, score=score)
            for rollout, score in zip(rollouts, self._grader.grade_many(items), strict=True)
        ]
        self.seconds["grade"] += time.monotonic() - began
        return graded

    def given(self, problem: Problem) -> list[Rollout]:
        """The rollouts of a problem that were sampled before the job, without log-probabilities."""
        return [rollout.model_copy(update={"logps": None}) for rollout in self._given.get(problem.id, ())]

    def rng(self, name: str) -> random.Random:
        """A generator of its own for ``name`` at this optimizer step: the only randomness a rollout function may use."""
        return random.Random(derive_seed(*self._seed_parts, name))

    def close(self) -> None:
        """Give grading processes back."""
        self._grader.close()

    def _in_style(self, problem: Problem, style: str) -> Ask:
        messages, opening = self.task.messages(problem, style), self.task.opening(style)
        return ask_in_style(problem, messages, opening, self._renderer)

    def _generate(self, asks: Sequence[Ask], kind: str, n: int, sampling: Sampling) -> list[Rollout]:
        began = time.monotonic()
        asking = Asking(
            policy=self._policy,
            tokenizer=self._renderer.digest,
            kind=kind,
            n=n,
            sampling=sampling.model_copy(update={"logprobs": True}),
            seed_parts=self._seed_parts,
        )
        requests = [asking.request(ask) for ask in asks]
        answers = {(c.request, c.index): c for c in self._engine.generate(requests)}
        rollouts = [
            asking.rollout(ask, request, index, logged(answers[request.key, index]), self._renderer)
            for ask, request in zip(asks, requests, strict=True)
            for index in range(n)
        ]
        self.seconds["generate"] += time.monotonic() - began
        return rollouts

    def _require_room(self, sampling: Sampling, style: str, turns: Sequence[str]) -> None:
        """Once for all problems, before anything is sampled: a conversation is never cut, so it must fit whole."""
        key = digest([style, sampling.max_new_tokens, list(turns)])
        if key in self._has_room:
            return
        asks = (self._in_style(problem, style) for problem in self._problems.values())
        require_room(asks, turns, sampling.max_new_tokens, self._max_length, self._renderer)
        self._has_room.add(key)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What one sampling gave: every rollout with its verdict, and the rows to learn from.

    ``num_dropped`` problems had a rollout that could not be graded; ``seconds`` are those of generating and grading.
    """

    graded: list[Graded]
    rows: list[PolicyGradientExample]
    num_dropped: int
    seconds: dict[str, float]

    def statistics(self) -> dict[str, float]:
        """Means of this sampling by attempt: reward of the rows, share of cells whose rewards are all equal, accuracy,
        length, share of cut answers; ``reward`` is the sum of the attempts' mean rewards."""
        found: dict[str, float] = {"reward": 0.0, "dropped_problems": float(self.num_dropped)}
        for attempt in sorted({row.attempt for row in self.rows}):
            rows = [row for row in self.rows if row.attempt == attempt]
            rewards = np.array([row.reward for row in rows])
            found[f"reward_{attempt}"] = float(rewards.mean())
            found["reward"] += float(rewards.mean())
            places = cells([row.group for row in rows], [attempt] * len(rows))
            found[f"zero_variance_share_{attempt}"] = zero_variance_share(rewards, places)
        attempts = np.array(attempts_of([row.rollout for row in self.graded]))
        for attempt in np.unique(attempts).tolist():
            here = [row for row, number in zip(self.graded, attempts, strict=True) if number == attempt]
            found[f"accuracy_{attempt}"] = float(np.mean([row.correct for row in here]))
            found[f"tokens_{attempt}"] = float(np.mean([len(row.rollout.completion_ids) for row in here]))
            found[f"truncated_{attempt}"] = float(np.mean([row.rollout.truncated for row in here]))
        return found

    def keep(self, out_dir: Path, optimizer_step: int, **made: npt.NDArray[np.float64]) -> None:
        """Leave the rollouts, and what was made of them, for the supervisor to commit.

        Args:
            out_dir: of the job.
            optimizer_step: the first one that can learn from them.
            made: further columns of ``records.Credit``, one number a row.
        """
        places = {row.rollout_id: place for place, row in enumerate(self.rows)}
        path = experience_path(out_dir, optimizer_step)
        staged = path.with_suffix(".partial")  # the supervisor may be looking
        write_records(staged, (self._experience(row, optimizer_step, places, made) for row in self.graded))
        staged.rename(path)

    def _experience(
        self, row: Graded, optimizer_step: int, places: Mapping[str, int], made: Mapping[str, npt.NDArray[np.float64]]
    ) -> Experience:
        place, found = places.get(row.rollout.id), {}
        if place is not None:
            example = self.rows[place]
            columns = {name: float(values[place]) for name, values in made.items()}
            found = {"reward": example.reward, "kl_coef": example.kl_coef, **columns}
        credit = Credit(optimizer_step=optimizer_step, **found)
        return Experience(rollout=row.rollout, score=row.score, credit=credit)


class Collector:
    """Makes the rows of one job, sampling by sampling.

    Args:
        job: of kind ``policy_gradient``.
        spec: its on-policy part.
        engine: with the start's weights in place.
        settings: of the trainer.
    """

    def __init__(self, job: TrainJob, spec: OnPolicyJob, engine: Engine, settings: PolicyGradientSettings) -> None:
        task_class, task_settings = load_part(spec.task)
        self.rollout, self.rollout_settings = load_part(spec.rollout)
        self.rewards, self.rewards_settings = load_part(spec.rewards)
        self.problems = read_records(Path(spec.problems), Problem)
        given: dict[str, list[Rollout]] = {}
        for rollout in read_records(Path(spec.given), Rollout) if spec.given else []:
            given.setdefault(rollout.problem_id, []).append(rollout)
        self.state: State = {}
        self.code = spec.code
        self._job = job
        self._live = Live(
            engine=engine,
            renderer=Renderer.load(spec.tokenizer),
            task=task_class(task_settings),
            problems={problem.id: problem for problem in self.problems},
            group_size=settings.group_size,
            max_length=settings.max_length,
            given=given,
        )

    def collect(self, number: int, problems: Sequence[Problem]) -> list[Graded]:
        """The rollouts of sampling ``number`` (from 1)."""
        # The weights of the moment have no digest of their own; where they come from says which they are.
        policy = digest(["on_policy", self._job.start.weights, self._job.seed, number])
        self._live.begin(policy, ("on_policy", self._job.seed, number))
        return list(self.rollout(self._live, problems, self.rollout_settings))

    def reward(self, graded: list[Graded]) -> Collected:
        """Rows of rollouts, groups with an ungraded one left out.

        Raises:
            Finding: nothing could be graded, so that there is nothing to learn from.
        """
        lost = {row.rollout.problem_id for row in graded if row.score.value is None}
        kept = [row for row in graded if row.rollout.problem_id not in lost]
        self.state, rows = self.rewards(self.state, kept, self.rewards_settings)
        if not rows:
            raise Finding(
                "nothing to learn from: no rollout of a sampling was turned into a row",
                evidence={"rollouts": len(graded), "groups with an ungraded rollout": len(lost)},
                hint="look at the rollouts of the run, and at the grader",
            )
        return Collected(graded=graded, rows=rows, num_dropped=len(lost), seconds=dict(self._live.seconds))

    def close(self) -> None:
        self._live.close()


def plan_problems(num_problems: int, size: int, num_samplings: int, seed: int) -> list[list[int]]:
    """The problems of every sampling, by number: none twice in one sampling, where its groups would be one, and each used
    about as often as any other. A plan for more samplings begins with the plan for fewer.

    Raises:
        Finding: there are fewer problems than one sampling takes.
    """
    if num_problems < size:
        raise Finding(
            f"{num_problems} problems are fewer than the {size} of one sampling",
            evidence={"problems": num_problems, "problems of a sampling": size},
            hint="lower batch_size, raise group_size, or let more problems take part",
        )
    plan: list[list[int]] = []
    waiting: list[int] = []
    epoch = 0
    for _ in range(num_samplings):
        if len(waiting) < size:
            order = np.random.default_rng(derive_seed("on_policy", seed, epoch)).permutation(num_problems).tolist()
            held = set(waiting)
            # what still waits comes first, and once
            waiting += [number for number in order if number not in held] + [n for n in order if n in held]
            epoch += 1
        plan.append(waiting[:size])
        waiting = waiting[size:]
    return plan


def attempts_of(rollouts: Sequence[Rollout]) -> list[int]:
    """The number of each rollout's attempt, from 1: how many of ``rollouts`` it goes back to, itself included."""
    by_id: dict[str, int] = {}
    for rollout in rollouts:
        by_id[rollout.id] = 1 + by_id.get(rollout.parent_id or "", 0)
    return [by_id[rollout.id] for rollout in rollouts]
