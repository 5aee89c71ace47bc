"""Targets are checked and locked before long work."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.files import require_space
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.cli.options import Targets, claim_targets
from edgeclip.runtime.errors import InputError
from tests.runtime.cli.test_main import skip_without_what_it_needs

ROOT = Path(__file__).parents[3]


def claimed(**targets: tuple[Path | None, ...]) -> None:
    with claim_targets(Targets(**targets)):
        pass


def listed(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    everything = Targets(
        files=(tmp_path / "new" / "deep" / "a.json", None, tmp_path / "b.html"),
        directories=(tmp_path / "bundle", tmp_path / "there"),
        folders=(tmp_path / "run",),
        shared=(tmp_path / "run" / "cache",),
    )
    with claim_targets(everything):
        assert (tmp_path / "run" / "cache").is_dir()
        (tmp_path / "b.html").write_text("page")
    assert listed(tmp_path) == ["b.html", "there"]


def test_what_was_written_stays(tmp_path: Path) -> None:
    with claim_targets(Targets(folders=(tmp_path / "deep" / "run",))):
        (tmp_path / "deep" / "run" / "log").touch()
    assert listed(tmp_path) == ["deep", "deep/run", "deep/run/log"]


@pytest.mark.parametrize("kind", ["files", "directories", "folders", "shared"])
@pytest.mark.parametrize("place", ["/proc", "/sys"])
def test_a_place_that_cannot_be_written(kind: str, place: str) -> None:
    if not Path(place).is_dir():
        pytest.skip(f"no {place} here")
    with pytest.raises(InputError, match=rf"^cannot write {place}/new/a: "):
        claimed(**{kind: (Path(place, "new", "a"),)})


@pytest.mark.parametrize("kind", ["files", "directories", "folders"])
def test_a_file_in_the_way(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^cannot write .*/file/a: "):
        claimed(**{kind: (tmp_path / "file" / "a",)})


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        claimed(files=(tmp_path / ("a" * 240),))


def test_a_directory_or_a_device_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory: give the name of a file"):
        claimed(files=(tmp_path,))
    with pytest.raises(InputError, match="/dev/null is a device or pipe: give the name of a file"):
        claimed(files=(Path("/dev/null"),))


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.npz")
    claimed(files=(path,))
    with pytest.raises(InputError, match="is not valid UTF-8, and no model can be saved there"):
        claimed(directories=(path,))


def test_two_outputs_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"two outputs are .*: give each a name of its own"):
        claimed(files=(tmp_path / "a", tmp_path / "linked" / "a"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_found_first(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"\0" * (256 * 1024))
    for kind in ("files", "directories", "folders"):
        with pytest.raises(InputError, match="No space left on device"):
            claimed(**{kind: (small_disk / "a",)})
    assert listed(small_disk) == ["ballast"]


def test_a_read_only_disk_is_found_first(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(InputError, match="Read-only file system"):
        claimed(files=(small_disk / "a",))


def test_a_mount_point_cannot_be_replaced(small_disk: Path) -> None:
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced: give a dir"):
        claimed(directories=(small_disk,))
    claimed(folders=(small_disk,), directories=(small_disk / "bundle",))


def test_room_is_asked_for(small_disk: Path) -> None:
    require_space(small_disk / "new" / "a", 200_000)
    with pytest.raises(InputError, match=r"needs 300,000 bytes, and [\d,]+ bytes are free"):
        require_space(small_disk / "new" / "a", 300_000)
    with pytest.raises(InputError, match=r"needs 1000000000\.0 GB, and "):
        require_space(small_disk.parent / "a", 10**18)


HOLD = """
import sys, time
from pathlib import Path
from edgeclip.runtime.cli.options import Targets, claim_targets
with claim_targets(Targets(**{sys.argv[1]: (Path(sys.argv[2]),)})):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["files", "directories", "folders"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_one_process_at_a_time(tmp_path: Path, kind: str, end: signal.Signals) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, kind, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(InputError, match=r"another process of edgeclip writes .*/out"):
                claimed(**{kind: (target,)})
            claimed(**{kind: (tmp_path / "another",)})
        finally:
            other.send_signal(end)
            other.wait()
    claimed(**{kind: (target,)})  # a lock ends with its process
    assert not any(name.startswith(".edgeclip-lock") for name in listed(tmp_path))


@pytest.mark.parametrize(
    ("first", "second"), [("folders", "directories"), ("directories", "folders")]
)
def test_a_folder_that_is_filled_is_not_replaced_meanwhile(
    tmp_path: Path, first: str, second: str
) -> None:
    bundle = tmp_path / "bundle"  # cascade adds to it, export --replace replaces it
    bundle.mkdir()
    with (
        claim_targets(Targets(**{first: (bundle,)})),
        pytest.raises(InputError, match=r"another process of edgeclip writes .*/bundle"),
    ):
        claimed(**{second: (bundle,)})
    assert listed(tmp_path) == ["bundle"]


def test_a_shared_folder_is_not_locked(tmp_path: Path) -> None:
    with claim_targets(Targets(shared=(tmp_path / "cache",))):
        claimed(shared=(tmp_path / "cache",))


def test_a_lock_of_before_does_not_block(tmp_path: Path) -> None:
    (tmp_path / ".edgeclip-lock.a").touch()
    (tmp_path / ".edgeclip-lock").touch()
    claimed(files=(tmp_path / "a",), folders=(tmp_path,))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc here")
@pytest.mark.parametrize(
    "command",
    [
        "build nowhere --device x --out /proc/a",
        "cache --data nowhere --out /proc/a",
        "cascade nowhere --teacher nowhere --page /proc/a",
        "cut nowhere --out /proc/a",
        "demo --out /proc/a",
        "device --out /proc/a",
        "distill --data nowhere --out /proc/a",
        "distill --data nowhere --out {tmp}/s --run /proc/a",
        "distill --data nowhere --out {tmp}/s --cache /proc/a",
        "embed nowhere --bundle nowhere --out /proc/a",
        "export nowhere --out /proc/a",
        "measure-cuts nowhere --out /proc/a",
        "measure-probes nowhere --out /proc/a",
        "plan nowhere --device-times a --server-times b --link wifi --out /proc/a",
        "plan nowhere --device-times a --server-times b --link wifi --picture /proc/a",
        "pretrain --out /proc/a --run {tmp}/r",
        "pretrain --out {tmp}/t --run /proc/a",
        "probes --out /proc/a",
        "profile nowhere --out /proc/a",
        "profile nowhere --report /proc/a",
        "profile nowhere --markdown /proc/a",
        "profile nowhere --parquet /proc/a",
        "pull user/name --out /proc/a",
        "push nowhere user/name --card /proc/a",
        "quantize nowhere --out /proc/a",
        "quantize nowhere --out {tmp}/q --page /proc/a",
        "report nowhere.json --out /proc/a",
        "report nowhere.json --markdown /proc/a",
        "scenes /proc/a",
    ],
)
def test_every_command_looks_at_its_targets_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    words = command.format(tmp=tmp_path).split()
    skip_without_what_it_needs(words[0])
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("edgeclip: error: cannot write /proc/a")
    assert error.count("\n") == 1
    assert listed(tmp_path) == []
