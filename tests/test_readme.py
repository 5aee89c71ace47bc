"""What the README tells people to type exists."""

import re
from pathlib import Path

import pytest

from edgeclip.runtime.cli.main import VERBS, main

_ROOT = Path(__file__).parents[1]
_TEXT = (_ROOT / "README.md").read_text(encoding="utf-8")
_COMMANDS = re.findall(r"^edgeclip (\S+)(.*)$", _TEXT, flags=re.MULTILINE)


def test_there_are_commands() -> None:
    assert len(_COMMANDS) >= 8


@pytest.mark.parametrize(("verb", "rest"), _COMMANDS)
def test_verbs_and_options_exist(verb: str, rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb in VERBS
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    known = capsys.readouterr().out
    for option in re.findall(r"(?<!\S)--[a-z-]+", rest.split("#")[0]):
        assert option in known


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", _TEXT, flags=re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", _TEXT))
def test_linked_files_exist(link: str) -> None:
    assert (_ROOT / link).exists()
