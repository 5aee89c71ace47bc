"""No command sends anything, or leaves a file in the home directory, that nobody asked for.

The commands run in a network namespace of their own, in one process that lasts, beside a server
that is asked once and then runs for as long as ONNX Runtime would wait before it reports to its
maker.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests import watched_network
from tests.golden.conftest import CPU, LEAST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2000)]

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("edgeclip")
LINES = [
    "device --list",
    "verify emoji --device cpu.yaml",
    "scenes photos --count 20 --size 48",
    "embed photos --bundle emoji --out photos.npz --device cpu.yaml",
    "classify photos --bundle emoji --labels cat,dog --device cpu.yaml",
    "search cat --bundle emoji --index photos.npz --json --device cpu.yaml",
    "eval photos --bundle emoji --device cpu.yaml",
    "profile emoji --device cpu.yaml --workload least.yaml --parts text --out run.json"
    " --report run.html --parquet run.parquet",
    "report emoji --out page.html",
    "pretrain --out teacher --image-size 32 --image-width 32 --image-layers 1 --text-width 32"
    " --text-layers 1 --head-size 16 --dim 16 --vocab-size 400 --steps 2 --batch-size 8",
    "cache --teacher teacher --count 8 --out cache",
    "distill --teacher teacher --out student --count 8 --steps 2 --batch-size 4 --image-heads 1"
    " --image-layers 1 --text-heads 1 --text-layers 1 --cache cache",
    "quantize teacher --teacher teacher --out found --device cpu.yaml --minutes 0.01"
    " --test-count 16 --calibration-count 16",
    "export teacher --teacher teacher --out bundle --device cpu.yaml --precisions fp32"
    " --test-count 16 --calibration-count 8 --accept-undecided",
    "cut emoji --out cuts --count 1 --precision fp32 --device cpu.yaml",
]
# One process imports torch once, and lives longer than ONNX Runtime waits.
RUN_ALL = """
import sys
from edgeclip.runtime.cli.main import main

for line in sys.argv[1:]:
    status = main(line.split())
    assert status == 0, (line, status)
"""
SECONDS = 15  # ONNX Runtime reports after ten
SERVE = f"""
import json, signal, subprocess, sys, time, urllib.request

words = [{str(COMMAND)!r}, *"serve emoji --port 0 --device cpu.yaml".split()]
server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
address = server.stdout.readline().strip().rpartition(" at ")[2]
given = {{"name": "texts", "datatype": "BYTES", "shape": [1], "data": ["an owl"]}}
url = address + "/v2/models/emoji-student-text/infer"
answer = urllib.request.urlopen(url, json.dumps({{"inputs": [given]}}).encode(), timeout=60)
assert answer.status == 200
time.sleep({SECONDS})
server.send_signal(signal.SIGINT)
sys.exit(server.wait())
"""
# A cache of fonts, which reports and pages are drawn with.
OF_MATPLOTLIB = (".cache/matplotlib/", ".config/matplotlib/")
# Hashes of files that were read before, so that they need not be read again.
OWN = (".cache/edgeclip/content-hashes.sqlite",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reason = watched_network.why_not()
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "home").mkdir()
    (tmp_path / "cpu.yaml").write_text(CPU, encoding="utf-8")
    (tmp_path / "least.yaml").write_text(LEAST, encoding="utf-8")
    shutil.copytree(ROOT / "export" / "emoji_bundle", tmp_path / "emoji")
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    """As a new user has it; no sign of a CI or of these tests, where packages behave better."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}


def left_at_home(folder: Path) -> list[str]:
    """The files below the home directory but for those of matplotlib and the documented one."""
    home = folder / "home"
    files = (path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())
    return sorted(name for name in files if not name.startswith((*OF_MATPLOTLIB, *OWN)))


def words(line: str) -> list[str]:
    return [str(COMMAND), *line.split()]


def test_commands_send_nothing_and_leave_nothing(folder: Path) -> None:
    sent = watched_network.watch(
        [[sys.executable, "-c", RUN_ALL, *LINES]],
        folder,
        environment(folder),
        beside=[sys.executable, "-c", SERVE],
    )
    assert sent == []
    assert left_at_home(folder) == []


ASK = """
import contextlib, socket

with contextlib.suppress(OSError):
    socket.getaddrinfo("example.com", 443)
for address in ("203.0.113.7", "2001:db8::7", "127.0.0.1", "::1"):
    with contextlib.suppress(OSError):
        socket.create_connection((address, 443))
"""


def test_names_and_connections_are_seen(folder: Path) -> None:
    sent = watched_network.watch([[sys.executable, "-c", ASK]], folder, environment(folder))
    assert any(line.startswith("udp 192.0.2.53:53") and "example.com" in line for line in sent)
    for address in ("203.0.113.7", "2001:db8::7"):
        assert any(line.startswith(f"tcp {address}:443") for line in sent)
    assert not any("127.0.0.1:443" in line or " ::1:443" in line for line in sent)


def test_an_id_of_the_device_is_seen(folder: Path) -> None:
    """Where the user has switched ONNX Runtime's reports on."""
    lines = ["scenes photos --count 1 --size 48", "embed photos --bundle emoji --out photos.npz"]
    more = {"ORT_DISABLE_TELEMETRY": "0"}
    watched_network.watch(list(map(words, lines)), folder, {**environment(folder), **more})
    assert any("onnxruntime" in name for name in left_at_home(folder))
