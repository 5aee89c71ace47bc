"""What every command prints, writes and ends with, held against what was recorded.

Each case runs `edgeclip` as a user does and compares a masked record of it (command line, exit
status, stdout, stderr, and the files written with the keys of those in JSON) with a text file
in `outputs/`. Of every command there are its help, a mistake, and a good run; in good runs all
figures are masked where they differ between machines.

After an intended change, record anew and look at the difference before it is committed:

    EDGECLIP_RECORD_GOLDEN=1 python -m pytest tests/golden
    git diff tests/golden/outputs
"""

import difflib
import os
import re
from pathlib import Path

import pytest

from tests.golden.cases import MISTAKES, RUNS, SERVE, WITHOUT_RUN
from tests.golden.session import Session

OUTPUTS = Path(__file__).with_name("outputs")
RECORDING = os.environ.get("EDGECLIP_RECORD_GOLDEN") == "1"
COMMANDS = [name for name in MISTAKES if name != "edgeclip"]
# The first test waits for whatever it needs, and a machine may be busy.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def check(name: str, found: str) -> None:
    """Compare a record with the one that is kept, or keep it."""
    path = OUTPUTS / f"{name}.txt"
    if RECORDING:
        OUTPUTS.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
        return
    assert path.exists(), f"{path.name} is missing: see how to record in {Path(__file__).name}"
    kept = path.read_text(encoding="utf-8")
    if found != kept:
        before, now = (text.splitlines(keepends=True) for text in (kept, found))
        difference = difflib.unified_diff(before, now, f"kept {path.name}", "now")
        pytest.fail("".join(difference), pytrace=False)


@pytest.mark.parametrize("command", ["edgeclip", *COMMANDS])
def test_help(golden: Session, command: str) -> None:
    words = "--help" if command == "edgeclip" else f"{command} --help"
    check(f"{command}-help", golden.short(words))


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake(golden: Session, command: str) -> None:
    words = MISTAKES[command]
    found = golden.short(words if command == "edgeclip" else f"{command} {words}")
    assert "\nexit status 2\n" in found
    check(f"{command}-mistake", found)


@pytest.mark.parametrize("name", RUNS)
def test_run(golden: Session, name: str) -> None:
    found = golden.run(name)
    assert f"\nexit status {RUNS[name].status}\n" in found, found
    check(f"{name}-run", found)


def test_serve(golden: Session) -> None:
    found = golden.served(SERVE)
    assert "\nexit status 0\n" in found, found
    check("serve-run", found)


def test_version(golden: Session) -> None:
    check("edgeclip-version", golden.short("--version"))


def test_every_command_has_its_cases(golden: Session) -> None:
    listed = re.findall(r"^ *([a-z][a-z-]*) {2,}\S", golden.overview(), re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    assert set(COMMANDS) - WITHOUT_RUN - {"serve"} <= set(RUNS)


def test_nothing_is_kept_that_no_case_compares() -> None:
    short = [*(f"{name}-{kind}" for name in MISTAKES for kind in ("help", "mistake"))]
    names = [*short, *(f"{name}-run" for name in RUNS), "serve-run", "edgeclip-version"]
    assert sorted(path.name for path in OUTPUTS.iterdir()) == sorted(f"{n}.txt" for n in names)
