"""A bundle to the Hugging Face Hub: one commit, with a model card, checked when it is there."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.hub.hub import (
    HubError,
    RemoteRepo,
    check_repo_name,
    hub_errors,
    look_at,
    open_hub,
    progress_on_terminals,
)
from edgeclip.runtime.hub.model_card import CARD_NAME, base_model, render_card

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

# What a bundle has to itself: an undeclared file here makes `Bundle.open` refuse a clone.
_CLOSED_FOLDERS = ("onnx/", "engines/", "labels/")
_MAIN = "main"


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to send: its path in the repository, its size in bytes, where it lies.

    `text` holds a file that is not on the disk.
    """

    path: str
    bytes: int
    source: Path | None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What is to be sent, and where to; making one asks nobody and sends nothing.

    Attributes:
        bundle: the opened bundle.
        repo: USER/NAME of the model repository.
        revision: the branch; it is made if it is not there.
        private: make the repository a private one.
        message: of the commit.
        base_model: the teacher's repository on the Hub, if it looks like one.
    """

    bundle: Bundle
    repo: str
    revision: str
    private: bool
    message: str
    base_model: str | None

    @property
    def card(self) -> str:
        """The text of the model card; a bundle that declares one of its own keeps that."""
        if self._has_own_card:
            return (self.bundle.path / CARD_NAME).read_text(encoding="utf-8", errors="replace")
        return render_card(self.bundle, self.repo, base_model=self.base_model)

    @property
    def uploads(self) -> tuple[Upload, ...]:
        """The declared files, the manifest and the card; never what else lies in the folder."""
        root, declared = self.bundle.path, self.bundle.manifest.files
        files = [Upload(file.path, file.bytes, root / file.path) for file in declared]
        manifest = root / MANIFEST_NAME
        files.append(Upload(MANIFEST_NAME, manifest.stat().st_size, manifest))
        if not self._has_own_card:
            card = self.card
            files.append(Upload(CARD_NAME, len(card.encode()), None, card))
        return tuple(files)

    @property
    def _has_own_card(self) -> bool:
        return any(file.path == CARD_NAME for file in self.bundle.manifest.files)


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: the commit, its page, files removed from the repository, the card."""

    commit: str
    url: str
    removed: tuple[str, ...]
    card: str


def plan_push(
    bundle: Bundle,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    message: str | None = None,
) -> PushPlan:
    """Plan a push.

    Raises:
        InputError: `repo` is not of the form USER/NAME, or the message is empty.
    """
    check_repo_name(repo)
    message = f"EdgeCLIP bundle {bundle.manifest.name}" if message is None else message
    if not message.strip():
        raise InputError("the message of the commit is empty: write one, or leave it out")
    return PushPlan(
        bundle=bundle,
        repo=repo,
        revision=revision or _MAIN,
        private=private,
        message=message,
        base_model=base_model(bundle.manifest),
    )


def push(plan: PushPlan, *, endpoint: str | None = None) -> Pushed:
    """Send a bundle in one commit, so that the repository never holds half of it.

    The repository and the branch are made if need be. Files that an earlier bundle left under
    `onnx/`, `engines/` and `labels/` are removed by the same commit. What arrived is compared
    with what was sent.

    Args:
        plan: what to send and where to.
        endpoint: address of the Hub; by default that of `HF_ENDPOINT`, or huggingface.co.

    Raises:
        HubError: no token, the Hub cannot be reached or refuses, the repository is public and
            a private one was asked for, it changed meanwhile, or files did not arrive.
        InputError: the repository holds files of something else under the same names.
    """
    api, token = open_hub(endpoint)
    if token is None:
        raise HubError(f"cannot push {plan.repo}: no token; run `hf auth login`, or set HF_TOKEN")
    errors = hub_errors(f"push {plan.repo}", endpoint=api.endpoint, secret=token)
    with progress_on_terminals(), errors:
        api.create_repo(
            plan.repo, repo_type="model", private=True if plan.private else None, exist_ok=True
        )
        remote = _look_at_branch(api, plan)
        if plan.base_model and not api.repo_exists(plan.base_model, repo_type="model"):
            plan = dataclasses.replace(plan, base_model=None)
        uploads, removed = plan.uploads, _left_over(plan, remote)
        commit = api.create_commit(
            plan.repo,
            operations=[*_additions(uploads), *_removals(removed)],
            commit_message=plan.message,
            revision=plan.revision,
            parent_commit=remote.commit,
        )
        _check_arrival(uploads, look_at(api, plan.repo, commit.oid))
    return Pushed(commit.oid, commit.commit_url, removed, plan.card)


def _look_at_branch(api: "HfApi", plan: PushPlan) -> RemoteRepo:
    """The repository at the branch, which is made if need be."""
    remote = look_at(api, plan.repo, None)
    if plan.private and not remote.private:
        raise HubError(
            f"{plan.repo} exists and is public: make it private in its settings first, or choose "
            "another name"
        )
    if plan.revision != _MAIN:
        api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
        remote = look_at(api, plan.repo, plan.revision)
    return remote


def _left_over(plan: PushPlan, remote: RemoteRepo) -> tuple[str, ...]:
    """The files of an earlier bundle to remove.

    Raises:
        InputError: the repository is no bundle, and the push would write over its files.
    """
    ours = {file.path for file in plan.uploads}
    if MANIFEST_NAME not in remote.paths:
        theirs = sorted((ours & remote.paths) - {CARD_NAME})
        if theirs:
            raise InputError(
                f"{plan.repo} holds no {MANIFEST_NAME}, but files of the same names "
                f"({', '.join(theirs)}): choose another repository, or remove them there"
            )
        return ()
    return tuple(sorted(path for path in remote.paths - ours if path.startswith(_CLOSED_FOLDERS)))


def _additions(uploads: Sequence[Upload]) -> "list[CommitOperationAdd]":
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(file.path, file.source or file.text.encode()) for file in uploads]


def _removals(paths: Sequence[str]) -> "list[CommitOperationDelete]":
    from huggingface_hub import CommitOperationDelete

    return [CommitOperationDelete(path, is_folder=False) for path in paths]


def _check_arrival(uploads: Sequence[Upload], remote: RemoteRepo) -> None:
    """Refuse to call it a success when a file is not there, as a `.gitignore` there can do."""
    sizes = {file.path: file.bytes for file in remote.files}
    lacking = [
        file.path
        for file in uploads
        if file.path not in sizes or sizes[file.path] not in (None, file.bytes)
    ]
    if lacking:
        raise HubError(
            f"{remote.repo} is at {remote.commit[:12]} without {', '.join(lacking)}: look for a "
            ".gitignore there, then push again"
        )
