"""What an endpoint cost: in status, in comparisons, at the end of a run, and as a limit that stops it resumably."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engines.endpoint_stub import Reply, Stub, serving, verdict
from reasonrun.cli.main import app
from reasonrun.cli.progress import SilentProgress
from reasonrun.cli.status import describe, read_run
from reasonrun.cli.train import show
from reasonrun.errors import EnvironmentProblem, Stopped
from reasonrun.generation import EndpointSettings, Usage
from reasonrun.planning import Assumptions, plan
from reasonrun.recipe import load
from reasonrun.recipe_errors import RecipeProblems
from reasonrun.report.comparison import cost
from reasonrun.report.comparison_text import describe_costs
from reasonrun.report.run_record import open_run
from reasonrun.running import RunOptions, run

# 100 tokens read and 7 written in each answer of the stub: 0.0002 + 0.00007 USD
PRICES = ["models.judge.endpoint.prompt_price=2", "models.judge.endpoint.completion_price=10"]
EACH = 100 * 2e-6 + 7 * 10e-6
SMALL = [
    "task.num_train=12",
    "task.num_dev=4",
    "task.num_test=4",
    "method.held_out=false",
    "method.collect.num_samples=4",
    "evaluate.num_samples=0",
    "engine.truncated=0",
    "engine.unanswered=0",
    "method.localize.kind=llm_no_ref",
    "method.localize.judge=judge",
    "models.judge.endpoint.model=big",
    "models.judge.endpoint.api_key_env=null",
]
ASK = "round-001/localize/ask"


@pytest.fixture
def stub():
    with serving(Stub()) as stub:
        yield stub


def recipe(stub, *overrides):
    return load("smoke_step_dpo", [*SMALL, f"models.judge.endpoint.url={stub.url}", *overrides])


def execute(directory, stub, *overrides):
    return run(recipe(stub, *overrides), RunOptions(directory=directory), SilentProgress())


def sealed(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.glob("steps/**/*.parquet")}


def test_a_price_is_per_million_tokens_and_none_is_unknown():
    settings = EndpointSettings(url="http://x/v1", model="m", prompt_price=2.5, completion_price=10.0)
    assert settings.cost(Usage(1_000_000, 500_000)) == 7.5
    assert EndpointSettings(url="http://x/v1", model="m").cost(Usage(1, 1)) is None


def test_tokens_and_cost_are_told_by_step_and_in_total(tmp_path, stub, capsys):
    outcome = execute(tmp_path / "run", stub, *PRICES)
    num = len(stub.answered)
    state = read_run(tmp_path / "run")
    whole, *steps = state["endpoints"]
    assert [step["step"] for step in steps] == [ASK] and whole["step"] == "" and whole["model"] == "big"
    assert (whole["num_prompt_tokens"], whole["num_completion_tokens"]) == (100 * num, 7 * num)
    assert whole["usd"] == pytest.approx(num * EACH)
    line = f"endpoint big: {100 * num:,} prompt and {7 * num:,} completion tokens, {num * EACH:.4f} USD"
    assert line in describe(tmp_path / "run", state)
    show(outcome)
    assert line in capsys.readouterr().out.splitlines()
    took = cost(open_run(tmp_path / "run"))
    assert took.endpoint_usd == pytest.approx(num * EACH) and took.num_endpoint_prompt_tokens == 100 * num
    table = describe_costs([open_run(tmp_path / "run")], [took])
    assert any(row.startswith("USD for endpoints") and row.endswith(f"{num * EACH:.4f}") for row in table)
    result = CliRunner().invoke(app, ["status", str(tmp_path / "run"), "--json"])
    assert json.loads(result.stdout)["endpoints"] == state["endpoints"]


def test_prices_are_no_part_of_what_is_committed_and_may_come_later(tmp_path, stub):
    stub.script.append(Reply("### Final decision\nStep 1: correct", usage=False))
    execute(tmp_path / "run", stub)
    before = sealed(tmp_path / "run")
    state = read_run(tmp_path / "run")
    assert state["endpoints"][0]["usd"] is None and state["endpoints"][0]["num_without_usage"] == 1
    told = describe(tmp_path / "run", state)
    assert any(line.endswith("completion tokens, and 1 answers without usage") for line in told)
    assert cost(open_run(tmp_path / "run")).endpoint_usd is None
    (tmp_path / "run/_OK.json").unlink()
    execute(tmp_path / "run", stub, *PRICES)
    assert sealed(tmp_path / "run") == before
    num = len(stub.answered) - 1
    assert read_run(tmp_path / "run")["endpoints"][0]["usd"] == pytest.approx(num * EACH)
    for path in Path(tmp_path / "run/steps").rglob("*.json"):
        assert b"price" not in path.read_bytes()


def test_a_run_without_endpoints_says_nothing_of_them(tmp_path):
    overrides = [text for text in SMALL if "judge" not in text and "localize" not in text]
    run(load("smoke_step_dpo", overrides), RunOptions(directory=tmp_path / "run"), SilentProgress())
    state = read_run(tmp_path / "run")
    assert state["endpoints"] == [] and not [
        line for line in describe(tmp_path / "run", state) if line.startswith("endpoint")
    ]
    record = open_run(tmp_path / "run")
    took = cost(record)
    assert took.endpoint_usd is None and not [
        line for line in describe_costs([record], [took])[1:] if "endpoint" in line
    ]


def test_a_limit_stops_the_run_resumably_and_a_higher_one_goes_on(tmp_path, stub):
    execute(tmp_path / "clean", stub, *PRICES)
    num = len(stub.answered)
    limit = ["models.judge.endpoint.max_parallel=2", f"models.judge.endpoint.max_cost={4.5 * EACH:.6f}"]
    with serving(Stub()) as other:
        with pytest.raises(Stopped) as stop:
            execute(tmp_path / "run", other, *PRICES, *limit)
        assert stop.value.exit_code == 75
        assert "spent" in str(stop.value) and "models.judge.endpoint.max_cost" in str(stop.value)
        asked = len(other.asked)
        assert 5 <= asked == len(other.answered) <= 6  # what was under way came in
        assert f"{num - asked} answers are missing" in str(stop.value)
        with pytest.raises(Stopped):  # what earlier attempts spent counts
            execute(tmp_path / "run", other, *PRICES, *limit)
        assert len(other.asked) == asked
        execute(tmp_path / "run", other, *PRICES, f"models.judge.endpoint.max_cost={2 * num * EACH:.6f}")
        assert len(other.asked) == num
    assert sealed(tmp_path / "run") == sealed(tmp_path / "clean")
    assert read_run(tmp_path / "run")["endpoints"][0]["num_prompt_tokens"] == 100 * num


def test_a_limit_needs_a_server_that_reports_usage_and_what_it_answered_is_kept(tmp_path, stub):
    execute(tmp_path / "clean", stub)
    silent = Stub(lambda body: Reply(verdict(body["messages"][-1]["content"]), usage=False))
    one_by_one = ["models.judge.endpoint.max_parallel=1"]
    with serving(silent):
        with pytest.raises(EnvironmentProblem, match="answers without usage"):
            execute(tmp_path / "run", silent, *PRICES, *one_by_one, "models.judge.endpoint.max_cost=1")
        assert len(silent.asked) == 1
        execute(tmp_path / "run", silent, *PRICES, *one_by_one)
        assert len(silent.asked) == len(stub.asked)  # the first answer was not asked for again


def test_a_limit_counts_the_steps_before(tmp_path, stub):
    """Two rounds, money for the first."""
    two = ["method.rounds=2"]
    execute(tmp_path / "one", stub, *PRICES)
    num = len(stub.answered)
    with serving(Stub()) as other:
        for _ in range(2):  # the second time round 1 is replayed, and counts all the same
            with pytest.raises(Stopped, match="step round-002/localize/ask"):
                execute(tmp_path / "two", other, *two, *PRICES, f"models.judge.endpoint.max_cost={num * EACH:.6f}")
            assert len(other.asked) == num


def test_a_limit_without_prices_is_a_mistake_and_a_plan_pays_nothing(stub):
    with pytest.raises(RecipeProblems, match="max_cost needs prompt_price or completion_price"):
        recipe(stub, "models.judge.endpoint.max_cost=1")
    found = plan(recipe(stub, *PRICES, "models.judge.endpoint.max_cost=0.000001"), Assumptions(), SilentProgress())
    assert found.finding is None and not stub.asked
