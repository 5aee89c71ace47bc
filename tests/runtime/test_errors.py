import pytest

from edgeclip.runtime.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [("", "ValueError"), (" \n", "ValueError"), ("a fault", "a fault"), ("\n a\nb\n", "a")],
)
def test_first_line(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line
