import io
from math import inf

import pytest

from edgeclip.runtime.console import EscapedOutput, columns, digits, escape_controls, interval_ends
from edgeclip.runtime.errors import first_line
from edgeclip.runtime.stats.interval import Interval


def test_words_are_aligned_to_the_left_and_numbers_to_the_right() -> None:
    rows = (("name", "ms", "note"), ("a longer one", "1", "x"), ("b", "12.5", ""))
    assert columns(rows) == "name            ms  note\na longer one     1     x\nb             12.5"
    assert columns(rows, left=3).splitlines()[1] == "a longer one  1     x"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext, 猫 🐈‍⬛ é\n", "plain\ttext, 猫 🐈‍⬛ é\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b2J", r"\x9b2J"),  # the same in one character
        ("a\rb\x07\x7f", r"a\rb\x07\x7f"),
        ("a\u2028b\u202ecba\u2069", r"a\u2028b\u202ecba\u2069"),
        ("caf\udce9.png", r"caf\udce9.png"),  # a file name that is not UTF-8
    ],
)
def test_what_acts_on_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert escape_controls(text) == shown


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "é 猫 \\udce9"),
        ("cp1252", "é \\u732b \\udce9"),
        ("ascii", "\\xe9 \\u732b \\udce9"),
        ("utf-16", "é 猫 \\udce9"),
        ("shift_jis", "\\xe9 猫 \\udce9"),
    ],
)
def test_what_the_encoding_does_not_have_is_escaped(encoding: str, shown: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
    assert EscapedOutput(stream).write("é 猫 \udce9\n") == 6
    stream.seek(0)
    assert stream.read() == f"{shown}\n"


def test_colours_of_other_libraries_are_left_out_of_messages() -> None:
    assert first_line(ValueError("\x1b[1;31mbad\x1b[m graph\nmore")) == "bad graph"
    assert first_line(ValueError("\x1b[m")) == "ValueError"


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (1.22, 1.31, "1.22 to 1.31"),
        (0.0, 1.31, "0 to 1.31"),
        (1.22, inf, "at least 1.22"),
        (-inf, 1.31, "at most 1.31"),
        (0.0, inf, "not known"),  # of a time
        (-inf, inf, "not known"),
    ],
)
def test_ends_of_intervals_are_told_in_words_where_they_are_not_known(
    low: float, high: float, told: str
) -> None:
    assert interval_ends(Interval(1.25, low, high), digits) == told
