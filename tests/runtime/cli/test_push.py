"""`edgeclip push`, through the command line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cli import main as cli
from tests.runtime.fake_hub import TOKEN, USER, FakeHub, serve_to

REPO = f"{USER}/tiny"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The Hub that `HF_ENDPOINT` would name; that variable is read at import only."""
    with serve_to(monkeypatch, tmp_path) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


def test_dry_run_asks_nobody(
    hub: FakeHub, own_bundle: Path, tmp_path: Path, capsys: Capture
) -> None:
    (own_bundle / "stray.txt").write_text("not declared")
    card = tmp_path / "card.md"
    arguments = ["push", str(own_bundle), REPO, "--private", "--revision", "trial"]
    assert cli.main([*arguments, "--dry-run", "--card", str(card)]) == 0
    head, *lines, total, written = capsys.readouterr().out.splitlines()
    assert head == f"would send to {REPO} (private), branch trial: EdgeCLIP bundle tiny"
    sent = {name: int(size.replace(",", "")) for size, name in (line.split() for line in lines)}
    declared = {file.path: file.bytes for file in Bundle.open(own_bundle).manifest.files}
    assert sent == {
        **declared,
        "edgeclip.json": (own_bundle / "edgeclip.json").stat().st_size,
        "README.md": card.stat().st_size,
    }
    assert total == f"{len(sent)} files, {sum(sent.values()) / 1e6:,.2f} MB; nothing was sent"
    assert written == f"model card written to {card}"
    assert card.read_text(encoding="utf-8").startswith("---\n")
    assert hub.requests == []


def test_push(hub: FakeHub, tiny_bundle: Path, tmp_path: Path, capsys: Capture) -> None:
    hub.add(REPO, {"edgeclip.json": b"{}", "onnx/old.onnx": b"old"})
    card = tmp_path / "card.md"
    arguments = ["push", str(tiny_bundle), REPO, "--message", "first", "--card", str(card)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    commit = hub.repos[REPO].branches["main"]
    assert "removed onnx/old.onnx, which an earlier bundle had left\n" in printed.out
    assert f" in {REPO}, branch main, commit {commit[:12]}\n" in printed.out
    assert f"{hub.url}/{REPO}/commit/{commit}\n" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert hub.repos[REPO].files["README.md"] == card.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["other/tiny"], "this token may not do it (403)"),
        (["tiny"], "'tiny' is no repository: give USER/NAME"),
        ([REPO, "--message", ""], "the message of the commit is empty"),
    ],
)
def test_faults_are_one_line(
    hub: FakeHub, tiny_bundle: Path, capsys: Capture, arguments: list[str], said: str
) -> None:
    assert cli.main(["push", str(tiny_bundle), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("edgeclip: error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_altered_bundle_is_not_sent(hub: FakeHub, own_bundle: Path, capsys: Capture) -> None:
    (own_bundle / "tokenizer.json").write_text("{}")
    assert cli.main(["push", str(own_bundle), REPO]) == 2
    assert "tokenizer.json" in capsys.readouterr().err
    assert hub.requests == []


def test_import_costs_nothing() -> None:
    code = "import sys, edgeclip.runtime.cli.push; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
