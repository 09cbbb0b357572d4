"""Step-DPO with the carried model as its own judge, in a worker process."""

import json

import pytest

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import Finding
from reasonrun.recipe import load
from reasonrun.records import Rollout
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows

SMALL = [
    "task.num_train=6",
    "task.num_dev=2",
    "task.num_test=2",
    "evaluate.num_samples=0",
    "engine=hf",
    "launcher.devices=cpu",
    "method.held_out=false",
    "method.localize.verdict_tokens=48",
    "method.localize.kind=llm_with_ref",
]


@pytest.mark.slow
def test_the_policy_judges_itself_badly_and_the_run_says_so(tmp_path):
    with pytest.raises(Finding):
        run(load("smoke_step_dpo", SMALL), RunOptions(directory=tmp_path / "run"), SilentProgress())
    step = tmp_path / "run/steps/round-001/localize/ask"
    asked = list(Rows.load(Rollout, sorted(step.glob("rows-*.parquet")), tmp_path / "cache"))
    assert asked and all("### Correct solution\nStep 1:" in rollout.messages[0].content for rollout in asked)
    assert all(rollout.prompt_ids and rollout.completion_ids for rollout in asked)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    left_out = next(line for line in lines if line["step"] == "round-001/localize/locate")["left_out"]
    assert sum(count for reason, count in left_out.items() if reason.startswith("judge: ")) == len(asked)
