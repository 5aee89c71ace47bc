"""What goes wrong between this machine and the Hugging Face Hub, as one clear line each."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from edgeclip.runtime.errors import EdgeClipError, InputError, first_line

_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


class HubError(EdgeClipError):
    """The Hub cannot be reached, refuses, or holds something else than was asked for."""


@contextmanager
def hub_errors(doing: str, *, endpoint: str, secret: str | None = None) -> Iterator[None]:
    """Turn every error of `huggingface_hub` inside the block into one line without a token.

    Args:
        doing: what the block does, such as "pull user/name", for the message.
        endpoint: address of the Hub, for the message.
        secret: a token that must not appear in any message.

    Raises:
        HubError: the Hub cannot be reached, or its answer was an error.
        InputError: a local file cannot be read or written.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are the errors of the HTTP client, which differs between releases.
    client: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    known: tuple[type[Exception], ...] = (*client, OSError, ValueError, RuntimeError)
    try:
        yield
    except EdgeClipError:
        raise
    except known as error:
        kind, message = _explain(error, doing, endpoint)
        # Not chained: the errors behind it may hold the token.
        raise kind(hide_tokens(message, secret)) from None


def hide_tokens(text: str, secret: str | None = None) -> str:
    """Return `text` with `secret`, and all that looks like a token of the Hub, put out of sight."""
    if secret:
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)


def _explain(error: Exception, doing: str, endpoint: str) -> tuple[type[EdgeClipError], str]:
    """The kind and text of the error to raise; what lies behind an error says more than it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    chain = _chain(error)
    if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
        return HubError, f"cannot {doing}: HF_HUB_OFFLINE is set; unset it"
    for item in chain:
        if isinstance(item, HfHubHTTPError):
            return HubError, f"cannot {doing}: {_answer(item)}"
    network = tuple(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    if isinstance(chain[0], LocalEntryNotFoundError) or any(
        isinstance(item, (*network, ConnectionError, TimeoutError)) for item in chain
    ):
        reason = first_line(chain[-1])
        return HubError, (
            f"cannot {doing}: {endpoint} does not answer ({reason}); check the connection and run "
            "it again, what was transferred whole is not sent twice"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return InputError, f"cannot {doing}: {where}{error.strerror}"
    if "Consistency check failed" in str(error):
        return HubError, f"cannot {doing}: it arrived cut short; run it again"
    return HubError, f"cannot {doing}: {' '.join(str(error).split()) or type(error).__name__}"


def _chain(error: Exception) -> list[Exception]:
    """The error and those that caused it, the outermost first."""
    chain = [error]
    while isinstance(cause := chain[-1].__cause__, Exception) and cause not in chain:
        chain.append(cause)
    return chain


def _answer(error: Exception) -> str:
    """What an answer of the Hub means, and how to mend it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; ask for it on the page of the repository, then {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model repository, or a private one; check the name, or {_LOG_IN}"
    if isinstance(error, errors.EntryNotFoundError):
        return "a file that the repository lists is not there; ask its owner to push it again"
    known = {
        401: f"the Hub asks for a token that it knows (401); {_LOG_IN}",
        403: f"this token may not do it (403); {_LOG_IN} with a token that may write",
        409: "the repository changed meanwhile (409); run it again",
        412: "the repository changed meanwhile (412); run it again",
        429: "too many requests (429); wait some minutes and run it again",
    }
    if status in known:
        return known[status]
    if status >= 500:
        return f"the Hub failed ({status}); run it again later"
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"the Hub answered {status}" + (f": {said}" if said else "")
