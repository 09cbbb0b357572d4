"""Chains of operations on a two-digit counter: what the tasks ``arith`` and ``arith_judge`` are made of.

Results keep their last two digits, so every number is one of 0 to 99. Everything about a solution can be checked by
program: the answer, the first wrong step, the share of right steps.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import model_validator

from reasonrun.errors import RecipeError
from reasonrun.prompts import arith as words
from reasonrun.randomness import derive_seed
from reasonrun.records import Problem
from reasonrun.settings import Effect, Settings, setting

Operator = Literal["*", "+", "-"]
_PHRASES = {"*": words.MULTIPLY, "+": words.ADD, "-": words.SUBTRACT}
_STEP_LINE = re.compile(r"^Step (\d+): (\d+) ([*+-]) (\d+) = (\d+)$")
ANSWER = "Answer:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One line of a solution: ``left operator right = result``."""

    left: int
    operator: Operator
    right: int
    result: int

    @property
    def correct(self) -> bool:
        return self.result == apply(self.left, self.operator, self.right)

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """The bare content of a problem: a start number and operations, each (operator, operand)."""

    start: int
    operations: tuple[tuple[Operator, int], ...]

    def solve(self) -> tuple[Step, ...]:
        """The gold steps."""
        steps, value = [], self.start
        for operator, operand in self.operations:
            result = apply(value, operator, operand)
            steps.append(Step(left=value, operator=operator, right=operand, result=result))
            value = result
        return tuple(steps)

    @property
    def split(self) -> str:
        """Where this chain belongs. Disjoint by construction: the split is a hash of the content."""
        share = derive_seed("arith-split", self.start, str(self.operations)) % 1000
        return "dev" if share < 100 else "test" if share < 200 else "train" if share < 500 else "pretrain"


def apply(left: int, operator: Operator, right: int) -> int:
    """The counter's arithmetic: the last two digits of the result."""
    if operator == "*":
        return left * right % 100
    return (left + right) % 100 if operator == "+" else (left - right) % 100


def draw_chain(rng: random.Random, *, min_steps: int, max_steps: int, multiplications: int) -> Chain:
    """A random chain with ``multiplications`` products at random places; sums and differences never wrap around."""
    num_steps = rng.randint(max(min_steps, multiplications), max_steps)
    products = set(rng.sample(range(num_steps), multiplications))
    start = value = rng.randint(2, 99)
    operations: list[tuple[Operator, int]] = []
    for position in range(num_steps):
        operator: Operator
        if position in products:
            operator, operand = "*", rng.randint(2, 9)
        else:
            operand = rng.randint(1, 9)
            operator = "-" if value + operand > 99 or (value >= operand and rng.random() < 0.5) else "+"
        operations.append((operator, operand))
        value = apply(value, operator, operand)
    return Chain(start=start, operations=tuple(operations))


def question_text(chain: Chain, rng: random.Random) -> str:
    """The chain as a story; ``rng`` picks names and phrasings."""
    name = rng.choice(words.NAMES)
    parts = [rng.choice(words.OPENINGS).format(name=name, start=chain.start)]
    parts += [rng.choice(_PHRASES[operator]).format(name=name, n=n) for operator, n in chain.operations]
    return " ".join([*parts, rng.choice(words.QUESTIONS)])


def solution_text(steps: Sequence[Step], *, first: int = 1) -> str:
    """Steps as labelled lines, the first one numbered ``first``, then the answer."""
    lines = [f"Step {number}: {step}" for number, step in enumerate(steps, start=first)]
    return "\n".join([*lines, f"{ANSWER} {steps[-1].result}"])


def mistaken_result(step: Step, rng: random.Random) -> int:
    """A plausible wrong result: a product loses or gains tens (a forgotten carry), a sum slips by one or by ten."""
    offsets = [10, 20, -10, -20, 30, -30] if step.operator == "*" else [1, -1, 10, -10, 2, -2]
    return (apply(step.left, step.operator, step.right) + rng.choice(offsets)) % 100


def solve_with_mistakes(chain: Chain, wrong_steps: frozenset[int], rng: random.Random) -> tuple[Step, ...]:
    """A solution whose steps at the given positions (from 0) have wrong results, carried on consistently."""
    steps, value = [], chain.start
    for position, (operator, operand) in enumerate(chain.operations):
        step = Step(left=value, operator=operator, right=operand, result=apply(value, operator, operand))
        if position in wrong_steps:
            result = mistaken_result(step, rng)
            step = Step(left=value, operator=operator, right=operand, result=result)
        steps.append(step)
        value = step.result
    return tuple(steps)


def parse_steps(text: str) -> tuple[Step, ...] | None:
    """The steps of a solution, or None when its lines are not steps 1..n followed by one answer line."""
    lines = text.strip().split("\n")
    steps = []
    for number, line in enumerate(lines[:-1], start=1):
        match = _STEP_LINE.match(line)
        if match is None or int(match[1]) != number:
            return None
        operator: Operator = match[3]  # type: ignore[assignment]
        steps.append(Step(left=int(match[2]), operator=operator, right=int(match[4]), result=int(match[5])))
    return tuple(steps) if steps and lines[-1].startswith("Answer:") else None


def rubric_score(steps: Sequence[Step]) -> int:
    """1 to 5: one plus four times the share of right steps, rounded down."""
    return 1 + 4 * sum(step.correct for step in steps) // len(steps)


def judge_prompt(question: str, solution: str) -> str:
    """The judge's user turn for one solution."""
    return words.JUDGE.format(question=question, solution=solution)


def judgement_text(steps: Sequence[Step]) -> str:
    """The gold judgement: every step quoted, computed again and compared, then the score."""
    lines = []
    for number, step in enumerate(steps, start=1):
        result = apply(step.left, step.operator, step.right)
        verdict = "right" if step.correct else "wrong"
        lines.append(f"Step {number}: {step} , I get {result} {verdict}")
    return "\n".join([*lines, f"[RESULT] {rubric_score(steps)}"])


def chain_of(problem: Problem) -> Chain:
    """The chain that an ``arith`` problem was made from."""
    operations: Any = problem.meta["operations"]
    start: Any = problem.meta["start"]
    return Chain(start=start, operations=tuple((operator, operand) for operator, operand in operations))


class ChainSettings(Settings):
    """What a recipe can say about generated chains."""

    num_train: int = setting(1200, Effect.SEMANTIC, "Training problems.", ge=1)
    num_dev: int = setting(300, Effect.SEMANTIC, "Problems of the dev split.", ge=1)
    num_test: int = setting(1000, Effect.SEMANTIC, "Problems of the test split.", ge=1)
    min_steps: int = setting(2, Effect.SEMANTIC, "Fewest operations in a problem.", ge=1, le=4)
    max_steps: int = setting(4, Effect.SEMANTIC, "Most operations in a problem.", ge=1, le=4)
    multiplications: int = setting(1, Effect.SEMANTIC, "Products in each problem.", ge=0, le=4)
    seed: int = setting(0, Effect.SEMANTIC, "Seed of the problem sets; not the run seed.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.multiplications > self.max_steps or self.min_steps > self.max_steps:
            raise ValueError(
                f"{self.multiplications} multiplications and min_steps {self.min_steps} do not fit in max_steps"
                f" {self.max_steps}; raise max_steps (at most 4) or lower the others"
            )
        return self


def distinct_problems(
    task: str, config: ChainSettings, split: str, make: Callable[[Chain, random.Random], Problem]
) -> Sequence[Problem]:
    """As many different problems of ``split`` as ``config`` asks for; splits are disjoint by their chains.

    Args:
        task: whose problems; starts the seeds.
        config: how many, and what chains.
        split: train, dev or test.
        make: a problem of a chain, and a generator that the chain alone seeds.

    Raises:
        RecipeError: no such split, or fewer problems than asked for.
    """
    wanted = {"train": config.num_train, "dev": config.num_dev, "test": config.num_test}.get(split)
    if wanted is None:
        raise RecipeError(f"task {task} has no split {split!r}; it has train, dev, test")
    problems: dict[str, Problem] = {}
    for chain, rng in _chains(task, config, split):
        problem = make(chain, rng)
        problems.setdefault(problem.id, problem)
        if len(problems) == wanted:
            return tuple(problems.values())
    raise RecipeError(
        f"task {task}: only {len(problems)} different problems exist in split {split} for these settings,"
        f" {wanted} were asked for",
        hint=f"lower task.num_{split} or raise task.max_steps",
    )


def _chains(task: str, config: ChainSettings, split: str) -> Iterator[tuple[Chain, random.Random]]:
    rng = random.Random(derive_seed(task, config.seed, split))
    for _ in range(200 * (config.num_train + config.num_dev + config.num_test)):
        chain = draw_chain(
            rng, min_steps=config.min_steps, max_steps=config.max_steps, multiplications=config.multiplications
        )
        if chain.split == split:
            yield chain, random.Random(derive_seed(f"{task}-story", chain.start, str(chain.operations)))
