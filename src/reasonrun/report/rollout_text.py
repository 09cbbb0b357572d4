"""Rollouts as a person or a program reads them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from reasonrun.records import Score
from reasonrun.report.rollouts import NOT_GRADED, RolloutPage, ScoredRollout
from reasonrun.report.run_record import RunRecord

_INDENT = 12
_MANY = 8  # step names in one line


def describe_rollout(shown: ScoredRollout, *, with_prompt: bool) -> list[str]:
    """One rollout as lines: where it comes from, what was asked, what was answered, and how that was scored."""
    rollout, problem = shown.rollout, shown.problem
    where = shown.step if shown.round is None else f"round {shown.round}  {shown.step}"
    lines = [
        f"{where}  problem {rollout.problem_id}  sample {rollout.index}"
        f"  {shown.num_tokens} tokens, {rollout.finish_reason}"
    ]
    if rollout.parent_id is not None:
        lines += _block("parent", rollout.parent_id)
    if problem is not None:
        lines += _block("question", "\n".join(message.content for message in problem.messages))
    if with_prompt:
        lines += _block("prompt", "\n".join(f"{message.role}: {message.content}" for message in rollout.messages))
    lines += _block("completion", rollout.text)
    if problem is not None:
        lines += _block("reference", problem.reference)
    for step, score in shown.scores:
        lines += _block("verdict", f"{_verdict(score)} ({score.grader}, {step})")
    if not shown.scores:
        lines += _block("verdict", NOT_GRADED)
    return lines


def _block(name: str, text: str) -> list[str]:
    first, *rest = text.split("\n")
    return [f"  {name:{_INDENT}}{first}".rstrip(), *(f"  {'':{_INDENT}}{line}".rstrip() for line in rest)]


def _verdict(score: Score) -> str:
    value = "no score" if score.value is None else f"score {score.value:g}"
    answer = "no answer read" if score.answer is None else f"answer {score.answer}"
    return f"{score.reason}: {value}, {answer}"


def describe_page(run: RunRecord, page: RolloutPage) -> list[str]:
    """What the rollouts above are part of; when there are none, which filter left nothing and what there is."""
    steps = f"{len(page.steps)} step{'s' * (len(page.steps) != 1)}"
    if page.num_matching:
        lines = [
            f"{len(page.shown)} shown of {page.num_matching} that match, of {page.num_rollouts} rollouts in {steps}"
            f" ({_counts(page.verdicts)})"
        ]
        if len(page.shown) < page.num_matching:
            lines[0] += f"; --limit {page.num_matching} shows all"
    elif not page.steps:
        lines = ["no committed step has rollouts to show"]
    else:
        lines = [f"no rollout matches, of {page.num_rollouts} rollouts in {steps}: {_listed(page.steps)}"]
        for name, count in page.num_left.items():
            lines.append(f"  {name} leaves {count}{'' if count else _what_there_is(name, page)}")
            if not count:
                break
    return lines + _notes(run, page)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more


def _what_there_is(name: str, page: RolloutPage) -> str:
    """The values that a filter could have let through."""
    if name == "--problem" and page.problem is not None:
        return f"; {page.problem.id} is a problem of the split {page.problem.split}"
    if name.startswith("--verdict"):
        return f"; there are {_counts(page.verdicts_before)}"
    if page.tokens_before is not None:
        return "; completions have {} to {} tokens".format(*page.tokens_before)
    return ""


def _notes(run: RunRecord, page: RolloutPage) -> list[str]:
    lines = []
    if page.num_evaluations_left_out:
        lines.append(f"left out: {page.num_evaluations_left_out} sample steps of evaluations; --evaluation shows them")
    if run.num_unlisted:
        lines.append(
            f"left out: {run.num_unlisted} committed steps that metrics.jsonl does not list; the run no longer reaches"
            " them, or stopped before noting them"
        )
    if run.result is None:
        lines.append(f"{run.path} is unfinished: {run.num_unfinished} steps are begun and not committed, not shown")
    return lines


def _counts(verdicts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in verdicts.most_common())


def page_document(run: RunRecord, page: RolloutPage, *, with_prompt: bool) -> dict[str, Any]:
    """The same as one JSON value; texts are as the model wrote them."""
    return {
        "run": str(run.path),
        "state": run.state,
        "num_unfinished_steps": run.num_unfinished,
        "num_unlisted_steps": run.num_unlisted,
        "steps": page.steps,
        "num_evaluation_steps_left_out": page.num_evaluations_left_out,
        "num_rollouts": page.num_rollouts,
        "num_matching": page.num_matching,
        "num_left_by_filter": page.num_left,
        "verdicts": dict(page.verdicts),
        "verdicts_before_filter": dict(page.verdicts_before),
        "tokens_before_filter": page.tokens_before,
        "rollouts": [_document(shown, with_prompt=with_prompt) for shown in page.shown],
    }


def _document(shown: ScoredRollout, *, with_prompt: bool) -> dict[str, Any]:
    rollout, problem = shown.rollout, shown.problem
    value = {
        "id": rollout.id,
        "round": shown.round,
        "step": shown.step,
        "problem_id": rollout.problem_id,
        "sample": rollout.index,
        "parent_id": rollout.parent_id,
        "question": None if problem is None else [message.content for message in problem.messages],
        "reference": None if problem is None else problem.reference,
        "completion": rollout.text,
        "num_tokens": shown.num_tokens,
        "finish_reason": rollout.finish_reason,
        "scores": [{"step": step, **score.model_dump(mode="json")} for step, score in shown.scores],
    }
    if with_prompt:
        value["prompt"] = [message.model_dump(mode="json") for message in rollout.messages]
    return value
