"""`edgeclip pull`, as a process of its own that finds the Hub by `HF_ENDPOINT`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli.main import main
from tests.runtime.fake_hub import FakeHub, Files, files_of, serve

REPO = "someone/tiny"
MAIN = "import sys; from edgeclip.runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
SECRET = "hf_NobodyMaySeeThis"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve() as running:
        yield running


@pytest.fixture
def files(tiny_bundle: Path) -> Files:
    return files_of(tiny_bundle)


def run(hub: FakeHub, home: Path, *arguments: object, token: str = "") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `edgeclip pull`."""
    command = [sys.executable, "-c", MAIN, "pull", *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def test_pull(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    commit = hub.add(REPO, files).branches["main"]
    out = tmp_path / "a bundle"
    status, printed, errors = run(hub, tmp_path / "home", REPO, "--out", out)
    assert (status, errors) == (0, "")
    count = len(Bundle.open(out).manifest.files)
    name, gates, following = printed.splitlines()
    assert name.startswith(f"tiny: {count} files, 0.0")
    assert name.endswith(f" MB, all as declared, of {REPO} at {commit[:12]}")
    assert gates == "gates: 4 recorded, all met"
    assert following == f"next: edgeclip verify '{out}'"
    assert main(["verify", str(out)]) == 0


def test_fault_is_one_line_without_the_token(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, files)
    out = tmp_path / "out"
    status, printed, errors = run(hub, tmp_path / "home", REPO, "--out", out, token=SECRET)
    assert (status, printed) == (2, "")
    assert errors.startswith(f"edgeclip: error: cannot pull {REPO}: the Hub asks for a token")
    assert errors.count("\n") == 1
    assert SECRET not in errors
    assert not out.exists()


def test_replace(hub: FakeHub, files: Files, tmp_path: Path, own_bundle: Path) -> None:
    hub.add(REPO, files)
    status, _, errors = run(hub, tmp_path / "home", REPO, "--out", own_bundle)
    assert status == 2
    assert "exists" in errors
    assert run(hub, tmp_path / "home", REPO, "--out", own_bundle, "--replace")[0] == 0


@pytest.mark.parametrize("arguments", [["pull", REPO, "--out", "out"], ["push", "BUNDLE", REPO]])
def test_without_the_extra(tiny_bundle: Path, tmp_path: Path, arguments: list[str]) -> None:
    words = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    program = (
        "import sys\n"
        "sys.modules['huggingface_hub'] = None\n"  # as if it were not installed
        "from edgeclip.runtime.cli.main import main\n"
        f"sys.exit(main({words}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"edgeclip: error: edgeclip {arguments[0]} needs the package 'huggingface_hub': "
        "pip install 'edgeclip[hub]'\n"
    )
