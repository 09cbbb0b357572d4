"""Asking another model about solutions: which step is wrong, and what the step should have been."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reasonrun.curate.first_error import errors
from reasonrun.curate.steps import numbered
from reasonrun.grading.verdict import StepVerdictGrader
from reasonrun.grading.written import WrittenGrader
from reasonrun.prompts import step_correction, step_verdict
from reasonrun.records import Message, Prefix, Problem, Rollout, Sampling

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import GradedSet, PrefixSet


def ask_judge(
    lab: Lab,
    role: str,
    tried: GradedSet,
    *,
    steps: str,
    cap: int,
    with_solution: bool,
    neutral_is_error: bool,
    sampling: Sampling,
) -> GradedSet:
    """The verdict of the model in ``role`` on each wrong solution that can be cut into steps.

    A solution whose prompt does not fit into the judge's context is not asked about.

    Args:
        lab: the lab; the steps are named ``ask`` and ``read``.
        role: who judges.
        tried: graded solutions.
        steps: how to cut them: labels, lines or task.
        cap: at most so many wrong solutions of a problem; 0 is no cap.
        with_solution: show the task's own solution, too.
        neutral_is_error: see ``StepVerdictGrader``.
        sampling: of the verdict.
    """
    shown: dict[str, str] = {}
    for problem in tried.problems:
        for row, found in errors(lab.group(problem), tried.of_problem(problem.id), steps=steps, cap=cap):
            if not isinstance(found, str):
                shown[row.rollout.id] = numbered(row.rollout.text, found.chars)

    def prompt(problem: Problem, rollout: Rollout) -> tuple[Message, ...]:
        solution = lab.task.solution(problem) if with_solution else None
        return step_verdict.messages(problem.messages[-1].content, shown[rollout.id], solution)

    judge = lab.model(role)
    asked = tried.wrong().where(lambda rollout: rollout.id in shown)
    asked = lab.fitting(judge, asked, prompt=prompt, max_new_tokens=sampling.max_new_tokens)
    verdicts = lab.sample(judge, asked, prompt=prompt, n=1, sampling=sampling, name="ask")
    grader = StepVerdictGrader(StepVerdictGrader.Settings(neutral_is_error=neutral_is_error))
    return lab.grade(verdicts, grader=grader, name="read")


def ask_teacher(lab: Lab, role: str, prefixes: PrefixSet, rectified: GradedSet, sampling: Sampling) -> GradedSet:
    """What the model in ``role`` writes as the step after each prefix that has a right continuation in ``rectified``; the
    others give no pair anyway. The steps are named ``teach`` and ``read-teacher``."""
    values = rectified.values
    solved = {rollout.parent_id for rollout, value in zip(rectified.rollouts, values, strict=True) if value >= 1.0}

    def prompt(problem: Problem, prefix: Prefix) -> tuple[Message, ...]:
        so_far = lab.group(problem).decode(prefix.token_ids)
        return step_correction.messages(problem.messages[-1].content, so_far, prefix.num_steps + 1)

    teacher = lab.model(role)
    asked = prefixes.where(lambda prefix: prefix.rollout_ids[0] in solved)
    asked = lab.fitting(teacher, asked, prompt=prompt, max_new_tokens=sampling.max_new_tokens)
    written = lab.sample(teacher, asked, prompt=prompt, n=1, sampling=sampling, name="teach")
    return lab.grade(written, grader=WrittenGrader(), name="read-teacher")
