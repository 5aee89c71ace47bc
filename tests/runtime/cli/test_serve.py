"""`edgeclip serve` in a process of its own: options, signals, TLS, and models from files."""

import hashlib
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cli.main import main
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.planning.cut_set import CutHead, CutSet
from edgeclip.runtime.serving.bundle_models import CutTail
from edgeclip.runtime.serving.server import listen
from edgeclip.runtime.wire.codec import encode
from edgeclip.runtime.wire.messages import CODEC, SPACE_ID, InferRequest
from tests.conftest import COLOURS, DIM, SPACE
from tests.runtime.serving.ask_server import PATIENCE, ask, in_thread, infer, serve_process, until
from tests.runtime.serving.grpc_parts import call

ECHO = ("--function", "tests.echo_function:echo")
# Waits for a file, so that a test decides when a run ends.
_FUNCTIONS = """
import time
from pathlib import Path

def wait(inputs, parameters):
    Path(parameters["began"]).touch()
    while not Path(parameters["go"]).exists():
        time.sleep(0.01)
    return {"sum": inputs["x"].sum(axis=1)}
"""


def test_models_of_all_kinds_are_served(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    entries = Encoder.open(tiny_bundle).encode_image([photos / f"{name}.png" for name in COLOURS])
    Index(tuple(COLOURS), entries, SPACE).save(tmp_path / "colours.npz")
    (tmp_path / "own_functions.py").write_text(_FUNCTIONS)
    words = [str(tiny_bundle), f"other={tiny_bundle}", "--index", "colours.npz"]
    words += ["--function", "own_functions:wait"]
    with serve_process(*words, cache=tmp_path / "cache", cwd=tmp_path) as server:
        url = server.ready()
        towers = ("image", "pixels", "text")
        names = [f"{bundle}-{tower}" for bundle in ("tiny", "other") for tower in towers]
        assert ask(url, "/v2").json["models"] == ["wait", "colours", *names]
        until(lambda: "colours: 3 entries, exact search" in server.said)
        files = [(photos / f"{name}.png").read_bytes() for name in COLOURS]
        images = {"images": np.array(files, object)}
        found = infer(url, InferRequest(model="tiny-image", inputs=images)).response
        np.testing.assert_allclose(found.outputs["image_embeds"], entries, atol=1e-6)
        pixels = {"pixels": np.zeros((2, 8, 8, 3), np.uint8)}
        found_pixels = infer(url, InferRequest(model="other-pixels", inputs=pixels)).response
        assert found_pixels.outputs["image_embeds"].shape == (2, DIM)
        queries = {"embeddings": found.outputs["image_embeds"]}
        request = InferRequest(model="colours", inputs=queries, parameters={"top": 1})
        best = infer(url, request).response.outputs["key"]
        assert best[:, 0].tolist() == [name.encode() for name in COLOURS]
        assert b'edgeclip_requests_total{model="colours",status="200"} 1.0' in (
            ask(url, "/metrics").body
        )


def test_tails_of_a_cut_tower_are_served(
    emoji_cuts: CutSet, cpu_device: DeviceProfile, tmp_path: Path
) -> None:
    with serve_process("--cuts", f"emoji={emoji_cuts.path}", cache=tmp_path) as server:
        url = server.ready()
        last = emoji_cuts.manifest.points[-1]
        assert f"emoji-tail-{last.number}" in ask(url, "/v2").json["models"]
        size = emoji_cuts.manifest.image.size
        pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
        values = CutHead(emoji_cuts, last.number, cpu_device).run(pixels)
        request = InferRequest(
            model=f"emoji-tail-{last.number}",
            inputs=encode("int8-zstd", values, axis=last.axis),
            parameters={CODEC: "int8-zstd", SPACE_ID: emoji_cuts.manifest.space},
        )
        found = infer(url, request).response.outputs["image_embeds"]
        expected = CutTail(emoji_cuts, last.number, cpu_device).embed(values)
        assert (found * expected).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_well(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "own_functions.py").write_text(_FUNCTIONS)
    began, go = tmp_path / "began", tmp_path / "go"
    request = InferRequest(
        model="wait",
        inputs={"x": np.ones((1, 2), np.float32)},
        parameters={"began": str(began), "go": str(go)},
    )
    words = ("--function", "own_functions:wait", "--grace", str(PATIENCE))
    with serve_process(*words, cache=tmp_path / "cache", cwd=tmp_path) as server:
        url = server.ready()
        thread, heard = in_thread(url, request)
        until(began.exists)
        server.process.send_signal(number)
        until(lambda: ask(url, "/v2/health/ready").status == 503)
        assert ask(url, "/v2/health/live").status == 200
        assert infer(url, request).status == 503
        go.touch()
        thread.join(PATIENCE)
        assert heard[0].response.outputs["sum"].tolist() == [2]
        assert server.end() == 0
        assert server.said == []


def test_a_run_without_end_does_not_keep_the_server(tmp_path: Path) -> None:
    (tmp_path / "own_functions.py").write_text(_FUNCTIONS)
    began = tmp_path / "began"
    request = InferRequest(
        model="wait",
        inputs={"x": np.ones((1, 2), np.float32)},
        parameters={"began": str(began), "go": str(tmp_path / "never")},
    )
    words = ("--function", "own_functions:wait", "--grace", "0.2")
    with serve_process(*words, cache=tmp_path / "cache", cwd=tmp_path) as server:
        thread, heard = in_thread(server.ready(), request)
        until(began.exists)
        server.process.terminate()
        thread.join(PATIENCE)
        assert heard[0].status == 503
        assert server.end() == 0


def test_beyond_this_machine_there_are_tls_and_a_token(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    fingerprints, tokens = [], []
    for _ in range(2):
        with serve_process(*ECHO, "--host", "0.0.0.0", cache=cache) as server:
            port = urlsplit(server.ready()).port
            assert port
            until(lambda: len(server.said) == 2)
            token, certificate = server.said
            pem = ssl.get_server_certificate(("127.0.0.1", port))
            found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
            assert certificate.endswith(f"SHA-256 fingerprint {found}")
            fingerprints.append(found)
            tokens.append(token)
            kept = (cache / "server" / "token").read_text().strip()
            assert _status(port, None) == b"401"
            assert _status(port, kept) == b"200"
    assert fingerprints[0] == fingerprints[1]
    assert kept in tokens[0]
    assert kept not in tokens[1]  # shown once


def _status(port: int, token: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    shown = f"Authorization: Bearer {token}\r\n" if token else ""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain,
        context.wrap_socket(plain) as sock,
    ):
        sock.sendall(f"GET /v2 HTTP/1.1\r\nHost: x\r\n{shown}\r\n".encode())
        return sock.recv(1000).split(b" ")[1]


def test_insecure_is_said(tmp_path: Path) -> None:
    with serve_process(*ECHO, "--host", "0.0.0.0", "--insecure", cache=tmp_path) as server:
        port = urlsplit(server.ready()).port
        assert ask(f"http://127.0.0.1:{port}", "/v2").status == 200
        until(lambda: bool(server.said))
        assert server.said == [
            "insecure: no TLS and no token, anyone who reaches 0.0.0.0 may use the server"
        ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to serve: give a bundle"),
        (("missing",), "missing is not a directory"),
        (("--index", "missing.npz"), "missing.npz does not exist"),
        (("--function", "missing:function"), "cannot import 'missing:function'"),
        ((*ECHO, "--host", "192.0.2.1"), "cannot listen on 192.0.2.1"),
        ((*ECHO, "--tls-cert", "a.pem"), "--tls-cert and --tls-key belong together"),
        ((*ECHO, "--max-wait-ms", "-1"), "max_wait_ms must be at least 0"),
        ((*ECHO, "--token-file", "missing"), "cannot read the token in missing"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with serve_process(*words, cache=tmp_path / "cache", cwd=tmp_path) as server:
        assert server.end() == 2
        until(lambda: bool(server.said))
        assert len(server.said) == 1
        assert message in server.said[0]


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serve_process("missing", cache=tmp_path, port=port) as server:
            assert server.end() == 2
            until(lambda: bool(server.said))
            assert f"cannot listen on 127.0.0.1 port {port}" in server.said[0]


SERVE = (sys.executable, "-m", "edgeclip.runtime.cli.main", "serve", *ECHO, "--port", "0")


def test_both_ports_are_served_until_a_signal() -> None:
    process = subprocess.Popen(
        [*SERVE, "--grpc-port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("serving echo at http://127.0.0.1:")
        line = process.stderr.readline().strip()
        with grpc.insecure_channel(line.removeprefix("serving gRPC at ")) as channel:
            assert call(channel, "ServerReady").ready
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", *ECHO, "--port", "0", "--grpc-port", port]) == 2
    assert "cannot listen on 127.0.0.1 port" in capsys.readouterr().err
