"""Pushing through real HTTP, to a small Hub on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.hub.hub_client import HubError
from edgeclip.runtime.hub.model_card import CARD_NAME
from edgeclip.runtime.hub.pull import pull
from edgeclip.runtime.hub.push import PushResult, plan_push, push
from tests.runtime.fake_hub import USER, FakeHub, files_of, serve_to

REPO = f"{USER}/tiny"
Patch = pytest.MonkeyPatch


@pytest.fixture
def hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[FakeHub]:
    with serve_to(monkeypatch, tmp_path) as running:
        yield running


def push_it(hub: FakeHub, bundle: Path, repo: str = REPO, **options: Any) -> PushResult:
    return push(plan_push(Bundle.open(bundle), repo, **options), endpoint=hub.url)


def test_arrives_whole_in_one_commit(
    hub: FakeHub, own_bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    (own_bundle / "stray.txt").write_text("a secret")
    pushed = push_it(hub, own_bundle)
    repo = hub.repos[REPO]
    assert list(repo.commits) == [*list(repo.commits)[:1], pushed.commit]  # made, then pushed
    assert pushed.url == f"{hub.url}/{REPO}/commit/{pushed.commit}"
    assert repo.files == {
        **files_of(tiny_bundle),
        CARD_NAME: pushed.card.encode(),
        ".gitattributes": repo.files[".gitattributes"],
    }
    assert not repo.private
    assert len(hub.large) > 0
    pull(REPO, tmp_path / "back", endpoint=hub.url)


def test_private_and_branch(hub: FakeHub, tiny_bundle: Path, tmp_path: Path) -> None:
    pushed = push_it(hub, tiny_bundle, private=True, revision="trial/1")
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.branches["trial/1"] == pushed.commit
    assert list(repo.files) == [".gitattributes"]
    pull(REPO, tmp_path / "out", endpoint=hub.url, revision="trial/1")
    push_it(hub, tiny_bundle, revision="trial/1")  # a branch that exists is used again


def test_nothing_is_drawn_where_there_is_no_terminal(
    hub: FakeHub, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    push_it(hub, tiny_bundle)
    pull(REPO, tmp_path / "out", endpoint=hub.url)
    assert capfd.readouterr() == ("", "")


def test_public_repository_is_not_taken_for_a_private_one(hub: FakeHub, tiny_bundle: Path) -> None:
    repo = hub.add(REPO, {})
    with pytest.raises(HubError, match="exists and is public"):
        push_it(hub, tiny_bundle, private=True)
    assert repo.files == {}


def test_files_of_an_earlier_bundle_go(hub: FakeHub, tiny_bundle: Path) -> None:
    repo = hub.add(
        REPO, {MANIFEST_NAME: b"{}", "onnx/old.onnx": b"o", "mine/onnx/x": b"m", "LICENSE": b""}
    )
    assert push_it(hub, tiny_bundle).removed == ("onnx/old.onnx",)
    assert {"mine/onnx/x", "LICENSE"} < set(repo.files)
    assert "onnx/old.onnx" not in repo.files


def test_same_bundle_again_makes_no_commit(hub: FakeHub, tiny_bundle: Path) -> None:
    first, second = push_it(hub, tiny_bundle), push_it(hub, tiny_bundle)
    assert first.commit == second.commit


def test_repository_of_something_else(hub: FakeHub, tiny_bundle: Path) -> None:
    theirs = {"config.json": b"theirs", "onnx/model.onnx": b"theirs", CARD_NAME: b"theirs"}
    repo = hub.add(REPO, theirs)
    with pytest.raises(InputError, match=r"files of the same names \(config\.json\)"):
        push_it(hub, tiny_bundle)
    assert repo.files == theirs


def test_change_meanwhile(hub: FakeHub, tiny_bundle: Path) -> None:
    repo = hub.add(REPO, {})

    def interfere(method: str, path: str) -> None:
        if "/preupload/" in path:
            repo.commit("main", {"other.txt": b"by someone else"})

    hub.answer_first = interfere
    with pytest.raises(HubError, match="the repository changed meanwhile"):
        push_it(hub, tiny_bundle)
    assert list(repo.files) == ["other.txt"]


def test_file_that_does_not_arrive(hub: FakeHub, tiny_bundle: Path) -> None:
    hub.ignored.add("golden.npz")
    with pytest.raises(HubError, match=r"without golden\.npz: look for a \.gitignore"):
        push_it(hub, tiny_bundle)


@pytest.mark.parametrize("dies_at", [0, 1, 3, 5])
def test_hub_that_goes_away(
    hub: FakeHub, tiny_bundle: Path, monkeypatch: Patch, dies_at: int
) -> None:
    repo = hub.add(REPO, {})
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    hub.dies_at = dies_at
    with pytest.raises(HubError, match="does not answer"):
        push_it(hub, tiny_bundle)
    assert repo.files == {}


def test_no_token(hub: FakeHub, tiny_bundle: Path, monkeypatch: Patch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token; run `hf auth login`"):
        push_it(hub, tiny_bundle)
    assert hub.requests == []


def test_refused_token(hub: FakeHub, tiny_bundle: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_WrongButSecret")
    with pytest.raises(HubError, match=r"asks for a token that it knows \(401\)"):
        push_it(hub, tiny_bundle)


def test_someone_elses_name(hub: FakeHub, tiny_bundle: Path) -> None:
    with pytest.raises(HubError, match=r"this token may not do it \(403\)"):
        push_it(hub, tiny_bundle, "other/tiny")


def test_offline(hub: FakeHub, tiny_bundle: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_it(hub, tiny_bundle)


def test_teacher_is_named_as_base_only_if_it_is_there(
    hub: FakeHub, own_bundle: Path, edit_manifest: Any
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["provenance"]["teacher"] = "openai/clip"

    edit_manifest(own_bundle, change)
    assert "base_model" not in push_it(hub, own_bundle).card
    hub.add("openai/clip", {})
    assert "base_model: openai/clip\n" in push_it(hub, own_bundle).card


def test_own_card_is_kept(
    hub: FakeHub, own_bundle: Path, edit_manifest: Any, reseal: Any, tmp_path: Path
) -> None:
    (own_bundle / CARD_NAME).write_text("---\nlicense: mit\n---\nours\n")

    def change(data: dict[str, Any]) -> None:
        data["files"].append({"path": CARD_NAME, "bytes": 0, "sha256": "0" * 64})

    edit_manifest(own_bundle, change)
    reseal(own_bundle)
    push_it(hub, own_bundle)
    assert hub.repos[REPO].files[CARD_NAME] == (own_bundle / CARD_NAME).read_bytes()
    pull(REPO, tmp_path / "out", endpoint=hub.url)


def test_message(hub: FakeHub, tiny_bundle: Path) -> None:
    assert plan_push(Bundle.open(tiny_bundle), REPO).message == "EdgeCLIP bundle tiny"
    with pytest.raises(InputError, match="message of the commit is empty"):
        plan_push(Bundle.open(tiny_bundle), REPO, message=" ")
