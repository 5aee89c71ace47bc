"""A user without a home directory: no $HOME, and no entry in the list of users."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeclip.runtime.bundle.files import cache_root, ensure_home, home_folder
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there Windows knows the home directory")
USER = 54321
AS_NOBODY = ["unshare", "--user", f"--map-user={USER}", f"--map-group={USER}"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of a user without a home directory."""

    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "EDGECLIP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_private_folder_takes_its_place(temporary: Path) -> None:
    own = temporary / f"edgeclip-{os.getuid()}"
    assert home_folder() == own
    assert own.stat().st_mode & 0o777 == 0o700
    assert home_folder() == own  # again
    assert cache_root() == own / ".cache" / "edgeclip"
    ensure_home()
    assert os.environ["HOME"] == str(own)


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_folder_that_others_may_write_is_not_used(planted: str, temporary: Path) -> None:
    own = temporary / f"edgeclip-{os.getuid()}"
    if planted == "open":
        own.mkdir()
        own.chmod(0o777)
    elif planted == "link":
        (temporary / "other").mkdir(mode=0o700)
        own.symlink_to(temporary / "other")
    else:
        own.touch()
    with pytest.raises((ConfigError, FileExistsError)):
        home_folder()


def test_a_home_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_home()
    assert (os.environ["HOME"], home_folder()) == (str(tmp_path), tmp_path)


def test_commands_work_for_a_user_that_no_list_knows(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    if shutil.which("unshare") is None or subprocess.run([*AS_NOBODY, "true"]).returncode:
        pytest.skip("user namespaces are not allowed here")
    temporary, work = tmp_path / "tmp", tmp_path / "work"
    temporary.mkdir()
    work.mkdir()
    edgeclip, common = (
        [sys.executable, "-m", "edgeclip.runtime.cli.main"],
        ["--bundle", tiny_bundle],
    )
    for words in (
        ["device", "--list"],
        ["verify", tiny_bundle],
        ["embed", photos, "--out", "photos.npz", *common],
        ["search", "red", "--index", "photos.npz", *common],
        ["pull", "small", "--out", "bundle"],
    ):
        done = subprocess.run(
            [*AS_NOBODY, *edgeclip, *words],
            cwd=work,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == (2 if words[0] == "pull" else 0), done.stderr
        assert "Traceback" not in done.stderr
    made = sorted(path.name for path in work.iterdir())
    assert made == ["photos.npz", "photos.npz.contents"]  # and no folder named ~
