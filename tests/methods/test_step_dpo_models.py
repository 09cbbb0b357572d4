"""Step-DPO with a judge and a teacher behind an endpoint, on the scripted engine."""

from __future__ import annotations

from engines.endpoint_stub import STEP, Reply, Stub, is_right, serving, verdict
from reasonrun.cli.progress import SilentProgress
from reasonrun.models import resolve
from reasonrun.recipe import load
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import PreferenceExample, Rollout, Score
from reasonrun.rendering import Renderer
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows
from reasonrun.tasks.arith import Arith

SMALL = ["task.num_train=6", "task.num_dev=2", "task.num_test=2", "method.held_out=false", "evaluate.num_samples=0"]


def execute(directory, *overrides):
    recipe = load("smoke_step_dpo", [*SMALL, *overrides])
    return run(recipe, RunOptions(directory=directory), SilentProgress())


def rows_of(directory, step, record):
    return list(Rows.load(record, sorted((directory / "steps" / step).glob("rows-*.parquet")), directory / "derived"))


def teacher(body):
    """A judge and a teacher in one: the teacher solves the problem by the steps that it is shown."""
    prompt = body["messages"][-1]["content"]
    if "### Next step" not in prompt:
        return Reply(verdict(prompt))
    return Reply(teacher.steps[prompt.split("\n")[1]][int(prompt.rpartition("Write step ")[2].split(" ")[0]) - 1])


def test_a_teacher_behind_an_endpoint_writes_the_winning_steps(tmp_path):
    task = Arith(Arith.Settings(num_train=6, num_dev=2, num_test=2))
    problems = task.problems("train")
    teacher.steps = {p.messages[-1].content: task.solution(p).split("\n") for p in problems}
    with serving(Stub(teacher)) as stub:
        execute(
            tmp_path / "run",
            "method.collect.num_samples=8",
            "method.localize.kind=llm_no_ref",
            "method.localize.judge=big",
            "method.arm=step_dpo_teacher",
            "method.teacher=big",
            f"models.big.endpoint.url={stub.url}",
            "models.big.endpoint.model=big",
            "models.big.endpoint.api_key_env=null",
        )
    pairs = rows_of(tmp_path / "run", "round-001/pairs-teacher", PreferenceExample)
    renderer = Renderer.load(resolve(ModelSettings(name="tiny")).path)
    taught = {rollout.id: rollout for rollout in rows_of(tmp_path / "run", "round-001/teach", Rollout)}
    assert pairs and {pair.source for pair in pairs} == {"teacher"}
    for pair in pairs:
        assert taught.keys() & set(pair.rollout_ids)
        chosen, rejected = renderer.decode(pair.chosen_ids), renderer.decode(pair.rejected_ids)
        label = renderer.decode(pair.prefix_ids).rpartition("\n")[2]
        (right,) = _steps(label + chosen)
        (wrong,) = _steps(label + rejected)
        assert is_right(right) and not is_right(wrong)
        assert chosen.startswith(" ") and chosen.endswith("\n") and renderer.eos_ids[0] not in pair.chosen_ids
    # Asked about errors only that some continuation repaired.
    continued = rows_of(tmp_path / "run", "round-001/rectify", Rollout)
    scores = rows_of(tmp_path / "run", "round-001/grade-rectified", Score)
    repaired = {rollout.parent_id for rollout, score in zip(continued, scores, strict=True) if score.correct}
    assert {rollout.parent_id for rollout in taught.values()} == repaired
    assert repaired < {rollout.parent_id for rollout in continued}


def _steps(text):
    return list(STEP.finditer(text.rstrip("\n")))
