"""Models behind endpoints in whole runs: what is asked, what failures become, that nothing is asked or paid twice."""

from __future__ import annotations

import json
import time

import pytest

from engines.endpoint_stub import Reply, Stub, serving
from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import EnvironmentProblem, Finding, RunFailed, Stopped
from reasonrun.recipe import load
from reasonrun.records import Rollout
from reasonrun.running import RunOptions, run
from reasonrun.sets import Rows

CANARY = "sk-canary-0123456789abcdefghij"
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
    "models.judge.endpoint.api_key_env=TEST_KEY",
]
ASK = "steps/round-001/localize/ask"


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", CANARY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)  # seconds


@pytest.fixture
def stub():
    with serving(Stub()) as stub:
        yield stub


def execute(directory, stub_or_url, *overrides, interrupted=lambda: 0, retries=2):
    url = getattr(stub_or_url, "url", stub_or_url)
    recipe = load(
        "smoke_step_dpo",
        [*SMALL, f"models.judge.endpoint.url={url}", f"models.judge.endpoint.max_retries={retries}", *overrides],
    )
    return run(recipe, RunOptions(directory=directory, interrupted=interrupted), SilentProgress())


def row_of(directory, step):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line["step"] == step)


def asked_rollouts(directory):
    paths = sorted((directory / ASK).glob("rows-*.parquet"))
    return list(Rows.load(Rollout, paths, directory / "derived"))


def no_canary(directory, *texts):
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files, "the run wrote something"
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not [text for text in texts if CANARY in text]


# -- what is asked and kept --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TEST_KEY", CANARY)
    directory = tmp_path_factory.mktemp("clean") / "run"
    with serving(Stub()) as stub:
        outcome = execute(directory, stub)
    patch.undo()
    return directory, outcome, stub


def test_a_judge_behind_an_endpoint_locates_the_errors_of_a_run(clean):
    directory, outcome, stub = clean
    assert set(outcome.result["test"]) == {"base", "last", "best"}
    rollouts = asked_rollouts(directory)
    assert len(rollouts) == len(stub.asked) > 10 and stub.keys == {CANARY}
    read = row_of(directory, "round-001/localize/read")
    assert read["num_ungraded"] == 0 and read["grader"] == "step-verdict-1"
    assert row_of(directory, "round-001/localize/locate")["num_examples"] == len(rollouts)
    # The scripted policy goes on rightly from a right prefix at least sometimes: the steps found can be repaired.
    assert row_of(directory, "round-001/pairs-step")["num_examples"] > 0


def test_a_rollout_of_an_endpoint_has_text_and_no_ids_and_its_usage_is_counted(clean):
    directory, _, stub = clean
    first = asked_rollouts(directory)[0]
    assert first.text.startswith("I recomputed") and first.kind == "about" and first.parent_id
    assert first.prompt_ids == () and first.completion_ids == () and first.segments == ()
    row = row_of(directory, "round-001/localize/ask")
    num = len(stub.asked)
    assert (row["num_prompt_tokens"], row["num_completion_tokens"]) == (100 * num, 7 * num)
    assert (row["num_empty"], row["num_without_usage"]) == (0, 0)


def test_the_request_says_what_the_recipe_says(clean):
    _, _, stub = clean
    body = stub.asked[0]
    assert {key: body[key] for key in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "big",
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 1024,
    }
    seeds = [body["seed"] for body in stub.asked]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    assert "stop" not in body and set(body) == {"model", "messages", "temperature", "max_tokens", "top_p", "seed"}
    assert 1 < stub.most_at_once <= 8


def test_the_key_is_in_no_file_of_a_run(clean):
    no_canary(clean[0], repr(clean[1]))


def test_where_an_endpoint_answers_is_free_and_which_model_is_not(clean, stub):
    assert execute(clean[0], "http://127.0.0.1:9/v1", "models.judge.endpoint.max_parallel=2").already_finished
    with pytest.raises(Exception, match=r"models\.judge\.endpoint\.model: 'big' -> 'small' \(semantic\)"):
        execute(clean[0], stub, "models.judge.endpoint.model=small")


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_server_that_fails_for_a_moment_is_asked_again(tmp_path, stub, clean):
    stub.script.extend([Reply(status=500), Reply(status=429, headers={"retry-after": "0.05"}), Reply(status=503)])
    execute(tmp_path / "run", stub)
    assert len(stub.asked) == len(stub.answered) + 3
    mine, theirs = asked_rollouts(tmp_path / "run"), asked_rollouts(clean[0])
    assert mine == theirs


def test_what_was_answered_before_a_failure_is_never_asked_again(tmp_path, stub, clean):
    answered = stub.reply
    stub.reply = lambda body: answered(body) if len(stub.answered) < 5 else Reply(status=500)
    with pytest.raises(Stopped) as stop:
        execute(tmp_path / "run", stub, "models.judge.endpoint.max_parallel=2", retries=0)
    assert stop.value.exit_code == 75 and stub.url in str(stop.value) and "same command" in str(stop.value)
    before = len(stub.answered)
    assert before >= 5
    with serving(Stub()) as other:  # another address of the same model
        execute(tmp_path / "run", other)
    prompts = [json.dumps(body, sort_keys=True) for body in (*stub.answered, *other.asked)]
    assert len(prompts) == len(set(prompts)) == len(asked_rollouts(tmp_path / "run"))
    assert asked_rollouts(tmp_path / "run") == asked_rollouts(clean[0])


def test_a_server_that_is_not_there_stops_the_run_resumably(tmp_path):
    with pytest.raises(Stopped) as stop:
        execute(tmp_path / "run", "http://127.0.0.1:9/v1", retries=1)
    assert stop.value.exit_code == 75
    assert "http://127.0.0.1:9/v1" in str(stop.value) and "2 times" in str(stop.value)
    assert (tmp_path / "run/steps/round-001/collect/_OK.json").is_file()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_and_an_unknown_model_are_problems_of_the_environment(tmp_path, stub, status):
    stub.reply = lambda _: Reply(f"you sent {CANARY}", status=status)
    with pytest.raises(EnvironmentProblem) as problem:
        execute(tmp_path / "run", stub)
    text = str(problem.value)
    assert problem.value.exit_code == 3 and stub.url in text
    assert ("TEST_KEY" if status != 404 else "models.judge.endpoint.url") in text
    no_canary(tmp_path / "run", text, repr(problem.value.__cause__))
    assert len(stub.asked) <= 8  # nothing new is asked after the first refusal


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"<html>hello</html>", headers={"content-type": "text/html"}),
        Reply(body=b"{broken"),
        Reply(body=b'{"choices": "none"}'),
    ],
)
def test_what_is_no_chat_completion_is_told_from_an_empty_one(tmp_path, stub, reply):
    stub.reply = lambda _: reply
    with pytest.raises(EnvironmentProblem, match="does not answer with a chat completion"):
        execute(tmp_path / "run", stub)


def test_a_refused_request_fails_the_run_with_the_servers_words(tmp_path, stub):
    stub.reply = lambda _: Reply("context of 512 tokens exceeded", status=400)
    with pytest.raises(RunFailed, match="context of 512 tokens exceeded"):
        execute(tmp_path / "run", stub)


def test_empty_filtered_and_cut_answers_are_rollouts_that_give_no_verdict(tmp_path, stub):
    stub.script.extend(
        [
            Reply(None),
            Reply("### Final decision\nStep 1: incorrect", finish_reason="content_filter"),
            Reply("### Final decision\nStep 1: incorrect", finish_reason="length"),
            Reply("", usage=False),
        ]
    )
    execute(tmp_path / "run", stub)
    row = row_of(tmp_path / "run", "round-001/localize/ask")
    assert (row["num_empty"], row["num_without_usage"], row["finish_reasons"]["length"]) == (3, 1, 1)
    reasons = row_of(tmp_path / "run", "round-001/localize/read")["reasons"]
    assert reasons["empty"] == 3 and reasons["truncated"] == 1
    left_out = row_of(tmp_path / "run", "round-001/localize/locate")["left_out"]
    assert left_out["judge: empty"] == 3 and left_out["judge: truncated"] == 1


def test_a_stop_does_not_wait_for_a_slow_server(tmp_path, stub):
    stub.reply = lambda _: Reply("late", seconds=5)
    begin = time.monotonic()
    with pytest.raises(Stopped) as stop:
        execute(tmp_path / "run", stub, interrupted=lambda: 130 if stub.asked else 0)
    assert stop.value.exit_code == 130 and time.monotonic() - begin < 4


def test_a_slow_answer_is_a_failure_after_the_timeout(tmp_path, stub):
    stub.reply = lambda _: Reply("late", seconds=1.5)
    with pytest.raises(Stopped, match="gave no answer, 1 times"):
        execute(tmp_path / "run", stub, "models.judge.endpoint.timeout_seconds=0.2", retries=0)


def test_a_judge_that_finds_nothing_wrong_ends_in_a_finding(tmp_path, stub):
    stub.reply = lambda _: Reply("### Final decision\nStep 1: correct; Step 2: correct")
    with pytest.raises(Finding):
        execute(tmp_path / "run", stub)
    left_out = row_of(tmp_path / "run", "round-001/localize/locate")["left_out"]
    assert left_out["judge: nothing_wrong"] == len(stub.asked)


def test_a_missing_key_is_told_before_anything_is_sampled(tmp_path, stub, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(EnvironmentProblem, match=r"TEST_KEY is not set[\s\S]*export TEST_KEY"):
        execute(tmp_path / "run", stub)
    assert not list((tmp_path / "run").glob("steps/*"))
    execute(tmp_path / "run", stub, "models.judge.endpoint.api_key_env=null")
    assert stub.keys == {"none"}
