"""Whether a server takes TLS and a token: by default wherever others can reach it."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.files import cache_root
from edgeclip.runtime.serving.auth import own_token, read_token
from edgeclip.runtime.serving.tls import TlsFiles, own_certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How a server is protected.

    Attributes:
        token: what clients must show; None for nothing.
        tls: certificate and key; None for plain HTTP.
        lines: what the person who starts the server should read.
    """

    token: str | None
    tls: TlsFiles | None
    lines: tuple[str, ...]


def security_for(
    host: str,
    *,
    is_local: bool,
    token_file: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    is_insecure: bool = False,
    folder: Path | None = None,
    environment: Mapping[str, str] = environ,
) -> Security:
    """Choose; what is missing on an address that others can reach is made and kept.

    Args:
        host: as the user wrote it.
        is_local: whether only this machine can reach it.
        token_file: holds the token; by default $EDGECLIP_TOKEN is it.
        certificate: PEM file.
        key: PEM file; both or none.
        is_insecure: neither token nor TLS.
        folder: for what is made; by default `server_folder()`.
        environment: of the process.

    Raises:
        InputError: options that contradict each other, or a file that cannot be used.
    """
    if (certificate is None) != (key is None):
        raise InputError("--tls-cert and --tls-key belong together: give both")
    if is_insecure:
        if token_file is not None or certificate is not None:
            raise InputError("--insecure turns TLS and the token off: leave the other options out")
        warning = f"insecure: no TLS and no token, anyone who reaches {host} may use the server"
        return Security(token=None, tls=None, lines=() if is_local else (warning,))
    own = server_folder() if folder is None else folder
    lines: list[str] = []
    token = read_token(token_file, environment)
    if token is None and not is_local:
        token = _own_token(own, lines)
    tls = None
    if certificate is not None and key is not None:
        tls = TlsFiles.read(certificate, key)
    elif not is_local:
        tls = own_certificate(host, own)
    if tls is not None:
        lines.append(f"certificate: {tls.certificate}, SHA-256 fingerprint {tls.fingerprint}")
    return Security(token=token, tls=tls, lines=tuple(lines))


def server_folder() -> Path:
    """Where a server keeps what it makes: `server` beside the engines' folder."""
    return cache_root() / "server"


def _own_token(folder: Path, lines: list[str]) -> str:
    """The token in `folder`; shown only when it was made, for terminals keep what they show."""
    path = folder / "token"
    token, is_made = own_token(path)
    lines.append(f"token: {token} (kept in {path})" if is_made else f"token: as kept in {path}")
    return token
