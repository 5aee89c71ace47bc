"""The wheel and the source distribution hold exactly what is on the disk."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("profiles", "runtime", "compress", "export")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it, made without network."""
    # In a copy: a left-over build/ folder could put files into the wheel.
    copy, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def _files_on_disk() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_wheel_holds_every_file_and_no_other(built: Path) -> None:
    with zipfile.ZipFile(_only(built, "*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"edgeclip/{name}" for name in _files_on_disk()}
    assert "edgeclip/profiles/devices/jetson-orin-nano.yaml" in expected
    assert expected - names == set(), "not in the wheel: see package-data in pyproject.toml"
    assert names - expected == set(), "in the wheel, but not on the disk"


def test_wheel_has_licences_and_the_command(built: Path) -> None:
    with zipfile.ZipFile(_only(built, "*.whl")) as wheel:
        texts = {
            name.partition(".dist-info/")[2]: wheel.read(name).decode()
            for name in wheel.namelist()
            if ".dist-info/" in name
        }
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "CC BY-SA 4.0" in texts["licenses/NOTICE"]
    assert "edgeclip = edgeclip.runtime.cli.main:main" in texts["entry_points.txt"]


def test_source_distribution_holds_every_file(built: Path) -> None:
    with tarfile.open(_only(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert (_files_on_disk() | set(PROJECT_FILES)) - names == set()
