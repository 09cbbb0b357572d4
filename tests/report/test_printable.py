"""No text of a model reaches the terminal as a command."""

import pytest

from reasonrun.report.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext ±½ 数", "plain\n\ttext ±½ 数"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;owned\x07title\x1b]8;;http://x\x1b\\link", "titlelink"),
        ("\x1bP1;2|payload\x1b\\after", "after"),
        ("\x9b2Jcleared\x9d0;t\x9cand \x85 more", "clearedand  more"),
        ("\x1bc\x1b(0reset", "reset"),
        ("over\rwrite\x08\x00\x7f", "overwrite"),
        ("a\u202eb\u2066c\u200fd", "abcd"),
        ("torn \x1b", "torn "),
        ("nested \x1b\x1b[31m[32m", "nested [32m"),
        ("half \ud800", "half \ufffd"),
    ],
)
def test_control_sequences_go_and_text_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_unfinished_sequence_keeps_the_text_after_it_but_nothing_to_obey() -> None:
    assert printable("\x1b]0;never closed") == "0;never closed"
