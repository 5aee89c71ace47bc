"""`edgeclip serve --grpc-port`, as a user starts and ends it."""

import signal
import subprocess
import sys

import grpc
import pytest

from edgeclip.runtime.cli.main import main
from edgeclip.runtime.serving.server import listen
from tests.runtime.serving.grpc_parts import call

ECHO = ("--function", "tests.echo_function:echo")
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
