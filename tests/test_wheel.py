"""What the wheel holds, and that a device can run a bundle with it and its dependencies alone."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ROOMS = ("profiles", "runtime", "compress", "export")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
# Of these folders, only the files that match the patterns are in the wheel.
LEFT_OUT = {
    "compress/emoji_teacher": ("*.json",),
    "export/emoji_bundle": (),
    "profiles/results": (),
}
MOST_BYTES = 2_000_000
BASE_PACKAGES = {
    *("annotated-types", "numpy", "pillow", "pydantic", "pyyaml", "tokenizers", "tqdm"),
    "typing-extensions",
}


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


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", "--target", str(target), str(_only(built, "*.whl"))]
    subprocess.run(command, check=True)
    return target


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def _files_for_the_wheel() -> set[str]:
    """Paths below the root of all source and data files that an installation needs."""
    found = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if not path.is_file() or "__pycache__" in path.parts or path.name.startswith("."):
            continue
        folder = next((folder for folder in LEFT_OUT if name.startswith(f"{folder}/")), None)
        if folder is None or any(path.match(pattern) for pattern in LEFT_OUT[folder]):
            found.add(name)
    return found


def test_wheel_holds_what_an_installation_needs_and_no_more(built: Path) -> None:
    with zipfile.ZipFile(_only(built, "*.whl")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"edgeclip/{name}" for name in _files_for_the_wheel()}
    assert "edgeclip/profiles/devices/jetson-orin-nano.yaml" in expected
    assert "edgeclip/profiles/measure/graphs/yardstick.onnx" in expected
    assert "edgeclip/compress/emoji_teacher/config.json" in expected
    assert expected - names == set(), "not in the wheel: see package-data in pyproject.toml"
    assert names - expected == set(), "in the wheel, but left out on purpose, or not on the disk"


def test_wheel_is_small(built: Path) -> None:
    assert _only(built, "*.whl").stat().st_size <= MOST_BYTES


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


def test_source_distribution_holds_what_the_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(_only(built, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert (_files_for_the_wheel() | set(PROJECT_FILES)) - names == set()


def test_base_dependencies_are_those_of_running_a_bundle(installed: Path) -> None:
    assert _required(_metadata(installed)) == BASE_PACKAGES


def _metadata(installed: Path) -> importlib.metadata.Distribution:
    return next(iter(importlib.metadata.distributions(name="edgeclip", path=[str(installed)])))


def _required(distribution: importlib.metadata.Distribution, extra: str = "") -> set[str]:
    """Names of the packages that a distribution, with one of its extras, asks for here."""
    wanted = map(Requirement, distribution.requires or ())
    return {
        canonicalize_name(item.name)
        for item in wanted
        if item.marker is None or item.marker.evaluate({"extra": extra})
    }


def _brought_by(names: Iterable[str]) -> set[str]:
    """These packages, and all that they ask for in turn."""
    found, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        waiting += _required(distribution)
    return found


def _edgeclip(
    installed: Path, *arguments: str, blocked: Iterable[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the installed command, not that of the checkout, without the packages `blocked`."""
    # -S: else the checkout's editable installation would be found as well.
    code = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(blocked)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.path[:] = [path for path in sys.path if path]
sys.path += [{str(installed)!r}, {sysconfig.get_path("purelib")!r}]
from edgeclip.runtime.cli.main import main
assert main.__code__.co_filename.startswith({str(installed)!r})
sys.exit(main({list(arguments)}))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=installed.parent,
        env=environment,
    )


@pytest.fixture(scope="module")
def not_on_the_device(installed: Path) -> set[str]:
    """Import names of all packages here that `pip install edgeclip[cpu]` would not bring."""
    brought = _brought_by(_required(_metadata(installed), extra="cpu"))
    assert "onnxruntime" in brought
    assert "torch" not in brought
    return {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if not brought & set(map(canonicalize_name, distributions)) and name != "edgeclip"
    }


def test_a_device_runs_a_bundle(
    installed: Path, not_on_the_device: set[str], tiny_bundle: Path, tmp_path: Path
) -> None:
    assert {"torch", "transformers", "pytest"} <= not_on_the_device
    texts, index = tmp_path / "texts.txt", tmp_path / "index.npz"
    texts.write_text("a red apple\n")
    for arguments in (
        ["--help"],
        ["device", "--list"],
        ["verify", str(tiny_bundle)],
        ["embed", "--bundle", str(tiny_bundle), "--texts", str(texts), "--out", str(index)],
    ):
        done = _edgeclip(installed, *arguments, blocked=not_on_the_device)
        assert done.returncode == 0, done.stderr
    assert index.is_file()


@pytest.mark.parametrize("command", ["demo --quick", "cache --out cache"])
def test_what_needs_the_weights_says_where_they_are(installed: Path, command: str) -> None:
    done = _edgeclip(installed, *command.split())
    assert done.returncode == 2
    assert done.stderr == (
        "edgeclip: error: the weights of the built-in teacher are not part of the installed "
        "package: clone the EdgeCLIP repository, run `pip install -e '.[cpu,export]'` in it, and "
        "use that installation\n"
    )


def test_the_demo_says_so_before_it_asks_for_torch(
    installed: Path, not_on_the_device: set[str]
) -> None:
    done = _edgeclip(installed, "demo", blocked=not_on_the_device)
    assert done.returncode == 2
    assert "clone the EdgeCLIP repository" in done.stderr


def test_students_are_planned_for_a_measured_device(installed: Path) -> None:
    device = "x86-avx512-vnni-epyc-2-cores"
    done = _edgeclip(installed, "plan-student", "--device", device, "--latency-ms", "5")
    assert done.returncode == 0, done.stderr
    assert "edgeclip distill --teacher built-in" in done.stdout
