import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from edgeclip.compress.data import fetch_shards as fetching
from edgeclip.compress.data.fetch_shards import fetch_shards, is_remote
from edgeclip.compress.data.open_source import open_source
from edgeclip.runtime.errors import ConfigError, InputError


def shard(first: int, count: int = 40) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for number in range(first, first + count):
            picture = io.BytesIO()
            Image.new("RGB", (9, 9), (number, 0, 0)).save(picture, "PNG")
            for suffix, data in (("png", picture.getvalue()), ("txt", b"picture %d" % number)):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return held.getvalue()


@dataclass
class Store:
    """What a server holds, how it fails, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)  # statuses; 0 breaks off
    asked: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def serving() -> Iterator[Store]:
    store = Store()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            store.asked.append(self.path)
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            data = store.files.get(self.path)
            failures = store.failures.get(self.path, [])
            status = failures.pop(0) if failures and body else (200 if data is not None else 404)
            self.send_response(status or 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if body and data is not None and status in (0, 200):
                self.wfile.write(data if status else data[: len(data) // 2])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    store.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("EDGECLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "_PAUSE", 0.001)
    with serving() as found:
        yield found


def test_shards_of_a_server_are_fetched_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for number in range(3):
        store.files[f"/data/{number:03d}.tar"] = shard(40 * number)
    data = f"{store.address}/data/{{000..002}}.tar"
    sources = {
        split: open_source(data, split=split, count=1, size=8)
        for split in ("train", "calibration", "test")
    }
    assert sum(map(len, sources.values())) == 120
    assert sorted(store.asked) == [f"/data/{number:03d}.tar" for number in range(3)]
    assert "fetching 3 of 3 shards (about" in caplog.text
    train = sources["train"]
    number = int(str(train.caption(5)).split()[1])
    assert train[5].image.getpixel((0, 0)) == (number, 0, 0)


def test_a_signed_address_keeps_its_own_file(store: Store) -> None:
    for name in ("/a.tar?sig=1", "/a.tar?sig=2"):
        store.files[name] = shard(0 if name.endswith("1") else 40)
    one, two = fetch_shards([f"{store.address}/a.tar?sig={number}" for number in (1, 2)])
    assert one != two
    assert (one.read_bytes(), two.read_bytes()) == (shard(0), shard(40))
    assert one.suffix == ".tar"


def test_an_interrupted_fetch_goes_on(store: Store, tmp_path: Path) -> None:
    addresses = [f"{store.address}/{number}.tar" for number in range(6)]
    for number in range(5):
        store.files[f"/{number}.tar"] = shard(number, 2)
    with pytest.raises(InputError, match=r"5\.tar cannot be fetched: the server answers 404"):
        fetch_shards(addresses)
    there = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert all(name.endswith(".tar") for name in there)
    store.files["/5.tar"] = shard(5, 2)
    store.asked.clear()
    files = fetch_shards(addresses)
    assert [path.read_bytes() for path in files] == [shard(number, 2) for number in range(6)]
    assert len(store.asked) == 6 - len(there)


@pytest.mark.parametrize("failure", [0, 500, 503, 429])
def test_a_failure_that_passes_is_tried_again(store: Store, failure: int) -> None:
    store.files["/a.tar"] = shard(0)
    store.failures["/a.tar"] = [failure, failure]
    (path,) = fetch_shards([f"{store.address}/a.tar"])
    assert path.read_bytes() == shard(0)
    assert len(store.asked) == 3


@pytest.mark.parametrize(
    ("failure", "message"), [(0, r"\d+ of \d+ bytes came|IncompleteRead"), (503, "answers 503")]
)
def test_a_failure_that_stays(store: Store, failure: int, message: str, tmp_path: Path) -> None:
    store.files["/a.tar"] = shard(0)
    store.failures["/a.tar"] = [failure] * 9
    with pytest.raises(InputError, match=message) as caught:
        fetch_shards([f"{store.address}/a.tar"])
    assert "run it again to go on" in str(caught.value)
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


def test_nobody_answers(store: Store) -> None:
    with pytest.raises(InputError, match=r"cannot be fetched: .*refused"):
        fetch_shards(["http://127.0.0.1:9/a.tar"])


def test_what_a_command_prints(store: Store, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(shard(40 * number))
    data = f"pipe:cat {tmp_path}/{{0..1}}.tar"
    source = open_source(data, split="train", count=1, size=8)
    for number in range(2):
        (tmp_path / f"{number}.tar").unlink()  # it is kept
    assert open_source(data, split="train", count=1, size=8).identity == source.identity
    assert len(source) > 40


def test_a_command_that_fails(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the command ends with 3: no such bucket"):
        fetch_shards(["pipe:echo half a shard; echo no such bucket >&2; exit 3"])
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


@pytest.mark.parametrize(
    ("address", "command"),
    [("s3://b/0.tar", "aws s3 cp s3://b/0.tar -"), ("gs://b/0.tar", "gcloud storage cat gs://b/0")],
)
def test_other_addresses(address: str, command: str) -> None:
    with pytest.raises(ConfigError, match=f"--data 'pipe:{command}"):
        open_source(address, split="train", count=1, size=8)


def test_what_is_remote() -> None:
    assert all(map(is_remote, ("http://x/a.tar", "https://x/a.tar", "pipe:cat a", "s3://b/a.tar")))
    assert not any(map(is_remote, ("a.tar", "folder/{0..3}.tar", "hf:owner/name", "x:/a.tar")))


def test_there_is_no_room(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.files["/a.tar"] = shard(0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"1,000 bytes are free .* \(EDGECLIP_CACHE=FOLDER\)"):
        fetch_shards([f"{store.address}/{{0..9}}.tar", f"{store.address}/a.tar"])
    assert store.asked == []
