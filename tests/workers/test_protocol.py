"""Messages survive the pipe as they were."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_stubs import OwnError

import reasonrun
from reasonrun import errors
from reasonrun.generation import Completion
from reasonrun.workers import protocol

logps = st.floats(allow_nan=False)
completions = st.builds(
    Completion,
    request=st.text("ab:é"),
    index=st.integers(0, 9),
    token_ids=st.lists(st.integers(0, 2**31)).map(tuple),
    text=st.text('a"\\é\u2028🙂\n\x00\ud800\udfff', max_size=20),  # lone surrogates included
    finish_reason=st.sampled_from(["stop", "length", "stop_string"]),
    logps=st.none() | st.lists(logps).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(completions, max_size=3))
def test_any_completion_survives(answers: list[Completion]) -> None:
    message = protocol.Generated(call=7, completions=tuple(answers))
    line = protocol.encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert protocol.decode_from_worker(line[:-1]) == message


def test_line_separators_lone_surrogates_and_infinities_survive() -> None:
    completion = Completion(
        request="r\n",
        index=0,
        token_ids=(1,),
        text="\u2028\x00\ud800é\r\n\ud83d\ude42🙂",
        finish_reason="stop",
        logps=(float("-inf"), -0.1),
    )
    message = protocol.Generated(call=1, completions=(completion,))
    assert protocol.decode_from_worker(protocol.encode(message)) == message


def test_not_a_number_stays_one() -> None:
    event = protocol.Event(call=1, event={"loss": float("nan"), "nested": [float("inf")]})
    back = protocol.decode_from_worker(protocol.encode(event))
    assert isinstance(back, protocol.Event)
    assert math.isnan(back.event["loss"])
    assert back.event["nested"] == [float("inf")]


def test_line_that_is_no_message_is_refused() -> None:
    for line in [b"", b"garbage \xff", b"{}", b'{"kind":"unheard"}', b'{"kind":"loaded","call":"x","seconds":1}']:
        with pytest.raises(protocol.ProtocolError):
            protocol.decode_from_worker(line)


@pytest.mark.parametrize(
    "error",
    [
        errors.RunFailed("m", hint="h"),
        errors.RecipeError("m"),
        errors.EnvironmentProblem("m\nn", hint="h"),
        errors.RunConflict("m"),
        errors.Finding("m", evidence={"wrong": 1, "share": 0.25}, hint="h"),
        errors.Stopped("m", exit_code=130, hint="h"),
    ],
)
def test_error_is_rebuilt_as_it_was(error: errors.ReasonrunError) -> None:
    line = protocol.encode(protocol.describe_error(error))
    failed = protocol.decode_from_worker(line)
    assert isinstance(failed, protocol.Failed)
    back = protocol.rebuild_error(failed)
    assert type(back) is type(error)
    assert (str(back), back.hint, back.exit_code) == (str(error), error.hint, error.exit_code)


def test_refined_error_becomes_its_nearest_known_class() -> None:
    back = protocol.rebuild_error(protocol.describe_error(OwnError("m", hint="h")))
    assert type(back) is errors.RecipeError


def test_hello_of_another_version_is_refused_whatever_else_it_holds() -> None:
    same = protocol.encode(protocol.Hello(version=reasonrun.__version__, python="/bin/python"))
    assert isinstance(protocol.decode_from_worker(same), protocol.Hello)
    other = b'{"kind":"hello","version":"99.0","python":"/bin/python","new_field":1}'
    with pytest.raises(errors.EnvironmentProblem, match=r"/bin/python has reasonrun 99\.0"):
        protocol.decode_from_worker(other)
