"""The images of a folder, the account of everything else in it, and how many may be unreadable."""

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import (
    DEFAULT_MAX_BAD,
    MaxBad,
    find_images,
    forget_left_out,
    list_images,
    parse_max_bad,
    readable_images,
    report_bad,
    report_left_out,
)

Told = Callable[[], str]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """What is reported as left out, "" for nothing."""
    forget_left_out()

    def report() -> str:
        caplog.clear()
        report_left_out()
        return " ".join(caplog.messages)

    return report


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_images(folder)]


def test_images_are_sorted_recursive_and_by_suffix(tmp_path: Path, told: Told) -> None:
    touch(tmp_path, "b.JPG", "a/z.png", "c.webp", "d.avif", "e.JPEG")
    (tmp_path / "folder.png").mkdir()
    assert names(tmp_path) == ["a/z.png", "b.JPG", "c.webp", "d.avif", "e.JPEG"]
    assert told() == ""


def test_captions_are_part_of_the_images(tmp_path: Path, told: Told) -> None:
    touch(tmp_path, "a.png", "a.TXT", "deep/b.jpg", "deep/b.txt", "captions.csv", ".DS_Store")
    touch(tmp_path, ".git/config")
    assert names(tmp_path) == ["a.png", "deep/b.jpg"]
    assert told() == ""


def test_all_else_is_counted_and_named(tmp_path: Path, told: Told) -> None:
    touch(tmp_path, "a.png", "clip.mov", "notes.txt", "deep/captions.csv", "no-suffix")
    touch(tmp_path, "._a.png", ".hidden/d.png")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path) == ["a.png"]
    line = told()
    assert line.startswith("left out 8 files: ")
    for name in ("clip.mov", "notes.txt", "captions.csv", "no-suffix", "._a.png", ".hidden"):
        assert name in line
    assert "a broken link: " in line
    assert "no regular file: " in line
    assert told() == ""  # told once
    with pytest.raises(InputError, match=r"8 files: .*without --strict they are left out"):
        list_images(tmp_path, strict=True)


def test_many_are_counted_and_some_named(tmp_path: Path, told: Told) -> None:
    touch(tmp_path, "a.png", *(f"{number:03d}.mov" for number in range(100)))
    list_images(tmp_path)
    list_images(tmp_path)  # opened twice, counted once
    line = told()
    assert "left out 100 files" in line
    assert "000.mov" in line
    assert "and 95 more (-v names all)" in line


def test_linked_folders_and_files_are_followed(tmp_path: Path, told: Told) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root, "a.png")
    touch(other, "b.png", "deeper/c.png")
    (root / "linked").symlink_to(other)
    (root / "d.png").symlink_to(other / "b.png")
    assert names(root) == ["a.png", "d.png", "linked/b.png", "linked/deeper/c.png"]
    assert told() == ""


def test_a_link_to_a_folder_above_ends(tmp_path: Path, told: Told) -> None:
    touch(tmp_path, "a/b/c.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "itself").symlink_to("itself")
    assert names(tmp_path) == ["a/b/c.png"]
    assert "a link to a folder above it" in (line := told())
    assert "itself" in line


@pytest.mark.parametrize("suffix", [".HEIC", ".jxl", ".dng", ".NEF"])
def test_formats_without_their_package_are_named(
    tmp_path: Path, told: Told, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", f"b{suffix}", f"c{suffix}", "c.txt")
    monkeypatch.setattr("edgeclip.runtime.inputs.images.find_spec", lambda name: object())
    assert names(tmp_path) == ["a.jpg", f"b{suffix}", f"c{suffix}"]
    monkeypatch.setattr("edgeclip.runtime.inputs.images.find_spec", lambda name: None)
    assert names(tmp_path) == ["a.jpg"]
    assert "left out 2 files" in (line := told())
    assert "pip install 'edgeclip[images]'" in line
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"holds no images: .* of 2 .*edgeclip\[images\]"):
        list_images(tmp_path)


def test_what_holds_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="holds no images"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        list_images(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_folder_without_permission_is_named(tmp_path: Path, told: Told) -> None:
    touch(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)
    assert names(tmp_path) == ["a.png"]
    assert "cannot be listed" in told()
    (tmp_path / "closed").chmod(0o700)


def test_files_and_folders_together_count_once(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.png", "x/b.png", "c.odd")
    paths = [tmp_path / "x" / "b.png", tmp_path / "x", tmp_path / "c.odd"]
    assert [path.name for path in find_images(paths)] == ["b.png", "a.png", "c.odd"]
    spelled = [tmp_path / "x", tmp_path / "x" / ".." / "x", tmp_path / "x" / ".." / "c.odd"]
    assert [path.name for path in find_images(spelled)] == ["a.png", "b.png", "c.odd"]
    with pytest.raises(InputError, match="does not exist"):
        find_images([tmp_path / "missing.png"])


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [
        ("1%", 2000, 20),
        ("1%", 199, 1),
        ("1%", 99, 0),
        ("0.5%", 1000, 5),
        ("29%", 100, 29),
        ("100%", 7, 7),
        ("0", 1000, 0),
        ("0%", 1000, 0),
        ("12", 3, 12),
    ],
)
def test_limits(text: str, total: int, allowed: int) -> None:
    assert parse_max_bad(text).allowed(total) == allowed


@pytest.mark.parametrize(("total", "allowed"), [(3, 5), (500, 5), (2000, 20)])
def test_default_allows_a_few_in_a_small_set(total: int, allowed: int) -> None:
    assert DEFAULT_MAX_BAD.allowed(total) == allowed


@pytest.mark.parametrize("text", ["", "1.5", "-1", "-1%", "many", "1 %%", "101%", "nan", "1e3"])
def test_no_limits(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_max_bad(text)


def test_some_are_named_and_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    reasons = [f"{number}.jpg is damaged" for number in range(30)]
    report_bad(reasons, 1000, MaxBad(share=0.03, count=0))
    said = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert sorted(text for _, text in said if text.endswith("is damaged")) == sorted(
        f"skipped: {reason}" for reason in reasons
    )
    shown = [text for level, text in said if level == logging.INFO]
    assert len(shown) == 22
    assert shown[-2:] == ["skipped: 10 more, which -v names", "skipped 30 of 1000 images"]
    with pytest.raises(
        InputError, match=r"^30 of 1000 images cannot be read, and 29 are allowed: 0"
    ):
        report_bad(reasons, 1000, MaxBad(share=0.0299, count=0))
    with pytest.raises(InputError, match=r"4\.jpg is damaged; and 25 more\. .* --max-bad 3%$"):
        report_bad(reasons, 1000, MaxBad(share=0, count=1))


def test_nothing_is_bad(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    report_bad([], 0, MaxBad(share=0, count=0))
    report_bad([], 10, None)
    assert not caplog.records


def test_everything_is_bad() -> None:
    with pytest.raises(InputError, match=r"none of 2 images could be read; the first: a"):
        report_bad(["a is damaged", "b is damaged"], 2, None)


def test_any_number_may_be_bad() -> None:
    report_bad(["a is damaged"] * 9, 10, None)


def test_the_first_readable_images_are_kept(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="edgeclip.runtime")
    paths = list_images(photos)
    paths[0].write_bytes(b"")
    assert readable_images(paths) == paths[1:]
    assert f"skipped: {paths[0]}" in caplog.text
    assert readable_images(paths, most=1) == paths[1:2]
    with pytest.raises(InputError, match=r"1 of 3 images .*, and 0 are allowed"):
        readable_images(paths, limit=MaxBad(share=0.0, count=0))
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of 3 images could be read"):
        readable_images(paths)
