"""What the documents show works: commands are run, links lead somewhere, fields are complete.

Each document is followed from top to bottom in a folder of its own, as a reader would who has
run the demo before. What takes long is shortened by `SHORTER`. A block behind the comment
`<!-- not run: REASON -->` is not run.
"""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgeclip.profiles.workload import Workload
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.device.link import LinkProfile
from tests.captures import captured_once, captures  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL
)
TINY_TEACHER = (
    *("--steps", "2", "--batch-size", "16", "--image-size", "32", "--patch-size", "8"),
    *("--image-width", "64", "--image-layers", "2", "--text-width", "64", "--text-layers", "2"),
    *("--head-size", "32", "--dim", "32", "--vocab-size", "400"),
)
LEAST = """\
name: least
description: a bit of everything, hardly measured
batch_sizes: [1]
min_warmup_runs: 3
max_warmup_seconds: 0.1
repeats: 5
seconds_per_batch: 0.02
cold_starts: 0
roofline_seconds: 0.5
"""
# What a command that begins so gets in addition, or in place of its own value, to end soon.
SHORTER: dict[str, dict[str, str | None]] = {
    "distill": {"--steps": "2", "--batch-size": "8", "--image-layers": "1", "--text-layers": "1"},
    "profile": {"--workload": "least.yaml", "--parts": "text", "--brief": None},
    "cascade": {"--test-count": "600", "--calibration-count": "100", "--gallery-count": "20"},
    "scenes scenes": {"--count": "20"},
    "scenes many": {"--count": "20"},
    "measure-cuts": {"--rounds": "10"},
    "tune": {"--tower": "text", "--goal": "latency"},
    "diagnose": {"--count": "48"},
    "quantize": {"--minutes": "0.05", "--accept-undecided": None},
    "export compress/emoji_teacher": {
        **{"--test-count": "128", "--calibration-count": "64"},
        "--device": "x86-avx2",  # graph passes are timed for this machine alone
    },
    # A student of two steps is in no space.
    "export": {
        "--teacher-mean-cosine": "-1",
        "--teacher-p1-cosine": "-1",
        "--teacher-r1-kept": "0",
        "--accept-undecided": None,
    },
}
# What is downloaded, and what stands for it here.
LOCAL = {"openai/clip-vit-large-patch14": "teacher-weights", "TEACHER": "teacher-weights"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    code: str
    reason: str | None

    @property
    def lines(self) -> list[str]:
        """The commands as they are typed, without comments."""
        lines = [line.split("  #")[0].split(" # ")[0].strip() for line in self.code.splitlines()]
        return [line for line in lines if line]

    @property
    def commands(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.lines]


def blocks(text: str) -> list[Block]:
    return [
        Block(found["language"], found["code"], found["reason"]) for found in _BLOCK.finditer(text)
    ]


def shortened(words: list[str]) -> list[str]:
    """The words of a command with those of `SHORTER`."""
    words = [LOCAL.get(word, word) for word in words]
    line = shlex.join(words)
    for begin, options in SHORTER.items():
        for option, value in options.items() if line.startswith(begin + " ") else ():
            if option in words:
                words[words.index(option) + 1] = str(value)
            else:
                words += [option] if value is None else [option, value]
    return words


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after the demo, with pictures and a teacher of the reader's own."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("compress", "export", "profiles"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "export" / "emoji_bundle", folder / "runs" / "demo" / "bundle")
    (folder / "least.yaml").write_text(LEAST, encoding="utf-8")
    with chdir(folder):
        for name, count in (("photos", "240"), ("scenes", "20")):
            assert main(["scenes", name, "--count", count]) == 0
        assert main(["embed", "scenes", "--bundle", "runs/demo/bundle", "--out", "scenes.npz"]) == 0
        assert main(["pretrain", "--out", "teacher-weights", *TINY_TEACHER]) == 0
        words = ["--data", "photos", "--out", "student", "--steps", "2", "--batch-size", "8"]
        words += ["--image-layers", "1", "--text-layers", "1"]
        assert main(["distill", "--teacher", "teacher-weights", *words]) == 0
    return folder


@pytest.fixture
def running(reader: Path, tmp_path: Path) -> Iterator[ExitStack]:
    """A copy of the reader's folder as the current one; servers end with the test."""
    folder = shutil.copytree(reader, tmp_path / "reader", symlinks=True)
    with chdir(folder), ExitStack() as stack:
        yield stack


def serve(words: list[str], stack: ExitStack) -> None:
    """Start a server as shown; a second one takes the place of the first."""
    stack.close()
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "edgeclip.runtime.cli.main", *words],
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(process.terminate)
    assert process.stdout is not None
    assert "serving" in process.stdout.readline()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TEXTS)
def test_what_a_document_shows_runs(
    name: str, running: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(TEXTS[name]):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.code, name, "exec"), {"__name__": "__main__"})
        for line in block.lines if block.language == "sh" else ():
            words = shlex.split(line)
            if words[0] == "curl" and shutil.which("curl"):
                done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
                assert "outputs" in json.loads(done.stdout), done.stdout
            if words[0] != "edgeclip" or words[-1] == "--help":
                continue
            began = time.monotonic()
            if words[1] == "serve":
                serve(words[1:], running)
                continue
            if words[1] == "distill":  # the reader's own is there already, and finished
                out = words[words.index("--out") + 1]
                for left in (out, f"{out}-run"):
                    shutil.rmtree(left, ignore_errors=True)
            status = main(shortened(words[1:]))
            said = capsys.readouterr()
            with capsys.disabled():
                print(f"\n{time.monotonic() - began:6.1f} s {shlex.join(words)}", end="")
            assert status == 0, f"{shlex.join(words)}\n{said.out}\n{said.err}"


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_is_run_or_says_why_not(name: str) -> None:
    shown = [line for line in TEXTS[name].splitlines() if line.startswith("edgeclip ")]
    inside = "".join(block.code for block in blocks(TEXTS[name]) if block.language == "sh")
    assert [line for line in shown if line not in inside] == []


@pytest.mark.parametrize("name", TEXTS)
def test_options_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(TEXTS[name]):
        for words in block.commands if block.language == "sh" else ():
            if words[0] != "edgeclip":
                continue
            with pytest.raises(SystemExit):
                main([words[1], "--help"])
            known = capsys.readouterr().out
            assert [word for word in words if word.startswith("--") and word not in known] == []


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", TEXTS[name], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    folder = (ROOT / name).parent
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", TEXTS[name]):
        path = (folder / link).resolve() if link else ROOT / name
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in slugs


@pytest.mark.parametrize("kind", [DeviceProfile, LinkProfile, Workload])
def test_every_field_of_a_profile_is_described(kind: Any) -> None:
    (section,) = re.findall(
        rf"^## {kind.__name__}\n(.*?)(?=^## |\Z)",
        TEXTS["docs/profiles.md"],
        re.MULTILINE | re.DOTALL,
    )
    described = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(described) == sorted(field.name for field in dataclasses.fields(kind))


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 200
