"""``arith_judge``: solutions of generated word problems, to be scored from 1 to 5 by the share of right steps.

An item is a problem of ``arith`` with a solution in which some steps are wrong on purpose, from none to all. The gold score
is computed, so that a judge's accuracy and correlation carry no label noise.

    >>> task = ArithJudge(ArithJudge.Settings(num_train=2, num_dev=1, num_test=1))
    >>> item = task.problems("dev")[0]
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from reasonrun.chains import (
    ANSWER,
    Chain,
    ChainSettings,
    Step,
    distinct_problems,
    judge_prompt,
    judgement_text,
    question_text,
    rubric_score,
    solution_text,
    solve_with_mistakes,
)
from reasonrun.contracts import Grader, Task
from reasonrun.errors import RecipeError
from reasonrun.grading.judgement import HIGHEST, LOWEST, MARKER, JudgementGrader
from reasonrun.judging import judging_section
from reasonrun.prompts import arith as words
from reasonrun.records import Graded, Message, Problem, digest

_CHECKED = re.compile(r"^(Step \d+: \d+ [*+-] \d+ =) \d+ , I get (\d+) (?:right|wrong)$", re.MULTILINE)


class ArithJudge(Task):
    """Solutions to score; see the module docstring."""

    name = "arith_judge"
    prompt_version = words.VERSION
    styles = frozenset({"plain", "score_only"})
    capabilities = frozenset({"solution", "gold_score", "question_about"})
    reads_logps = True

    class Settings(ChainSettings):
        """What a recipe can say about ``arith_judge``."""

        name: Literal["arith_judge"] = "arith_judge"

    def problems(self, split: str) -> Sequence[Problem]:
        """Distinct items of ``split``; no two splits share a chain of operations."""
        return distinct_problems("arith_judge", self.config, split, lambda chain, rng: _item(chain, split, rng))

    def messages(self, problem: Problem, style: str) -> tuple[Message, ...]:
        """plain: feedback on every step, then the score. score_only: the same prompt, answered by the score alone."""
        if style not in self.styles:
            raise RecipeError(f"task arith_judge has no style {style!r}; it has {', '.join(sorted(self.styles))}")
        return problem.messages

    def opening(self, style: str) -> str:
        """A score without feedback begins with the marker."""
        return MARKER if style == "score_only" else ""

    def grader(self) -> Grader:
        """The score after the last marker, against the computed one."""
        return JudgementGrader()

    def tables(self, groups: Sequence[tuple[Problem, Sequence[Graded]]]) -> Mapping[str, Any]:
        """How the scores agree with the computed ones."""
        return {"judging": judging_section(groups)}

    def direct_answer(self, problem: Problem) -> str:
        """The gold score alone."""
        return f"{MARKER} {problem.reference}"

    def solution(self, problem: Problem) -> str:
        """The gold judgement in the form that the carried model writes."""
        return judgement_text(_steps_of(problem))

    def gold_score(self, problem: Problem) -> float:
        """One plus four times the share of right steps, rounded down."""
        return float(problem.reference)

    def question_about(self, problem: Problem, text: str) -> tuple[Message, ...]:
        """Asks how many of a judgement's own calculations are right: they are put as a solution to be scored.

        A judgement without a readable calculation is shown as it is.
        """
        calculations = _CHECKED.findall(text)
        shown = "\n".join([*(f"{step} {result}" for step, result in calculations)])
        shown = f"{shown}\n{ANSWER} {calculations[-1][1]}" if calculations else text
        return (Message(role="user", content=judge_prompt(str(problem.meta["question"]), shown)),)

    def scripted_answer(self, problem: Problem, *, correct: bool, seed: int, prefix: str = "") -> str:
        """The gold judgement, or one that ends with another score."""
        text = self.direct_answer(problem) if prefix else self.solution(problem)
        if not correct:
            others = [score for score in range(LOWEST, HIGHEST + 1) if str(score) != problem.reference]
            text = text[: -len(problem.reference)] + str(random.Random(seed).choice(others))
        return text.removeprefix(prefix)


def _item(chain: Chain, split: str, rng: random.Random) -> Problem:
    question = question_text(chain, rng)
    num_steps = len(chain.operations)
    wrong = frozenset(rng.sample(range(num_steps), rng.randint(0, num_steps)))
    steps = solve_with_mistakes(chain, wrong, rng)
    prompt = judge_prompt(question, solution_text(steps))
    return Problem(
        id=digest(["arith_judge", prompt])[:16],
        task="arith_judge",
        split=split,
        messages=(Message(role="user", content=prompt),),
        reference=str(rubric_score(steps)),
        meta={"question": question, "steps": [[step.left, step.operator, step.right, step.result] for step in steps]},
    )


def _steps_of(problem: Problem) -> tuple[Step, ...]:
    steps: Any = problem.meta["steps"]
    return tuple(Step(left=left, operator=op, right=right, result=result) for left, op, right, result in steps)
