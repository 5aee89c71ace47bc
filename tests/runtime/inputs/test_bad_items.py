"""How many unreadable items may be skipped, and what is said of them."""

import argparse
import logging

import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.bad_items import DEFAULT_MAX_BAD, MaxBad, parse_max_bad, report_bad


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [
        ("1%", 2000, 20),
        ("1%", 199, 1),
        ("1%", 99, 0),
        ("0.5%", 1000, 5),
        ("29%", 100, 29),
        ("100%", 7, 7),
        ("0", 1000, 0),
        ("0%", 1000, 0),
        ("12", 3, 12),
    ],
)
def test_limits(text: str, total: int, allowed: int) -> None:
    assert parse_max_bad(text).allowed(total) == allowed


@pytest.mark.parametrize(("total", "allowed"), [(3, 5), (500, 5), (2000, 20)])
def test_default_allows_a_few_in_a_small_set(total: int, allowed: int) -> None:
    assert DEFAULT_MAX_BAD.allowed(total) == allowed


@pytest.mark.parametrize("text", ["", "1.5", "-1", "-1%", "many", "1 %%", "101%", "nan", "1e3"])
def test_no_limits(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_max_bad(text)


def test_some_are_named_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reasons = [f"{number}.jpg is damaged" for number in range(30)]
    report_bad(reasons, 1000, MaxBad(share=0.03, count=0))
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert sorted(text for _, text in said if text.endswith("is damaged")) == sorted(
        f"skipped: {reason}" for reason in reasons
    )
    shown = [text for level, text in said if level == logging.INFO]
    assert len(shown) == 22
    assert shown[-2:] == ["skipped: 10 more, which -v names", "skipped 30 of 1000 images"]
    with pytest.raises(
        InputError, match=r"^30 of 1000 images cannot be read, and 29 are allowed: 0"
    ):
        report_bad(reasons, 1000, MaxBad(share=0.0299, count=0))
    with pytest.raises(InputError, match=r"4\.jpg is damaged; and 25 more\. .* --max-bad 3%$"):
        report_bad(reasons, 1000, MaxBad(share=0, count=1))


def test_nothing_is_bad(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    report_bad([], 0, MaxBad(share=0, count=0))
    report_bad([], 10, None)
    assert not caplog.records


def test_everything_is_bad() -> None:
    with pytest.raises(InputError, match=r"none of 2 images could be read; the first: a"):
        report_bad(["a is damaged", "b is damaged"], 2, None)


def test_any_number_may_be_bad() -> None:
    report_bad(["a is damaged"] * 9, 10, None)
