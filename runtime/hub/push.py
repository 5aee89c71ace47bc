"""Push a bundle to the Hugging Face Hub: one commit, with a model card, checked on arrival."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import MANIFEST_NAME
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.hub.hub_client import (
    HubError,
    check_repo_name,
    hub_errors,
    open_hub,
    progress_on_terminals,
    repository,
)
from edgeclip.runtime.hub.model_card import CARD_NAME, base_model, render_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

# Only a bundle's own files may lie here: an undeclared one makes `Bundle.open` refuse a clone.
_CLOSED_FOLDERS = ("onnx/", "engines/", "labels/")
_MAIN = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What is to be sent, and where to; making one sends no request.

    Attributes:
        bundle: the opened bundle.
        repo: USER/NAME of the model repository.
        revision: the branch; it is made if it is not there.
        private: make the repository a private one.
        message: message of the commit.
        base_model: the teacher's repository on the Hub, if its name could be one.
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
        if any(file.path == CARD_NAME for file in self.bundle.manifest.files):
            return (self.bundle.path / CARD_NAME).read_text(encoding="utf-8", errors="replace")
        return render_card(self.bundle, self.repo, base_model=self.base_model)

    def contents(self) -> dict[str, Path | bytes]:
        """Map the path in the repository of every file to send to its place here, or its bytes.

        These are the declared files, the manifest and the card, whatever else the folder holds.
        """
        root = self.bundle.path
        found: dict[str, Path | bytes] = {
            path: root / path
            for path in (*(file.path for file in self.bundle.manifest.files), MANIFEST_NAME)
        }
        if CARD_NAME not in found:
            found[CARD_NAME] = self.card.encode()
        return found

    def sizes(self) -> dict[str, int]:
        """Bytes of every file to send, by its path in the repository."""
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.contents().items()
        }


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did: the commit, the address of its page, the files it removed, the card."""

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


def push(plan: PushPlan, *, endpoint: str | None = None) -> PushResult:
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
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api = open_hub(endpoint)
    if not api.token:
        raise HubError(f"cannot push {plan.repo}: no token; run `hf auth login`, or set HF_TOKEN")
    with hub_errors(f"push {plan.repo}", api), progress_on_terminals():
        info = _prepared_repository(api, plan)
        if plan.base_model and not api.repo_exists(plan.base_model, repo_type="model"):
            plan = dataclasses.replace(plan, base_model=None)
        contents = plan.contents()
        removed = _left_over(plan, set(contents), {item.rfilename for item in info.siblings or ()})
        # Not `upload_folder`: that may split what it sends into several commits.
        commit = api.create_commit(
            plan.repo,
            operations=[
                *(CommitOperationAdd(path, source) for path, source in contents.items()),
                *(CommitOperationDelete(path, is_folder=False) for path in removed),
            ],
            commit_message=plan.message,
            revision=plan.revision,
            parent_commit=info.sha,
        )
        _check_arrival(plan.sizes(), repository(api, plan.repo, commit.oid))
    return PushResult(commit.oid, commit.commit_url, removed, plan.card)


def _prepared_repository(api: "HfApi", plan: PushPlan) -> "ModelInfo":
    """Make the repository and the branch, if need be, and return its state at the branch.

    Raises:
        HubError: it is public, and a private one was asked for.
    """
    private = True if plan.private else None
    api.create_repo(plan.repo, repo_type="model", private=private, exist_ok=True)
    info = repository(api, plan.repo, None)
    if plan.private and not info.private:
        raise HubError(
            f"{plan.repo} exists and is public: make it private in its settings first, or choose "
            "another name"
        )
    if plan.revision == _MAIN:
        return info
    api.create_branch(plan.repo, branch=plan.revision, exist_ok=True)
    return repository(api, plan.repo, plan.revision)


def _left_over(plan: PushPlan, ours: set[str], theirs: set[str]) -> tuple[str, ...]:
    """List the files of an earlier bundle that are to be removed.

    Raises:
        InputError: the repository is no bundle, and the push would write over its files.
    """
    if MANIFEST_NAME not in theirs:
        if same := sorted((ours & theirs) - {CARD_NAME}):
            raise InputError(
                f"{plan.repo} holds no {MANIFEST_NAME}, but files of the same names "
                f"({', '.join(same)}): choose another repository, or remove them there"
            )
        return ()
    return tuple(sorted(path for path in theirs - ours if path.startswith(_CLOSED_FOLDERS)))


def _check_arrival(sizes: dict[str, int], info: "ModelInfo") -> None:
    """Compare what arrived with what was sent: a `.gitignore` there keeps files out silently."""
    arrived = {file.rfilename: file.size for file in info.siblings or ()}
    lacking = [
        path
        for path, size in sizes.items()
        if path not in arrived or arrived[path] not in (None, size)
    ]
    if lacking:
        raise HubError(
            f"{info.id} is at {str(info.sha)[:12]} without {', '.join(lacking)}: look for a "
            ".gitignore there, then push again"
        )
