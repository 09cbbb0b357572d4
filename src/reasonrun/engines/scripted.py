"""The scripted engine: deterministic answers without a model, for tests, plans and trying a recipe out.

It solves a problem with a probability that its checkpoint's skill sets, and writes the answer in the task's own form.
Skill rises with every training step of the checkpoint's history (``trainers/scripted.py``). Like every engine, it
makes a row from the request alone, so that batches, order and kills change nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from reasonrun.contracts import Task
from reasonrun.errors import RunFailed
from reasonrun.generation import Completion, Request
from reasonrun.prompts import step_correction, step_verdict
from reasonrun.randomness import derive_seed, row_seed, uniforms
from reasonrun.records import Checkpoint, Problem
from reasonrun.rendering import Renderer
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase


class Scripted:
    """Answers by script. Runs inside the supervisor; see the module docstring."""

    in_process: ClassVar[bool] = True
    trainer: ClassVar[str] = "scripted"

    class Settings(SettingsBase):
        """Recipe fields of ``engine: scripted``."""

        name: Literal["scripted"] = "scripted"
        accuracy: float = setting(0.4, Effect.SEMANTIC, "Share of right answers of the base model.", ge=0, le=1)
        gain: float = setting(0.1, Effect.SEMANTIC, "Rise of that share with every training step, at most to 1.")
        spread: float = setting(0.6, Effect.SEMANTIC, "How much problems differ in difficulty.", ge=0, le=2)
        truncated: float = setting(0.02, Effect.SEMANTIC, "Share of completions cut at the token limit.", ge=0, le=1)
        unanswered: float = setting(0.02, Effect.SEMANTIC, "Share of completions without an answer.", ge=0, le=1)
        seconds_per_unit: float = setting(0.0, Effect.OPERATIONAL, "Pause before each unit, to watch or to kill.", ge=0)
        fail_at_unit: int = setting(0, Effect.OPERATIONAL, "Raise at this unit of a step (from 1); 0 never.", ge=0)
        unit_rows: int = setting(64, Effect.OPERATIONAL, "Completions per unit of work.", ge=1)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.skill = settings.accuracy
        self.num_units = 0

    def attach(self, task: Task, problem_of: Callable[[str], Problem], renderer: Renderer) -> None:
        """Give the script what a model would know: the task, the problem behind a request, the tokenizer."""
        self._task, self._problem_of, self._renderer = task, problem_of, renderer

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the skill of ``checkpoint``; a real model's folder counts as the base."""
        path = Path(checkpoint.path) / "scripted.json"
        trained = json.loads(path.read_text())["num_trainings"] if path.exists() else 0
        self.skill = min(1.0, self.settings.accuracy + self.settings.gain * trained)
        self.num_units = 0

    def update(self, weights: Iterable[tuple[str, Any]]) -> None:
        """A script has no weights."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in request order. Raises RunFailed at ``fail_at_unit``."""
        self.num_units += 1
        if self.settings.fail_at_unit == self.num_units:
            raise RunFailed(f"the scripted engine failed at unit {self.num_units}, as engine.fail_at_unit asks")
        if self.settings.seconds_per_unit:
            time.sleep(self.settings.seconds_per_unit)
        for request in requests:
            problem = self._problem_of(request.problem_id)
            for index in range(request.n):
                yield self._complete(request, problem, index)

    def _complete(self, request: Request, problem: Problem, index: int) -> Completion:
        seed = row_seed(request.seed, index)
        fate, luck = (float(uniforms(np.array([seed], dtype=np.uint64), position)[0]) for position in (0, 1))
        ease = self.settings.spread * (derive_seed("ease", problem.id) % 1000 / 1000 - 0.5)
        given = self._renderer.decode(request.prompt_ids[len(request.prompt_ids) - request.num_given :])

        def answer(prefix: str) -> str:
            return self._task.scripted_answer(problem, correct=luck < self.skill + ease, seed=seed, prefix=prefix)

        said = request.messages and (
            step_verdict.scripted(request.messages, seed) or step_correction.scripted(request.messages, answer)
        )
        text = said or answer(given)
        if fate < self.settings.unanswered:
            text = "I do not know."
        ids = (*self._renderer.encode(text), self._renderer.eos_ids[0])
        if fate > 1 - self.settings.truncated or len(ids) > request.sampling.max_new_tokens:
            ids = ids[: max(1, min(len(ids) // 2, request.sampling.max_new_tokens))]
            return self._completion(request, index, ids, "length")
        return self._completion(request, index, ids, "stop")

    def _completion(
        self, request: Request, index: int, ids: tuple[int, ...], finish_reason: Literal["stop", "length"]
    ) -> Completion:
        return Completion(
            request=request.key,
            index=index,
            token_ids=ids,
            text=self._renderer.decode(ids),
            finish_reason=finish_reason,
            logps=tuple(-0.5 for _ in ids) if request.sampling.logprobs else None,
        )

    def logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """A constant: the script has no distribution."""
        return [[-0.5] * len(completion) for _, completion in sequences]

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        """Nothing to give back."""
