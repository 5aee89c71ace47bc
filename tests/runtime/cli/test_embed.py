"""`edgeclip embed` makes an index that survives a kill, and grows."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inputs import preprocess
from edgeclip.runtime.inputs.preprocess import resize_and_crop

Capture = pytest.CaptureFixture[str]
ODD = os.fsdecode(b"caf\xe9.png")  # as an old camera or archive writes it


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (20 * number % 256, 255 - number, 7 * number % 256)).save(path)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 12 pictures, 00.png and so on; it lies in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        picture(tmp_path / "pics" / f"{number:02}.png", number)
    return Path("pics")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that were decoded."""
    found: list[str] = []

    def reading(path: Path, *more: Any) -> Any:
        found.append(path.name)
        return resize_and_crop(path, *more)

    monkeypatch.setattr(preprocess, "resize_and_crop", reading)
    return found


@pytest.fixture
def run(tiny_bundle: Path, capsys: Capture) -> Callable[..., str]:
    """Run `edgeclip embed` to index.npz with success; returns what it prints."""

    def embedded(*arguments: object, status: int = 0) -> str:
        words = ["embed", *map(str, arguments), "--bundle", str(tiny_bundle)]
        assert main([*words, "--out", "index.npz", "--batch-size", "4"]) == status
        printed = capsys.readouterr()
        return printed.out if status == 0 else printed.err

    return embedded


def loaded() -> dict[str, list[float]]:
    index = Index.load(Path("index.npz"))
    return dict(zip(index.keys, index.embeddings.tolist(), strict=True))


def files() -> list[str]:
    return sorted(path.name for path in Path().glob("index.npz*"))


def test_a_name_that_is_not_utf8(
    pictures: Path, run: Callable[..., str], tiny_bundle: Path
) -> None:
    picture(pictures / ODD, 77)
    assert run(pictures) == "13 embeddings of length 8 in index.npz\n"
    assert f"pics/{ODD}" in loaded()
    # Found again by its name, as a program reads it.
    words = ["search", "--image", f"pics/{ODD}", "--index", "index.npz", "--top", "1"]
    program = [sys.executable, "-m", "edgeclip.runtime.cli.main"]
    command = [*program, *words, "--bundle", str(tiny_bundle)]
    done = subprocess.run([*command, "--json"], capture_output=True, check=True)
    ((query, (hit,)),) = json.loads(done.stdout.decode("ascii")).items()
    assert os.fsencode(query) == os.fsencode(hit["key"]) == b"pics/caf\xe9.png"
    assert hit["score"] == pytest.approx(1, abs=1e-5)
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout.decode("ascii").count(r"pics/caf\udce9.png") == 2


@pytest.mark.parametrize("command", ["classify", "embed", "eval"])
def test_a_damaged_file_of_such_a_name_is_named(
    pictures: Path, tiny_bundle: Path, command: str
) -> None:
    (pictures / ODD).write_bytes(b"x")
    for number, path in enumerate(pictures.glob("*.png")):
        path.with_suffix(".txt").write_text(f"a red car {number}")
    more = {"classify": ["--labels", "red,blue"], "embed": ["--out", "index.npz"], "eval": []}
    words = [command, "pics", "--bundle", str(tiny_bundle), *more[command]]
    done = subprocess.run(
        [sys.executable, "-m", "edgeclip.runtime.cli.main", *words], capture_output=True, check=True
    )
    assert rb"skipped: pics/caf\udce9.png is not an image" in done.stderr
    assert b"skipped 1 of 13 images" in done.stderr


def test_an_index_that_exists_is_updated(
    pictures: Path, run: Callable[..., str], reads: list[str], capsys: Capture
) -> None:
    assert run(pictures) == "12 embeddings of length 8 in index.npz\n"
    assert files() == ["index.npz", "index.npz.contents"]
    before = loaded()
    reads.clear()
    assert run(pictures).endswith("0 added, 0 changed, 0 removed, 12 as before\n")
    assert reads == []
    assert loaded() == before

    picture(pictures / "03.png", 99)  # changed
    picture(pictures / "zz.png", 50)  # new
    (pictures / "05.png").unlink()  # removed
    (pictures / "07.png").rename(pictures / "aa.png")  # known by its content
    os.utime(pictures / "08.png", (1, 1))  # touched
    said = run(pictures)
    assert said.endswith("2 added, 1 changed, 2 removed, 9 as before\n")
    assert sorted(reads) == ["03.png", "zz.png"]
    after = loaded()
    assert list(after) == sorted(path.as_posix() for path in pictures.glob("*.png"))
    same = [f"pics/{number:02}.png" for number in (0, 1, 2, 4, 6, 8, 9, 10, 11)]
    assert all(after[key] == before[key] for key in same)
    assert after["pics/aa.png"] == before["pics/07.png"]
    assert after["pics/03.png"] != before["pics/03.png"]

    Path("index.npz").rename("updated.npz")  # as if made at once
    run(pictures)
    fresh = loaded()
    assert list(fresh) == list(after)
    np.testing.assert_allclose(list(fresh.values()), list(after.values()), atol=1e-6)


def test_what_is_removed_is_named(
    pictures: Path, run: Callable[..., str], tiny_bundle: Path, capsys: Capture
) -> None:
    run(pictures)
    (pictures / "05.png").unlink()
    assert main(["embed", "pics", "--bundle", str(tiny_bundle), "--out", "index.npz"]) == 0
    assert "removed: pics/05.png\n" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_now(
    pictures: Path, run: Callable[..., str], reads: list[str], capsys: Capture
) -> None:
    named = sorted(pictures.glob("*.png"))
    run(*named)
    before = loaded()
    (pictures / "03.png").write_bytes(b"<html>404</html>")  # what was embedded is no more
    (pictures / "05.png").rename("aside.png")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("pics/05.png")  # it is there, and cannot be opened
        said = run(*named)
    assert said.endswith("0 added, 0 changed, 1 removed, 11 as before\n")
    after = loaded()
    assert before.keys() - after.keys() == {"pics/03.png"}
    assert all(before[key] == row for key, row in after.items())
    (pictures / "05.png").unlink()
    Path("aside.png").rename(pictures / "05.png")
    reads.clear()
    assert run(*named).endswith("0 added, 0 changed, 0 removed, 11 as before\n")
    assert sorted(reads) == ["03.png"]


def test_an_index_grows_by_other_folders(
    pictures: Path, run: Callable[..., str], reads: list[str]
) -> None:
    run(pictures)
    picture(Path("more/a.png"), 60)
    reads.clear()
    assert run("more").endswith("1 added, 0 changed, 0 removed, 12 as before\n")
    assert sorted(reads) == ["a.png"]
    assert len(loaded()) == 13
    shutil.rmtree("pics")  # not named now: a folder may be on a disk that is away
    assert run("more").endswith("0 added, 0 changed, 0 removed, 13 as before\n")
    picture(Path("pics/00.png"), 0)
    assert run("pics", "more").endswith("0 added, 0 changed, 11 removed, 2 as before\n")
    assert run("more", "--replace") == "1 embeddings of length 8 in index.npz\n"
    assert list(loaded()) == ["more/a.png"]


def test_a_folder_is_the_same_however_it_is_spelled(
    pictures: Path,
    run: Callable[..., str],
    reads: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(pictures)
    (pictures / "05.png").unlink()
    reads.clear()
    assert run(tmp_path / "pics").endswith("11 added, 0 changed, 12 removed, 0 as before\n")
    assert reads == []
    picture(Path("below/more/a.png"), 60)
    monkeypatch.chdir("below")
    assert run("../pics") == "11 embeddings of length 8 in index.npz\n"
    assert run(".").endswith("1 added, 0 changed, 0 removed, 11 as before\n")
    assert run("more/../more").endswith("1 added, 0 changed, 1 removed, 11 as before\n")


def test_a_moved_or_renamed_folder_is_not_embedded_again(
    pictures: Path, run: Callable[..., str], reads: list[str]
) -> None:
    run(pictures)
    shutil.copytree("pics", "copy")
    reads.clear()
    assert run("copy").endswith("12 added, 0 changed, 0 removed, 12 as before\n")
    assert reads == []


def test_an_index_names_what_embedded_it(
    pictures: Path, run: Callable[..., str], tiny_bundle: Path
) -> None:
    run(pictures)
    index = Index.load(Path("index.npz"))
    assert index.embedder == Encoder.open(tiny_bundle).embedder("image")
    run(pictures)
    assert Index.load(Path("index.npz")).embedder == index.embedder
    Index(index.keys, index.embeddings, index.space).save(Path("index.npz"))  # of an older version
    picture(Path("more/a.png"), 60)
    run("more")
    assert Index.load(Path("index.npz")).embedder == ""  # not known of most entries
    run("more", "--replace")
    assert Index.load(Path("index.npz")).embedder == index.embedder


def test_an_index_without_its_contents_is_made_again(
    pictures: Path, run: Callable[..., str], reads: list[str]
) -> None:
    run(pictures)
    before = loaded()
    Path("index.npz.contents").unlink()  # as of an earlier version, or copied alone
    reads.clear()
    assert run(pictures).endswith("0 added, 0 changed, 0 removed, 12 as before\n")
    assert len(reads) == 12
    assert loaded() == before
    assert "index.npz.contents" in files()


def test_a_killed_run_goes_on(
    pictures: Path, run: Callable[..., str], reads: list[str], tiny_bundle: Path
) -> None:
    words = ["pics", "--bundle", str(tiny_bundle), "--out", "index.npz", "--batch-size", "4"]
    script = Path(__file__).with_name("killed_embed.py")
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, script, "10", *words],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert "index.npz" not in files()
    run(pictures)
    assert sorted(reads) == ["08.png", "09.png", "10.png", "11.png"]
    assert files() == ["index.npz", "index.npz.contents"]
    resumed = Index.load(Path("index.npz"))
    run(pictures, "--replace")
    whole = Index.load(Path("index.npz"))
    assert resumed.keys == whole.keys
    assert resumed.embeddings.tobytes() == whole.embeddings.tobytes()


def test_an_interrupted_run_says_what_it_keeps(
    pictures: Path,
    run: Callable[..., str],
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(path: Path, *more: Any) -> Any:
        if path.name == "06.png":
            raise KeyboardInterrupt
        return resize_and_crop(path, *more)

    monkeypatch.setattr(preprocess, "resize_and_crop", interrupted)
    said = run(pictures, status=130)
    assert said.endswith("edgeclip: stopped; 4 embeddings are kept, so run it again to go on\n")


def test_an_interrupted_replacement_goes_on(
    pictures: Path, run: Callable[..., str], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pictures)
    arguments = (pictures, "--replace", "--precision", "fp32")

    def interrupted(path: Path, *more: Any) -> Any:
        if path.name == "06.png":
            raise KeyboardInterrupt
        return resize_and_crop(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "resize_and_crop", interrupted)
        assert "4 embeddings are kept, so run it again to go on" in run(*arguments, status=130)
    reads.clear()
    run(*arguments)
    assert sorted(reads) == [f"{number:02}.png" for number in range(4, 12)]
    # An unfinished run of another model is no part of it.
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "resize_and_crop", interrupted)
        run(*arguments, status=130)
    reads.clear()
    run(pictures, "--replace")
    assert len(reads) == 12
    assert files() == ["index.npz", "index.npz.contents"]


def test_another_bundle_or_precision_is_refused(
    pictures: Path, run: Callable[..., str], own_bundle: Path, edit_manifest: Callable[..., None]
) -> None:
    run(pictures)
    before = Path("index.npz").read_bytes()
    said = run(pictures, "--precision", "fp32", status=2)
    assert "index.npz was embedded by another bundle, tower or --precision" in said
    assert said.count("edgeclip: error:") == 1
    Path("texts.txt").write_text("a red car\n")
    assert "another bundle, tower" in run("--texts", "texts.txt", status=2)
    assert Path("index.npz").read_bytes() == before
    run(pictures, "--precision", "fp32", "--replace")
    assert Path("index.npz").read_bytes() != before


def test_another_space_is_refused(
    pictures: Path, run: Callable[..., str], tiny_bundle: Path
) -> None:
    run(pictures)
    index = Index.load(Path("index.npz"))
    Index(index.keys, index.embeddings, "7" * 64).save(Path("index.npz"))
    said = run(pictures, status=2)
    assert "was made in the embedding space 777777777777, not in 555555555555" in said
    assert "--replace" in said
    assert Index.load(Path("index.npz")).space == "7" * 64


@pytest.mark.parametrize("content", [b"", b"PK no index"])
def test_what_is_no_index_is_not_replaced(
    pictures: Path, run: Callable[..., str], content: bytes
) -> None:
    Path("index.npz").write_bytes(content)
    assert "index.npz is damaged" in run(pictures, status=2)
    assert Path("index.npz").read_bytes() == content
    run(pictures, "--replace")


def test_too_many_bad_pictures(
    pictures: Path, run: Callable[..., str], reads: list[str], capsys: Capture
) -> None:
    for number in range(3):
        (pictures / f"bad{number}.png").write_bytes(b"<html>404</html>")
    said = run(pictures, "--max-bad", "2", status=2)
    assert "3 of 15 images cannot be read, and 2 are allowed: pics/bad0.png is" in said
    assert said.count("skipped: ") == 3
    assert "index.npz" not in files()
    reads.clear()
    assert run(pictures, "--max-bad", "20%") == "12 embeddings of length 8 in index.npz\n"
    assert sorted(reads) == [
        "bad0.png"
    ]  # nothing is embedded twice, and the same bytes are read once
    picture(pictures / "bad1.png", 33)
    reads.clear()
    assert run(pictures).endswith("1 added, 0 changed, 0 removed, 12 as before\n")
    assert sorted(reads) == ["bad0.png", "bad1.png"]


def test_a_line_that_occurs_again_keeps_its_row(pictures: Path, run: Callable[..., str]) -> None:
    Path("texts.txt").write_text("a red car\na blue sea\na red car\n")
    run("--texts", "texts.txt")
    assert run("--texts", "texts.txt").endswith("0 added, 0 changed, 0 removed, 3 as before\n")
    texts = Index.load(Path("index.npz"))
    assert texts.keys == ("a red car", "a blue sea", "a red car")
    Path("index.npz.contents").unlink()  # or pictures would be refused beside texts
    run(pictures)
    index = Index.load(Path("index.npz"))
    assert index.keys[:3] == texts.keys
    assert np.array_equal(index.embeddings[:3], texts.embeddings)
    assert len(index.keys) == 15


def test_texts_are_embedded_once(pictures: Path, run: Callable[..., str]) -> None:
    Path("texts.txt").write_text("a red car\na blue sea\na green tree\n")
    run("--texts", "texts.txt")
    before = loaded()
    Path("texts.txt").write_text("a green tree\na red hill\na red car\n")
    assert run("--texts", "texts.txt").endswith("1 added, 0 changed, 1 removed, 2 as before\n")
    after = loaded()
    assert list(after) == ["a green tree", "a red hill", "a red car"]
    assert after["a red car"] == before["a red car"]


def test_a_text_that_is_too_long_is_found_before_any_is_embedded(
    pictures: Path, run: Callable[..., str]
) -> None:
    Path("texts.txt").write_text("a red car\n" * 20 + "red " * 500)
    assert "the limit is 16" in run("--texts", "texts.txt", status=2)
    assert files() == []


def test_a_disk_that_fills_up(
    pictures: Path, run: Callable[..., str], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.replace  # the index is renamed to its name last
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(self: Path, target: Path) -> Path:
        if Path(target).name == "index.npz":
            raise full
        write(self, target)
        return Path(target)

    monkeypatch.setattr(Path, "replace", refuse)
    said = run(pictures, status=2)
    assert said.endswith("cannot write index.npz: No space left on device\n")
    assert files() == ["index.npz.part"]


def test_no_room_is_found_before_the_first_picture(
    pictures: Path, run: Callable[..., str], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "index.npz needs 2,160 bytes, and 500 bytes are free on its disk" in run(
        pictures, status=2
    )
    assert reads == []


def test_two_processes_do_not_write_one_index(pictures: Path, run: Callable[..., str]) -> None:
    from edgeclip.runtime.cli.options import Targets, claim_targets

    with claim_targets(Targets(files=(Path("index.npz"),))):
        said = run(pictures, status=2)
    assert "another process of edgeclip writes index.npz: wait until it has ended" in said
    run(pictures)
