"""`edgeclip report` through the command line."""

from pathlib import Path

import pytest

from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.cli.main import main
from tests.profiles.report.profile_factory import disturbed_run, quiet_run

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two measurement files."""
    first, second = tmp_path / "epyc.json", tmp_path / "laptop.json"
    quiet_run().save(first)
    disturbed_run().save(second)
    return first, second


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def fails(capsys: Capture, *arguments: object) -> str:
    assert report(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_runs_side_by_side_as_page_and_markdown(
    files: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    page, markdown = tmp_path / "out" / "page.html", tmp_path / "page.md"
    assert report(*files, "--out", page, "--markdown", markdown) == 0
    assert str(page) in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "student int8 · laptop" in html
    assert "DISTURBED" in html
    assert "What is worth trying" in html
    assert "| student int8 · epyc |" in markdown.read_text(encoding="utf-8")


def test_markdown_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert report(files[0], "--markdown", tmp_path / "page.md") == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8").startswith("### Profile of emoji")


def test_a_bundle_s_quality_beside_its_latency(
    tiny_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    import dataclasses

    run = quiet_run()
    sha256 = sha256_file(tiny_bundle / "edgeclip.json")
    items = []
    for item in run.measurements:
        assert item.identity is not None
        identity = dataclasses.replace(item.identity, sha256=sha256)
        items.append(dataclasses.replace(item, identity=identity))
    dataclasses.replace(run, measurements=tuple(items)).save(tmp_path / "run.json")
    page = tmp_path / "page.html"
    assert report(tmp_path / "run.json", "--bundle", tiny_bundle, "--out", page) == 0
    assert "Quality against latency" in page.read_text(encoding="utf-8")


def test_a_bundle_alone_as_before(tiny_bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert report(tiny_bundle, "--out", page) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "Chosen when the bundle was written." in text


def test_a_bundle_with_measurements_as_before(
    tiny_bundle: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert report(tiny_bundle, "--measurements", files[0], "--out", page) == 0
    assert "Latency, throughput, memory" in page.read_text(encoding="utf-8")


def test_mistakes_say_what_to_give(
    tiny_bundle: Path, files: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    first, second = files
    page = tmp_path / "page.html"
    assert "nothing to write" in fails(capsys, first)
    assert "--measurements goes with a bundle" in fails(
        capsys, first, "--measurements", second, "--out", page
    )
    assert "give one bundle" in fails(capsys, tiny_bundle, first, "--out", page)
    assert "one HTML page" in fails(capsys, tiny_bundle, "--markdown", tmp_path / "page.md")
    assert "cannot read" in fails(capsys, tmp_path / "gone.json", "--out", page)
    (tmp_path / "other.json").write_text('{"schema_version": 1}', encoding="utf-8")
    assert "edgeclip profile" in fails(capsys, tmp_path / "other.json", "--out", page)
    assert not page.exists()
