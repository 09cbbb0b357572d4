"""Evaluations of a run, item by item, from its sealed tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reasonrun.records import digest
from reasonrun.report.run_record import RunRecord

FINAL = "final-"  # scope of what a run measures at its end


@dataclass(slots=True)
class Item:
    """One problem of an evaluation: how it was asked, what counts as right, how often it was right."""

    reference: str
    prompt: str  # digest of the messages, without what the model said itself
    num_correct: int = 0
    num_samples: int = 0

    @property
    def share(self) -> float:
        return self.num_correct / self.num_samples


@dataclass(frozen=True, kw_only=True)
class EvaluationPart:
    """The greedy or the sampled half of one evaluation, or a further attempt of one.

    Attributes:
        name: ``test last``, or the step's name; the same in every run of the same shape.
        part: ``greedy`` or ``sampled``; ``greedy turn 2`` for the second attempt.
        settings: what scores depend on besides the policy, by the name that a reader knows it by.
        items: by problem id, in the order of the evaluation.
    """

    name: str
    part: str
    split: str
    settings: dict[str, Any]
    items: dict[str, Item]


def evaluation_steps(run: RunRecord) -> dict[str, str]:
    """The committed evaluations by a name that runs have in common.

    ``test last`` is there even where the run did not measure it apart, since the last checkpoint was the best or the
    base one: it is then the step that measured those weights.
    """
    steps = {_common_name(step): step for step in run.names("evaluate")}
    tests = {step: run.fingerprint(step) for step in steps.values() if step.startswith(FINAL)}
    by_weights = {seen["policy"]: step for step, seen in tests.items() if seen["split"] == "test"}
    for which in ("last", "best"):
        weights = ((run.result or {}).get(which) or {}).get("weights")
        if f"test {which}" not in steps and weights in by_weights:
            steps[f"test {which}"] = by_weights[weights]
    return steps


def _common_name(step: str) -> str:
    """The scope ``final-trainings=3`` counts trainings, so runs of unequal length name their ends differently."""
    scope, _, rest = step.partition("/")
    if not scope.startswith(FINAL):
        return step
    return rest.replace("test-", "test ", 1) if rest.startswith("test-") else f"final/{rest}"


def part_steps(run: RunRecord, evaluation: str) -> dict[str, tuple[str, str]]:
    """The parts of an evaluation step: (sample step, grade step) by ``greedy``, ``greedy turn 2``, ``sampled`` …"""
    parts = {}
    for grade_step in run.fingerprint(evaluation)["inputs"]:
        sampled = run.fingerprint(grade_step)["inputs"][0]
        parts[sampled.rsplit("/", 1)[-1].replace("-", " ")] = (sampled, grade_step)
    return parts


def read_part(run: RunRecord, name: str, evaluation: str, part: str) -> EvaluationPart:
    """One part of an evaluation with every item. Raises RunFailed when a table is damaged."""
    sampled, grade_step = part_steps(run, evaluation)[part]
    asked, graded = run.fingerprint(sampled), run.fingerprint(grade_step)
    first, num_earlier = asked, 0
    while first["kind"] == "turn":
        first, num_earlier = run.fingerprint(first["inputs"][0]), num_earlier + 1
    settings = {
        "style": first["kind"],
        "num_samples": first["n"],
        "seed": asked["seed"][1],
        **{key: value for key, value in asked["sampling"].items() if key != "logprobs"},
        "grader": graded["grader"],
        "grader_settings": graded["settings"],
    }
    split = run.fingerprint(evaluation)["split"]
    items = _items(run, sampled, grade_step, num_earlier)
    return EvaluationPart(name=name, part=part, split=split, settings=settings, items=items)


def _items(run: RunRecord, sampled: str, grade_step: str, num_earlier: int) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for rollouts, (scores,) in run.scored_parts(sampled, [grade_step]):
        ids = rollouts.column("problem_id")
        # but for earlier attempts all samples of a problem share one prompt, so only first rows are decoded
        firsts = {problem_id: row for row, problem_id in reversed(list(enumerate(ids))) if problem_id not in items}
        rows = sorted(firsts.values())
        for row, messages in zip(rows, rollouts.take(rows).column("messages") if rows else [], strict=True):
            own = {len(messages) - 2 * number for number in range(1, num_earlier + 1)}
            prompt = digest([[said.role, said.content] for place, said in enumerate(messages) if place not in own])
            items[ids[row]] = Item(reference="", prompt=prompt)
        for problem_id, value in zip(ids, scores.column("value"), strict=True):
            items[problem_id].num_samples += 1
            items[problem_id].num_correct += value is not None and value >= 1.0  # ungraded is incorrect here
    for problem_id, problem in run.problems(items).items():
        items[problem_id].reference = problem.reference
    return items
