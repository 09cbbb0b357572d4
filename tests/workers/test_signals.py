"""What the first and the second signal do to a running supervisor."""

from __future__ import annotations

import os
import signal

import pytest

from reasonrun.workers.signals import StopFlag, StopNow


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.promise("G9", "signals")
def test_first_signal_sets_the_code_and_says_how_to_continue(
    capfd: pytest.CaptureFixture[str], number: signal.Signals, code: int
) -> None:
    previous = signal.getsignal(number)
    with StopFlag("reasonrun train x.yaml --run 'my run'") as flag:
        assert flag() == 0
        os.kill(os.getpid(), number)
        assert (flag(), flag.exit_code) == (code, code)
    assert signal.getsignal(number) is previous
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("the same command continues this run: reasonrun train x.yaml --run 'my run'")


@pytest.mark.promise("G9", "second Ctrl-C")
def test_second_interrupt_raises_and_a_second_term_does_not() -> None:
    with StopFlag("x") as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag() == 75
        with pytest.raises(StopNow) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130
    assert isinstance(caught.value, KeyboardInterrupt)
