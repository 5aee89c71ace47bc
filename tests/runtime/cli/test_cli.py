import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgeclip.runtime.cli import main as cli
from edgeclip.runtime.errors import InputError

Capture = pytest.CaptureFixture[str]
HEAVY = {"numpy", "PIL", "onnxruntime", "tokenizers", "pydantic", "torch", "yaml", "tqdm"}


def edgeclip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeclip.runtime.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: Capture) -> None:
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(cli.COMMANDS)


def test_nothing_asked_for(capsys: Capture) -> None:
    assert cli.main([]) == 2
    assert "usage: edgeclip VERB" in capsys.readouterr().out


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


def test_unknown_verb_suggests_a_near_one(capsys: Capture) -> None:
    assert cli.main(["serach"]) == 2
    assert capsys.readouterr().err == (
        "edgeclip: error: no verb 'serach': did you mean 'search'?\n"
    )
    assert cli.main(["xyzzy"]) == 2
    assert "edgeclip --help lists all" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_verb_explains_itself(name: str, capsys: Capture) -> None:
    verb = cli.COMMANDS[name]
    assert find_spec(verb.module) is not None, f"{verb.module} does not exist"
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: edgeclip {name}" in capsys.readouterr().out


class Fake:
    """A verb's module that does what a test asks for."""

    __doc__ = "A verb."

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
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a module behind the verbs `try` (needing an extra) and `plain`."""

    def install(module: Any) -> None:
        monkeypatch.setitem(sys.modules, "edgeclip_test_verb", module)
        monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("edgeclip_test_verb", "try", "export"))
        monkeypatch.setitem(cli.COMMANDS, "plain", cli.Command("edgeclip_test_verb", "plain"))

    return install


@pytest.mark.parametrize("status", [0, 1])
def test_status_is_the_verbs(verb: Any, status: int) -> None:
    verb(Fake(status=status))
    assert cli.main(["try"]) == status


def test_mistake_is_one_line_and_no_traceback(verb: Any, capsys: Capture) -> None:
    verb(Fake(InputError("no such thing: take another")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "edgeclip: error: no such thing: take another\n"


def test_file_system_fault_names_the_file(verb: Any, capsys: Capture) -> None:
    verb(Fake(OSError(28, "No space left on device", "out.npz")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "edgeclip: error: out.npz: No space left on device\n"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (OSError("odd"), "odd")],
)
def test_file_system_fault_without_a_file(
    verb: Any, capsys: Capture, fault: OSError, reason: str
) -> None:
    verb(Fake(fault))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == f"edgeclip: error: {reason}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_under_stdout_is_one_line() -> None:
    command = f"{sys.executable} -m edgeclip.runtime.cli.main --help > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "edgeclip: error: No space left on device\n"


def test_fault_of_the_software_is_not_hidden(verb: Any) -> None:
    for fault in (ZeroDivisionError(), ImportError("x", name="edgeclip.x")):
        verb(Fake(fault))
        with pytest.raises(type(fault)):
            cli.main(["try"])
    verb(Fake(ModuleNotFoundError("x", name="torch")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["plain"])


def test_missing_extra_says_how_to_install_it(verb: Any, capsys: Capture) -> None:
    verb(Fake(ModuleNotFoundError("No module named 'onnx'", name="onnx.helper")))
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == (
        "edgeclip: error: edgeclip try needs the package 'onnx': pip install 'edgeclip[export]'\n"
    )


@pytest.mark.parametrize("name", ["try", "plain"])
def test_missing_engine_names_its_own_extras(verb: Any, capsys: Capture, name: str) -> None:
    verb(Fake(ModuleNotFoundError("x", name="onnxruntime.quantization")))
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == (
        f"edgeclip: error: edgeclip {name} needs the package 'onnxruntime': "
        "pip install 'edgeclip[cpu]' or 'edgeclip[gpu]'\n"
    )


def test_extra_missing_at_import(
    verb: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "needs_torch.py").write_text("import torch_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("needs_torch", "try", "compress"))
    assert cli.main(["try", "--help"]) == 2
    assert "pip install 'edgeclip[compress]'" in capsys.readouterr().err


def test_interruption(verb: Any, capsys: Capture) -> None:
    verb(Fake(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "edgeclip: interrupted\n"


def test_wrong_option_is_argparses_to_explain(verb: Any, capsys: Capture) -> None:
    verb(Fake())
    with pytest.raises(SystemExit) as caught:
        cli.main(["try", "--number", "three"])
    assert caught.value.code == 2
    assert "invalid int value: 'three'" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    assert edgeclip("--version").stdout.startswith("edgeclip ")
    wrong = edgeclip("serach")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1


def test_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m edgeclip.runtime.cli.main --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
