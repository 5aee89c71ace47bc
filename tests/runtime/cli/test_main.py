"""The program itself: dispatch, exit status, messages, logging."""

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tqdm import tqdm

from edgeclip.runtime.cli import main as cli
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.logs import log_json_line

Capture = pytest.CaptureFixture[str]
HEAVY = {"numpy", "PIL", "onnxruntime", "tokenizers", "pydantic", "torch", "yaml", "tqdm"}


def edgeclip(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "edgeclip.runtime.cli.main", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(arguments: list[str], capsys: Capture) -> None:
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(cli.COMMANDS)


def test_nothing_asked_for(capsys: Capture) -> None:
    assert cli.main([]) == 2
    assert "usage: edgeclip COMMAND" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeclip {importlib.metadata.version('edgeclip')}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from edgeclip.runtime.cli.main import main\n"
        "main(['--help']); main(['--version'])\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "edgeclip" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_unknown_command_suggests_a_near_one(capsys: Capture) -> None:
    assert cli.main(["serach"]) == 2
    assert capsys.readouterr().err == (
        "edgeclip: error: no command 'serach': did you mean 'search'?\n"
    )
    assert cli.main(["xyzzy"]) == 2
    assert "edgeclip --help lists all" in capsys.readouterr().err


def skip_without_what_it_needs(name: str) -> None:
    """Skip a test of a command that trains or exports where only the runtime is installed."""
    if cli.COMMANDS[name].trains:
        pytest.importorskip("torch", reason="only the runtime is installed")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: Capture) -> None:
    skip_without_what_it_needs(name)
    command = cli.COMMANDS[name]
    assert find_spec(command.module) is not None, f"{command.module} does not exist"
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: edgeclip {name}" in capsys.readouterr().out


class Fake:
    """The module of a command that does what a test asks for."""

    __doc__ = "A command."

    def __init__(self, fault: BaseException | None = None, status: int = 0) -> None:
        self.fault = fault
        self.status = status

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--number", type=int)

    def run(self, args: Any) -> int:
        if self.fault is not None:
            raise self.fault
        return self.status


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a module behind the commands `try` (needing an extra) and `plain`."""

    def install(module: Any) -> None:
        monkeypatch.setitem(sys.modules, "edgeclip_test_command", module)
        monkeypatch.setitem(
            cli.COMMANDS, "try", cli.Command("edgeclip_test_command", "try", "export")
        )
        monkeypatch.setitem(cli.COMMANDS, "plain", cli.Command("edgeclip_test_command", "plain"))

    return install


@pytest.mark.parametrize("status", [0, 1])
def test_status_is_the_commands(command: Any, status: int) -> None:
    command(Fake(status=status))
    assert cli.main(["try"]) == status


def test_mistake_is_one_line_and_no_traceback(command: Any, capsys: Capture) -> None:
    command(Fake(InputError("no such thing: take another")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "edgeclip: error: no such thing: take another\n"


def test_file_system_fault_names_the_file(command: Any, capsys: Capture) -> None:
    command(Fake(OSError(28, "No space left on device", "out.npz")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "edgeclip: error: out.npz: No space left on device\n"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (OSError("odd"), "odd")],
)
def test_file_system_fault_without_a_file(
    command: Any, capsys: Capture, fault: OSError, reason: str
) -> None:
    command(Fake(fault))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == f"edgeclip: error: {reason}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_under_stdout_is_one_line() -> None:
    command = f"{sys.executable} -m edgeclip.runtime.cli.main --help > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "edgeclip: error: No space left on device\n"


def test_fault_of_the_software_is_not_hidden(command: Any) -> None:
    for fault in (ZeroDivisionError(), ImportError("x", name="edgeclip.x")):
        command(Fake(fault))
        with pytest.raises(type(fault)):
            cli.main(["try"])
    command(Fake(ModuleNotFoundError("x", name="torch")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["plain"])


def test_missing_extra_says_how_to_install_it(command: Any, capsys: Capture) -> None:
    command(Fake(ModuleNotFoundError("No module named 'onnx'", name="onnx.helper")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == (
        "edgeclip: error: edgeclip try needs the package 'onnx': pip install 'edgeclip[export]'\n"
    )


@pytest.mark.parametrize("name", ["try", "plain"])
def test_missing_engine_names_its_own_extras(command: Any, capsys: Capture, name: str) -> None:
    command(Fake(ModuleNotFoundError("x", name="onnxruntime.quantization")))
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == (
        f"edgeclip: error: edgeclip {name} needs the package 'onnxruntime': "
        "pip install 'edgeclip[cpu]' or 'edgeclip[gpu]'\n"
    )


def test_extra_missing_at_import(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "needs_torch.py").write_text("import torch_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("needs_torch", "try", "compress"))
    assert cli.main(["try", "--help"]) == 2
    assert "pip install 'edgeclip[compress]'" in capsys.readouterr().err


def test_training_is_not_for_the_python_of_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    assert cli.main(["distill", "--help"]) == 2
    error = capsys.readouterr().err
    assert "edgeclip distill needs Python 3.11 or later, and this is 3.10" in error
    assert error.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", "--help"])
    assert caught.value.code == 0


def test_interruption(command: Any, capsys: Capture) -> None:
    command(Fake(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "edgeclip: interrupted\n"


def test_wrong_option_is_argparses_to_explain(command: Any, capsys: Capture) -> None:
    command(Fake())
    with pytest.raises(SystemExit) as caught:
        cli.main(["try", "--number", "three"])
    assert caught.value.code == 2
    assert "invalid int value: 'three'" in capsys.readouterr().err


class Notices:
    """A command that logs, and draws a progress bar meanwhile."""

    __doc__ = "Notices."

    def add_arguments(self, parser: Any) -> None:
        pass

    def run(self, args: Any) -> int:
        log = logging.getLogger("edgeclip.runtime.test")
        with tqdm(total=2, file=sys.stderr) as bar:
            bar.update()
            log.debug("detail %d", 1)
            log.info("notice")
            log.warning("slow")
            logging.getLogger("library").info("chatter")
            warnings.warn("old", stacklevel=1)
        return 0


def lines_of(text: str) -> list[str]:
    """The lines on stderr that are not of a progress bar."""
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and "it/s" not in line]


@pytest.mark.parametrize("words", [["plain"], ["plain", "-v"], ["--verbose", "plain"]])
def test_messages_are_plain_lines_on_stderr(
    command: Any, capsys: Capture, words: list[str]
) -> None:
    command(Notices())
    with pytest.warns(UserWarning, match="old"):
        assert cli.main(words) == 0
    found = capsys.readouterr()
    own = [line for line in lines_of(found.err) if "|" not in line]
    detail = ["edgeclip.runtime.test: detail 1"] if len(words) == 2 else []
    assert (own, found.out) == ([*detail, "notice", "edgeclip: slow"], "")


@pytest.mark.parametrize("words", [["plain", "--log-json"], ["--log-json", "-v", "plain"]])
def test_messages_as_json(command: Any, capsys: Capture, words: list[str]) -> None:
    command(Notices())
    assert cli.main(words) == 0
    entries = [
        json.loads(line) for line in lines_of(capsys.readouterr().err) if line.startswith("{")
    ]
    assert all(set(entry) == {"time", "level", "logger", "message"} for entry in entries)
    found = [(entry["level"], entry["message"]) for entry in entries]
    assert found[: "-v" in words] == [("DEBUG", "detail 1")] * ("-v" in words)
    assert found["-v" in words :][:2] == [("INFO", "notice"), ("WARNING", "slow")]
    assert "UserWarning: old" in found[-1][1]
    datetime.fromisoformat(entries[0]["time"])


ODD = "\x1b[31mcafé\x1b[0m \udce9 猫"


class Shows:
    """A command that prints, logs and fails with an odd name."""

    __doc__ = "Shows a cat: 猫."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--number", type=int, help="of 猫")

    def run(self, args: Any) -> int:
        print(ODD)
        logging.getLogger("edgeclip.runtime.test").info("%s", ODD)
        raise InputError(f"cannot read {ODD}")


def test_control_characters_are_escaped_on_both_streams(command: Any, capsys: Capture) -> None:
    command(Shows())
    assert cli.main(["plain"]) == 2
    found = capsys.readouterr()
    shown = r"\x1b[31mcafé\x1b[0m \udce9 猫"
    assert found.out == f"{shown}\n"
    assert found.err == f"{shown}\nedgeclip: error: cannot read {shown}\n"
    with pytest.raises(SystemExit):
        cli.main(["plain", "--number", "\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


def test_json_messages_are_ascii(command: Any, capsys: Capture) -> None:
    command(Shows())
    assert cli.main(["plain", "--log-json"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert json.loads(lines[0])["message"] == ODD


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp1252:strict", "utf-16"])
def test_every_encoding_of_stdout_is_printed_to(
    encoding: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    picture, index = tmp_path / "猫 é.png", tmp_path / "i.npz"
    Image.new("RGB", (9, 9), "red").save(picture)
    common = ["--bundle", str(tiny_bundle)]
    lines = [
        ["classify", str(picture), "--labels", "red,🐈", *common],
        ["embed", str(picture), "--out", str(index), *common],
        ["search", "a red 🍎", "--index", str(index), *common],
        ["--help"],
        ["search", "a red 🍎", "--index", str(index), "--json", *common],
    ]
    code = (
        "import json, sys; from edgeclip.runtime.cli.main import main\n"
        "assert [main(line) for line in json.loads(sys.argv[1])] == [0, 0, 0, 0, 0]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)],
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.decode(encoding.partition(":")[0])
    assert ("猫" if encoding == "utf-16" else r"\u732b") in out
    hits = out[out.index("\n{") :]
    assert hits.isascii()
    assert list(json.loads(hits)) == ["a red 🍎"]


def test_closed_stdout_is_no_fault() -> None:
    command = f"{sys.executable} -m edgeclip.runtime.cli.main --help >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["--log-json", "try"], ["try", "--log-json"]])
def test_mistakes_as_json(command: Any, capsys: Capture, words: list[str]) -> None:
    command(Fake(InputError("no such thing")))
    assert cli.main(words) == 2
    entry = json.loads(capsys.readouterr().err)
    assert (entry["level"], entry["message"]) == ("ERROR", "no such thing")
    with pytest.raises(SystemExit):
        cli.main([*words, "--number", "three"])
    assert "invalid int value" in json.loads(capsys.readouterr().err)["message"]


def test_logging_is_as_before_after_a_command(command: Any) -> None:
    root, own = logging.getLogger(), logging.getLogger("edgeclip")
    before = (list(root.handlers), own.level)
    command(Fake())
    assert cli.main(["-v", "plain"]) == 0
    assert (root.handlers, own.level) == before


def test_json_lines_of_another_process_are_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    code = (
        "import logging; from edgeclip.runtime.logs import log_to_stderr\n"
        "with log_to_stderr(as_json=True):\n"
        "    logging.getLogger('edgeclip.worker').warning('building %s', 'é')\n"
        "    logging.getLogger('library').warning('chatter')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [log_json_line(line) for line in done.stderr.splitlines()] == [True, False]
    assert caplog.record_tuples == [("edgeclip.worker", logging.WARNING, "building é")]
    for line in ("", "{", "[1]", "edgeclip: x", '{"logger": "edgeclip", "level": "x"}'):
        assert not log_json_line(line)


def test_runs_as_a_module() -> None:
    assert edgeclip("--version").stdout.startswith("edgeclip ")
    wrong = edgeclip("serach")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1


def test_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m edgeclip.runtime.cli.main --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
