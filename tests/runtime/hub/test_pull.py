"""Pulling through real HTTP, from a small Hub on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import BundleError, EdgeClipError, InputError
from edgeclip.runtime.hub.hub_client import HubError, hide_tokens
from edgeclip.runtime.hub.model_card import CARD_NAME
from edgeclip.runtime.hub.pull import PulledBundle, pull
from tests.runtime.fake_hub import TOKEN, USER, FakeHub, Files, files_of, serve, serve_to

pytestmark = pytest.mark.slow

REPO = f"{USER}/tiny"
IMAGE = "onnx/vision_model.onnx"
Patch = pytest.MonkeyPatch


@pytest.fixture
def hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[FakeHub]:
    with serve_to(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture
def files(tiny_bundle: Path) -> Files:
    return files_of(tiny_bundle)


def pull_it(hub: FakeHub, out: Path, **options: Any) -> PulledBundle:
    return pull(REPO, out, endpoint=hub.url, **options)


def nothing_left(out: Path) -> bool:
    """Neither `out` nor half of it under another name."""
    return not out.exists() and not list(out.parent.glob(".edgeclip-*"))


def test_whole_bundle(hub: FakeHub, files: Files, tiny_bundle: Path, tmp_path: Path) -> None:
    repo = hub.add(REPO, {**files, CARD_NAME: b"card", "notes.txt": b"not declared"})
    out = tmp_path / "out"
    pulled = pull_it(hub, out)
    assert pulled.commit == repo.branches["main"]
    assert pulled.bundle.path == out
    assert {path: (out / path).read_bytes() for path in files} == files
    assert not (out / CARD_NAME).exists()
    assert not (out / "notes.txt").exists()
    expected = Encoder.open(tiny_bundle).encode_text(["a red apple"])
    np.testing.assert_array_equal(Encoder.open(out).encode_text(["a red apple"]), expected)


def test_revision(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    repo = hub.add(REPO, files)
    first = repo.branches["main"]
    repo.commit("main", {"README.md": b"emptied"})
    assert pull_it(hub, tmp_path / "out", revision=first).commit == first
    with pytest.raises(BundleError, match=r"holds no edgeclip\.json"):
        pull_it(hub, tmp_path / "now")
    with pytest.raises(HubError, match="no such revision"):
        pull_it(hub, tmp_path / "never", revision="v9")


@pytest.mark.parametrize("path", [IMAGE, "tokenizer.json", "golden.npz"])
def test_altered_file(hub: FakeHub, files: Files, tmp_path: Path, path: str) -> None:
    hub.add(REPO, files)
    hub.served[path] = files[path][:-1] + bytes([files[path][-1] ^ 1])
    out = tmp_path / "out"
    with pytest.raises(BundleError, match=rf"{path} is not what its manifest declares"):
        pull_it(hub, out)
    assert nothing_left(out)


def test_altered_copy_in_the_cache(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, files)
    pull_it(hub, tmp_path / "one", cache=tmp_path / "cache")
    (copy,) = (tmp_path / "cache").glob(f"*/snapshots/*/{IMAGE}")
    copy.resolve().write_bytes(b"x" * len(files[IMAGE]))
    pull_it(hub, tmp_path / "two", cache=tmp_path / "cache")
    assert (tmp_path / "two" / IMAGE).read_bytes() == files[IMAGE]
    assert hub.downloads().count(IMAGE) == 2


def test_truncated_file(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, files)
    hub.served[IMAGE] = files[IMAGE][:-1]
    out = tmp_path / "out"
    with pytest.raises(HubError, match=rf"{IMAGE} arrived cut short") as caught:
        pull_it(hub, out)
    assert "\n" not in str(caught.value)
    assert nothing_left(out)


def test_broken_connection_is_taken_up_again(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, files)
    hub.cut[IMAGE] = 50
    pull_it(hub, tmp_path / "out")
    assert hub.downloads().count(IMAGE) == 2


def test_hub_that_goes_away_and_comes_back(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, files)
    out = tmp_path / "out"
    hub.dies_after = 4  # the manifest and three files, several of which are fetched at a time
    with pytest.raises(HubError, match="does not answer"):
        pull_it(hub, out)
    assert nothing_left(out)
    before = hub.downloads()
    assert len(before) == 4 < len(files)
    hub.dies_at = hub.dies_after = None
    pull_it(hub, out)
    after = hub.downloads()
    assert after[: len(before)] == before
    assert len(after) == len(set(after))  # none was sent twice


def test_hub_that_is_not_there(hub: FakeHub, tmp_path: Path) -> None:
    with serve() as gone:
        pass
    with pytest.raises(HubError, match=rf"{gone.url} does not answer .*refused"):
        pull_it(gone, tmp_path / "out")


def test_file_that_is_missing(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    del files["tokenizer.json"]
    hub.add(REPO, files)
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing there"):
        pull_it(hub, tmp_path / "out")
    assert hub.downloads() == [MANIFEST_NAME]


def test_listing_that_contradicts_the_manifest(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, {**files, IMAGE: files[IMAGE] + b"x"})
    with pytest.raises(BundleError, match="bytes there instead of"):
        pull_it(hub, tmp_path / "size")
    hub.add(REPO, {**files, IMAGE: b"x" * len(files[IMAGE])})
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        pull_it(hub, tmp_path / "hash")
    assert set(hub.downloads()) == {MANIFEST_NAME}


def test_file_listed_but_gone(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    hub.add(REPO, files)
    hub.answer_first = lambda method, path: (
        (404, {"code": "EntryNotFound"}) if path.endswith(IMAGE) else None
    )
    with pytest.raises(HubError, match="a file that the repository lists is not there"):
        pull_it(hub, tmp_path / "out")


def test_what_the_manifest_says_is_checked(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    manifest = json.loads(files[MANIFEST_NAME])
    outside = [*manifest["files"], {**manifest["files"][0], "path": "../x"}]
    changes: dict[str, dict[str, Any]] = {
        "escape": {"files": outside},
        "version": {"schema_version": 99},
    }
    for name, change in changes.items():
        hub.add(REPO, {**files, MANIFEST_NAME: json.dumps({**manifest, **change}).encode()})
        with pytest.raises(BundleError, match=rf"{REPO}: edgeclip\.json"):
            pull_it(hub, tmp_path / name)
        assert nothing_left(tmp_path / name)
    hub.add(REPO, {**files, MANIFEST_NAME: b"\xff\xfe"})
    with pytest.raises(BundleError, match="not UTF-8"):
        pull_it(hub, tmp_path / "bytes")


def test_failed_gate_is_refused_by_the_name_of_the_repository(
    hub: FakeHub, files: Files, tmp_path: Path
) -> None:
    manifest = json.loads(files[MANIFEST_NAME])
    manifest["towers"][0]["files"][0]["gates"][0].update(outcome="failed", value=0, low=0, high=0)
    hub.add(REPO, {**files, MANIFEST_NAME: json.dumps(manifest).encode()})
    with pytest.raises(BundleError, match=rf"^{REPO} records gates as failed"):
        pull_it(hub, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_too_large_for_the_disk(hub: FakeHub, files: Files, tmp_path: Path) -> None:
    manifest = json.loads(files[MANIFEST_NAME])
    huge = {"path": "huge.bin", "bytes": 10**18, "sha256": "0" * 64}
    manifest["files"].append(huge)
    hub.add(REPO, {**files, "huge.bin": b"", MANIFEST_NAME: json.dumps(manifest).encode()})
    with pytest.raises(BundleError, match="has 0 bytes there instead of 1000000000000000000"):
        pull_it(hub, tmp_path / "out")


def test_room_is_looked_for_first(
    hub: FakeHub, files: Files, tmp_path: Path, monkeypatch: Patch
) -> None:
    hub.add(REPO, files)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # a disk cannot be filled
    with pytest.raises(InputError, match=r"MB are free: make room"):
        pull_it(hub, tmp_path / "out")
    assert hub.downloads() == [MANIFEST_NAME]


def test_target(hub: FakeHub, files: Files, tmp_path: Path, own_bundle: Path) -> None:
    hub.add(REPO, files)
    (own_bundle / "old.txt").write_text("old")
    with pytest.raises(InputError, match="exists"):
        pull_it(hub, own_bundle)
    assert hub.requests == []
    pull_it(hub, own_bundle, replace=True)
    assert not (own_bundle / "old.txt").exists()


def test_failed_pull_keeps_what_was_to_be_replaced(
    hub: FakeHub, files: Files, own_bundle: Path
) -> None:
    hub.add(REPO, files)
    hub.served[IMAGE] = files[IMAGE][:-1]
    with pytest.raises(HubError):
        pull_it(hub, own_bundle, replace=True)
    Bundle.open(own_bundle)


def test_no_such_repository(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no such model repository, or a private one"):
        pull_it(hub, tmp_path / "out")


def test_private_repository(hub: FakeHub, files: Files, tmp_path: Path, monkeypatch: Patch) -> None:
    hub.add(REPO, files, private=True)
    pull_it(hub, tmp_path / "out")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"a private one; .*hf auth login"):
        pull_it(hub, tmp_path / "other")


def test_wrong_token_is_not_shown(
    hub: FakeHub, files: Files, tmp_path: Path, monkeypatch: Patch
) -> None:
    hub.add(REPO, files)
    monkeypatch.setenv("HF_TOKEN", "hf_WrongButSecret")
    with pytest.raises(HubError, match=r"asks for a token that it knows \(401\)") as caught:
        pull_it(hub, tmp_path / "out")
    assert "WrongButSecret" not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_with space\x7f", "ключ", "no-prefix\x01secret"])
def test_token_that_cannot_be_sent_is_not_shown(
    hub: FakeHub, tmp_path: Path, monkeypatch: Patch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(EdgeClipError) as caught:
        pull_it(hub, tmp_path / "out")
    assert token not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_offline(hub: FakeHub, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
        pull_it(hub, tmp_path / "out")


@pytest.mark.parametrize("status", [403, 418, 429, 503])
def test_refusals_are_one_line(hub: FakeHub, tmp_path: Path, status: int) -> None:
    hub.answer_first = lambda method, path: (status, {"message": f"no {TOKEN}"})
    with pytest.raises(HubError, match=str(status)) as caught:
        pull_it(hub, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["tiny", "a/b/c", "../x", "a/b--c", "a/", "", "a b/c", "-a/b", "a/b.git", "a/b\n", "é/b"],
)
def test_names(hub: FakeHub, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="give USER/NAME"):
        pull(name, tmp_path / "out", endpoint=hub.url)
    assert hub.requests == []


def test_tokens_are_hidden() -> None:
    text = "Illegal header value b'Bearer abc.def' for hf_Abc123 and other"
    assert hide_tokens(text, "other") == "Illegal header value b'Bearer *** for *** and ***"
