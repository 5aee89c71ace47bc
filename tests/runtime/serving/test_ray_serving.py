"""The same answers from replicas on a Ray that is started here; and what is said without Ray."""

import contextlib
import importlib.util
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgeclip.runtime.cli import ray_app
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError, MissingExtraError
from edgeclip.runtime.serving.ray_serving import RayServing, application, deployment, on_ray
from edgeclip.runtime.split.errors import ServerRefusedError
from edgeclip.runtime.split.http_client import Server
from edgeclip.runtime.split.retries_and_breaker import Deadline
from edgeclip.runtime.wire.messages import SPACE_ID, InferRequest, InferResponse
from tests.conftest import SPACE

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY, reason="ray is not installed, which takes 460 MB: make test EXTRA=ray"
)
without_ray = pytest.mark.skipif(HAS_RAY, reason="ray is installed")
TOKEN = "correct-horse"
# A function in a module of its own, as a user has it: it waits for a file.
HELD = """
import pathlib, time

def held(inputs, parameters):
    folder = pathlib.Path(parameters["folder"])
    (folder / "began").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return {"data": inputs["data"]}
"""


def soon() -> Deadline:
    return Deadline.after_ms(60_000)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come about"
        time.sleep(0.01)


@pytest.mark.ray
@needs_ray
def test_replicas_answer_as_the_encoder_does_and_end_well(
    tiny_bundle: Path, cpu_device: DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "held_function.py").write_text(HELD, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)  # of the replicas
    serving = RayServing(
        bundles=(str(tiny_bundle),),
        functions=("held_function:held",),
        replicas=2,
        max_replicas=3,
        cpus=0.1,
        token=TOKEN,
    )
    late: list[InferResponse] = []
    with contextlib.ExitStack() as clients:
        with on_ray(serving) as url:
            server = clients.enter_context(Server(url, token=TOKEN))
            texts = ["a red apple", "the blue sea"]
            request = InferRequest(
                model="tiny-text",
                inputs={"texts": np.array([text.encode() for text in texts], object)},
                parameters={SPACE_ID: SPACE},
            )
            found = server.infer(request, soon()).outputs["text_embeds"]
            wanted = Encoder.open(tiny_bundle, device=cpu_device).encode_text(texts)
            np.testing.assert_allclose(found, wanted, atol=1e-6)
            with Server(url) as stranger, pytest.raises(ServerRefusedError, match="token"):
                stranger.infer(request, soon())
            held = InferRequest(
                model="held",
                inputs={"data": np.arange(3)},
                parameters={"folder": str(tmp_path)},
            )
            under_way = threading.Thread(target=lambda: late.append(server.infer(held, soon())))
            under_way.start()
            wait_for(tmp_path / "began")
            threading.Timer(1.0, (tmp_path / "go").touch).start()
        under_way.join()
    assert late[0].outputs["data"].tolist() == [0, 1, 2]


@without_ray
def test_without_ray_one_line_says_what_to_install(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'edgeclip\[ray\]'"):
        deployment(RayServing(bundles=("bundle",)))
    assert ray_app.main([str(tiny_bundle), "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("edgeclip: error: Ray Serve is missing")


def test_mistakes_in_a_config_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)replicas: .*at least 1.*cpu: unknown key"):
        application({"bundles": ["bundle"], "replicas": 0, "cpu": 2})
    with pytest.raises(ConfigError, match="nothing to serve"):
        application({})
    with pytest.raises(ValueError, match="max_replicas must be at least replicas, 3"):
        RayServing(bundles=("bundle",), replicas=3, max_replicas=2)


def test_the_token_is_not_shown() -> None:
    assert TOKEN not in repr(RayServing(bundles=("bundle",), token=TOKEN))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to serve"),
        (["no-such-bundle"], "no-such-bundle"),
        (["--function", "a:b", "--max-replicas", "1", "--replicas", "2"], "max_replicas"),
        (["--tls-cert", "c.pem"], "--tls-key"),
        (["--host", "256.0.0.1"], "cannot listen"),
    ],
)
def test_mistakes_end_with_one_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ray_app.main(["--port", "0", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("edgeclip: error: ")
    assert words in line
