"""The bearer token that a client shows, and where the server's own lies."""

import hmac
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.private_file import write_private

TOKEN_VARIABLE = "EDGECLIP_TOKEN"
_FEWEST_CHARACTERS = 8
_BYTES = 32


def is_authorized(headers: Mapping[bytes, bytes], token: bytes | None) -> bool:
    """Whether a request may be answered; compares in constant time (RFC 6750).

    Args:
        headers: of the request, names in lower case.
        token: what it has to show; None lets every request pass.
    """
    if token is None:
        return True
    scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), token)


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that the user gives, by a file or by $EDGECLIP_TOKEN; None for none.

    Raises:
        InputError: the file cannot be read, or the token is too short or not one word.
    """
    if file is None:
        if TOKEN_VARIABLE not in environment:
            return None
        return _checked(environment[TOKEN_VARIABLE], f"${TOKEN_VARIABLE}")
    try:
        return _checked(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token in {file}: {error}") from None


def own_token(path: Path) -> tuple[str, bool]:
    """Read the server's own token, or make it, readable by its owner only.

    Returns:
        The token, and whether it was made.

    Raises:
        InputError: the file cannot be read or written.
    """
    if path.exists():
        found = read_token(path)
        assert found is not None
        return found, False
    token = secrets.token_urlsafe(_BYTES)
    write_private(path, token.encode() + b"\n")
    return token, True


def _checked(text: str, source: str) -> str:
    token = text.strip()
    if len(token) < _FEWEST_CHARACTERS or not token.isascii() or token.split() != [token]:
        raise InputError(
            f"the token in {source} must be one ASCII word of at least {_FEWEST_CHARACTERS} "
            "characters"
        )
    return token
