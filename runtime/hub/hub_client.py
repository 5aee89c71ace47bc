"""Connect to the Hugging Face Hub; turn what fails there into one line that shows no token."""

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from edgeclip.runtime.errors import EdgeClipError, InputError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_TIMEOUT_S = 30.0  # for an answer about a repository; without it, a silent Hub hangs us
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class HubError(EdgeClipError):
    """The Hub cannot be reached, refuses, or holds something else than was asked for."""


def check_repo_name(repo: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        InputError: not of the form USER/NAME.
    """
    if not is_repo_name(repo):
        raise InputError(
            f"{repo!r} is no repository: give USER/NAME, of letters, digits and single - _ or ."
        )


def is_repo_name(text: str) -> bool:
    """Tell whether a text is of the form USER/NAME, by the rules of the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def open_hub(endpoint: str | None = None) -> "HfApi":
    """Return a client of the Hub; its `token` is False where the user has none.

    Args:
        endpoint: address of the Hub; by default that of `HF_ENDPOINT`, or huggingface.co.

    Raises:
        HubError: the token cannot be read.
    """
    from huggingface_hub import HfApi, constants, get_token

    api = HfApi((endpoint or constants.ENDPOINT).rstrip("/"), token=False, library_name="edgeclip")
    with hub_errors("find a token", api):
        # Not None: the client would look for a token itself at each call, and fail another way.
        api.token = get_token() or False
    return api


def repository(api: "HfApi", repo: str, revision: str | None) -> "ModelInfo":
    """Ask the Hub for a repository's commit, and for its files with sizes and hashes."""
    return api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)


def progress_on_terminals() -> AbstractContextManager[object]:
    """Let `huggingface_hub` draw its progress bars only where stderr is a terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    by_user = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    return nullcontext() if by_user or sys.stderr.isatty() else disable_progress_bars()


@contextmanager
def hub_errors(doing: str, api: "HfApi") -> Iterator[None]:
    """Turn every error of `huggingface_hub` inside the block into one line that shows no token.

    Args:
        doing: what the block does, such as "pull user/name", for the message.
        api: the client, for its address and its token, which no message may show.

    Raises:
        HubError: the Hub cannot be reached, or its answer was an error.
        InputError: a local file cannot be read or written.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the errors of the HTTP client, which differs between releases.
    known: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)
    try:
        yield
    except EdgeClipError:
        raise
    except known as error:
        kind, reason = _explain(error, api.endpoint)
        message = hide_tokens(f"cannot {doing}: {reason}", api.token)
        raise kind(message) from None  # not chained: the errors behind it may hold the token


def hide_tokens(text: str, secret: str | bool | None = None) -> str:
    """Replace `secret`, and all that looks like a token of the Hub, by asterisks."""
    if isinstance(secret, str):
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _explain(error: Exception, endpoint: str) -> tuple[type[EdgeClipError], str]:
    """Return the kind of error to raise and its reason, taken from the error or its causes."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes = [error]
    while isinstance(cause := causes[-1].__cause__, Exception) and cause not in causes:
        causes.append(cause)
    for item in causes:
        if isinstance(item, OfflineModeIsEnabled):
            return HubError, "HF_HUB_OFFLINE is set; unset it"
        if isinstance(item, HfHubHTTPError):
            return HubError, _explain_answer(item)
    client_errors = tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    unreachable = (*client_errors, ConnectionError, TimeoutError)
    if isinstance(error, LocalEntryNotFoundError) or any(
        isinstance(item, unreachable) for item in causes
    ):
        return HubError, (
            f"{endpoint} does not answer ({first_line(causes[-1])}); check the connection and run "
            "it again, what was transferred whole is not sent twice"
        )
    if isinstance(error, OSError) and error.strerror:
        return InputError, (f"{error.filename}: " if error.filename else "") + error.strerror
    # The name may be the end of an address: "(…)4741417/onnx/vision_model.onnx".
    if cut := re.match(r"Consistency check failed[^(]*\((?:\(…\)\w*/)?(.*)\)", str(error)):
        return HubError, f"{cut[1]} arrived cut short; run it again"
    return HubError, " ".join(str(error).split()) or type(error).__name__


def _explain_answer(error: Exception) -> str:
    """Say what an error status of the Hub means, and what to do about it."""
    from huggingface_hub import errors

    kinds: dict[type[Exception], str] = {  # a class stands before those it is derived from
        errors.GatedRepoError: "access is restricted; ask for it on the page of the repository, "
        f"then {_LOG_IN}",
        errors.RevisionNotFoundError: "the repository has no such revision; give a branch, a tag "
        "or a commit",
        errors.RepositoryNotFoundError: "no such model repository, or a private one; check the "
        f"name, or {_LOG_IN}",
        errors.EntryNotFoundError: "a file that the repository lists is not there; ask its owner "
        "to push it again",
    }
    statuses = {
        401: f"the Hub asks for a token that it knows (401); {_LOG_IN}",
        403: f"this token may not do it (403); {_LOG_IN} with a token that may write",
        409: "the repository changed meanwhile (409); run it again",
        412: "the repository changed meanwhile (412); run it again",
        429: "too many requests (429); wait some minutes and run it again",
    }
    for kind, reason in kinds.items():
        if isinstance(error, kind):
            return reason
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in statuses:
        return statuses[status]
    if status >= 500:
        return f"the Hub failed ({status}); run it again later"
    message = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"the Hub answered {status}" + (f": {message}" if message else "")
