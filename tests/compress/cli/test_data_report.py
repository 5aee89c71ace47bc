"""data-report as a person runs it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeclip.compress.data.keep_list import kept_rows, read_keep_list
from edgeclip.compress.data.sources import FolderSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.runtime.cli.main import main
from tests.page import visible

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]


def report(teacher: Path, data: Path | str, out: Path, *more: object) -> int:
    words = ["data-report", "--teacher", teacher, "--data", data, "--out", out, *more]
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def flawed(few_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of which one is broken, one is there twice, and one a second time as a PNG."""
    folder = tmp_path_factory.mktemp("flawed") / "train"
    shutil.copytree(few_pictures, folder)
    shutil.copy(folder / "0001.bmp", folder / "again.bmp")
    Image.open(folder / "0002.bmp").resize((20, 20)).save(folder / "larger.png")
    (folder / "broken.bmp").write_bytes(b"no picture")
    Image.open(folder / "0002.bmp").save(folder / "pixels.png")
    rows = ["again.bmp,again", "larger.png,larger", "broken.bmp,broken", "pixels.png,pixels"]
    table = (folder / "captions.csv").read_text(encoding="utf-8").splitlines()
    with (folder / "captions.csv").open("w", encoding="utf-8") as file:
        file.write("file,caption,where\n")
        for place, line in enumerate([*table[1:], *rows]):
            file.write(f"{line},{'garden' if place % 2 else '<b>street</b>'}\n")
    for split in ("calibration", "test"):
        shutil.copytree(few_pictures, folder.parent / split)
    return folder.parent


def test_page_list_and_figures(
    teacher_folder: Path, flawed: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report"
    more = ["--group-by", "where", "--duplicate-cosine", 0.99999]
    assert report(teacher_folder, flawed, out, *more) == 0
    printed = capsys.readouterr().out
    assert "1 left out: cannot be read" in printed
    assert "1 left out: the same file again" in printed
    source = FolderSource(flawed / "train", min_side=32)
    names = [path.name for path in source.paths]
    keep = read_keep_list(out / "keep.txt")
    kept = [names[row] for row in kept_rows(source, keep)]
    assert f"{len(kept)} of 24 pictures are kept" in printed
    assert not {"again.bmp", "broken.bmp"} & set(kept)
    assert "0001.bmp" in kept
    # The same pixels in another file: whichever is kept, it is one.
    assert len({"0002.bmp", "pixels.png"} & set(kept)) <= 1
    assert any("data-report" in line for line in keep.comments)
    with np.load(out / "figures.npz", allow_pickle=False) as figures:
        assert [names[row] for row in np.flatnonzero(figures["left_out"] == "")] == kept
        again = names.index("again.bmp")
        assert names[figures["same_as"][again]] == "0001.bmp"
        assert np.isfinite(figures["sharpness"]).sum() == 23
        assert figures["short_side"][names.index("larger.png")] == 20
    html = (out / "report.html").read_text(encoding="utf-8")
    seen = visible(html)
    for words in ("What is left out", "Nearly the same pictures", "Captions", "Groups by where"):
        assert words in seen
    assert "<b>street" not in html
    assert "data:image/jpeg" in html
    assert not re.findall(r'(?:src|href)="http', html)
    assert "edgeclip distill" in seen


def test_the_cache_is_that_of_distill(
    teacher_folder: Path, flawed: Path, tmp_path: Path, capsys: Capture
) -> None:
    cache = tmp_path / "cache"
    assert report(teacher_folder, flawed, tmp_path / "report", "--cache", cache) == 0
    made = (cache / "image.rows").stat().st_mtime_ns
    source = FolderSource(flawed / "train", min_side=32)
    build_cache(DualEncoder.load(teacher_folder), source, cache)
    assert (cache / "image.rows").stat().st_mtime_ns == made
    # Once more costs nothing, and replaces the report as a whole.
    (tmp_path / "report" / "report.html").unlink()
    assert report(teacher_folder, flawed, tmp_path / "report", "--cache", cache) == 0
    assert (tmp_path / "report" / "report.html").exists()


def test_pictures_without_captions_and_rules(
    teacher_folder: Path, few_pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in few_pictures.glob("*.bmp"):
        shutil.copy(path, bare)
    out = tmp_path / "report"
    more = ["--duplicate-cosine", 2, "--min-side", 17]
    assert report(teacher_folder, bare, out, *more) == 2
    assert "rules leave nothing" in capsys.readouterr().err
    assert not out.exists()
    assert report(teacher_folder, bare, out, "--duplicate-cosine", 2) == 0
    seen = visible((out / "report.html").read_text(encoding="utf-8"))
    assert "no captions" in seen
    assert "agree" not in seen


def test_mistakes_are_told_before_the_work(
    teacher_folder: Path, few_pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report"
    for more, says in (
        (["--group-by", "nothing"], "no column is called 'nothing'"),
        (["--max-noise", -1], "--max-noise must be 0 or above"),
    ):
        assert report(teacher_folder, few_pictures, out, *more) == 2
        assert says in capsys.readouterr().err
    out.mkdir()
    (out / "mine.txt").write_text("", encoding="utf-8")
    assert report(teacher_folder, few_pictures, out) == 2
    assert "so it is not replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_interrupted_it_goes_on(
    teacher_folder: Path, many_pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, cache = tmp_path / "report", tmp_path / "report-cache"
    words = ["data-report", "--teacher", teacher_folder, "--data", many_pictures, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeclip.runtime.cli.main", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = cache / "statistics.rows"
    until = time.monotonic() + 120
    while not (rows.exists() and rows.stat().st_size > 2000) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "run it again to go on" in told
    assert not out.exists()
    kept = rows.stat().st_size
    assert report(teacher_folder, many_pictures, out) == 0
    assert rows.stat().st_size >= kept
    assert (out / "keep.txt").exists()
