"""The endpoint engine alone: what it sends, which samples, and who imports the client."""

import subprocess
import sys
from pathlib import Path

import pytest

import reasonrun
from engines.endpoint_stub import Reply, Stub, serving
from reasonrun.engines.endpoint import EndpointEngine
from reasonrun.errors import EnvironmentProblem
from reasonrun.generation import EndpointSettings, Request, Usage
from reasonrun.records import Message, Sampling


@pytest.fixture
def stub():
    with serving(Stub()) as stub:
        yield stub


def request(n=1, done=(), **sampling):
    return Request(
        key="k",
        problem_id="p",
        prompt_ids=(),
        n=n,
        seed=1,
        sampling=Sampling(**sampling),
        messages=(Message(role="system", content="be brief"), Message(role="user", content="hi")),
        done=done,
    )


def answers(stub, *requests):
    engine = EndpointEngine(EndpointSettings(url=stub.url, model="m", api_key_env=None), role="judge")
    found = [c for _, completions in engine.generate([(0, requests)]) for c in completions]
    engine.close()
    return found


def test_samples_that_are_done_are_left_out_and_the_others_keep_their_seeds(stub):
    stub.reply = lambda body: Reply(str(body["seed"]))
    all_four = {c.index: c.text for c in answers(stub, request(n=4))}
    rest = {c.index: c.text for c in answers(stub, request(n=4, done=(0, 2)))}
    assert rest == {1: all_four[1], 3: all_four[3]} and len(set(all_four.values())) == 4


def test_sampling_reaches_the_server_and_filters_that_are_off_are_not_sent(stub):
    answers(stub, request(temperature=0.3, top_k=5, stop=("###",), max_new_tokens=9))
    (body,) = stub.asked
    assert (body["temperature"], body["top_k"], body["stop"], body["max_tokens"]) == (0.3, 5, ["###"], 9)
    assert "top_p" not in body
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user"]


def test_a_server_that_knows_no_seeds_is_asked_without(stub):
    stub.reply = lambda body: Reply("unknown field: seed", status=400) if "seed" in body else Reply("fine")
    (completion,) = answers(stub, request())
    assert completion.text == "fine" and completion.usage == Usage(100, 7)
    assert ["seed" in body for body in stub.asked] == [True, False]


def test_importing_the_engine_imports_no_client():
    code = "import reasonrun.hosts, sys; print([m for m in ('openai', 'torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_client_is_imported_by_engines_only():
    folder = Path(reasonrun.__file__).parent
    users = [p.relative_to(folder).as_posix() for p in folder.rglob("*.py") if "import openai" in p.read_text()]
    assert sorted(users) == ["engines/endpoint.py", "engines/openai.py"]


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("reasonrun.engines.endpoint.find_spec", lambda _: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'reasonrun\[endpoint\]'"):
        EndpointEngine(EndpointSettings(url="http://127.0.0.1:9", model="m"), role="judge")
