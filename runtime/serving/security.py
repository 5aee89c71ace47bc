"""TLS certificate and bearer token of a server: read, created on first use, and checked."""

import datetime
import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.bundle.files import atomic_file, cache_root
from edgeclip.runtime.errors import InputError

if TYPE_CHECKING:
    from cryptography.x509 import GeneralName


def write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 atomically.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with atomic_file(path) as temporary:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


TOKEN_VARIABLE = "EDGECLIP_TOKEN"
_MIN_CHARACTERS = 8
_BYTES = 32


def is_authorized(headers: Mapping[bytes, bytes], token: bytes | None) -> bool:
    """Return whether a request carries the bearer token (RFC 6750), in constant time.

    Args:
        headers: headers of the request, names in lower case.
        token: the expected token; None accepts every request.
    """
    if token is None:
        return True
    scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(), token)


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the token in a file, or in $EDGECLIP_TOKEN; None if there is neither.

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


def load_or_create_token(path: Path) -> tuple[str, bool]:
    """Read the server's token, or create it, readable by its owner only.

    Returns:
        The token, and whether it was created.

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
    if len(token) < _MIN_CHARACTERS or not token.isascii() or token.split() != [token]:
        raise InputError(
            f"the token in {source} must be one ASCII word of at least {_MIN_CHARACTERS} characters"
        )
    return token


_LIFETIME = datetime.timedelta(days=825)  # the longest that common clients accept
_RENEW_BEFORE = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """A server's certificate and its private key, both PEM.

    Attributes:
        certificate: its file; the server's own certificate comes first.
        key: its file.
        fingerprint: SHA-256 of the certificate (DER), 64 hexadecimal digits, for clients to pin.
    """

    certificate: Path
    key: Path
    fingerprint: str

    @classmethod
    def read(cls, certificate: Path, key: Path) -> "TlsFiles":
        """Read and check a certificate and its key.

        Raises:
            InputError: they cannot be read, or do not belong together.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
            text = certificate.read_text(encoding="ascii")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise InputError(
                f"cannot use the certificate {certificate} with the key {key} ({error}): give PEM "
                "files that belong together, the key without a password"
            ) from None
        return cls(certificate=certificate, key=key, fingerprint=_fingerprint(text))


def load_or_create_certificate(host: str, folder: Path) -> TlsFiles:
    """Return the certificate of a host in `folder`; create it if it is missing or unusable.

    Raises:
        InputError: a file cannot be read or written.
    """
    files = folder / "certificate.pem", folder / "key.pem"
    names = _names(host)
    if _is_usable(files[0], names):
        try:
            return TlsFiles.read(*files)
        except InputError:  # not its key: a process died between writing the two
            pass
    _create_certificate(names, *files)
    return TlsFiles.read(*files)


def _create_certificate(names: "list[GeneralName]", certificate: Path, key: Path) -> None:
    """Create an EC P-256 key and a self-signed certificate; the key is written first."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edgeclip")])
    today = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))  # a client's clock may be slow
        .not_valid_after(today + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    write_private(key, private.private_bytes(pem, *plain))
    write_private(certificate, made.public_bytes(pem))


def _is_usable(path: Path, names: "list[GeneralName]") -> bool:
    from cryptography import x509

    soon = datetime.datetime.now(datetime.timezone.utc) + _RENEW_BEFORE
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        known = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    return found.not_valid_after_utc > soon and set(names) <= set(known)


def _names(host: str) -> "list[GeneralName]":
    """Return the names of the certificate: the host, or this machine's names for 0.0.0.0."""
    from cryptography import x509

    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [x509.DNSName(host)]
    if not address.is_unspecified:
        return [x509.IPAddress(address)]
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return [x509.DNSName(socket.gethostname()), x509.DNSName("localhost"), loopback]


def _fingerprint(pem: str) -> str:
    end = "-----END CERTIFICATE-----"
    first = pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(end) + len(end)]
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).hexdigest()


def _no_password() -> str:
    """Return no password, to keep OpenSSL from asking at the terminal."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """Token and certificate of a server.

    Attributes:
        token: bearer token that clients must send; None for none.
        tls: certificate and key; None for plain HTTP.
        lines: messages for the person who starts the server.
    """

    token: str | None
    tls: TlsFiles | None
    lines: tuple[str, ...]


def choose_security(
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
    """Choose token and certificate; beyond this machine, create and keep missing ones.

    Args:
        host: host as the user wrote it.
        is_local: whether only this machine can reach it.
        token_file: file with the token; by default $EDGECLIP_TOKEN is used.
        certificate: PEM file.
        key: PEM file; both or none.
        is_insecure: use neither token nor TLS.
        folder: folder of created files; by default `server_folder()`.
        environment: environment variables of the process.

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
        tls = load_or_create_certificate(host, own)
    if tls is not None:
        lines.append(f"certificate: {tls.certificate}, SHA-256 fingerprint {tls.fingerprint}")
    return Security(token=token, tls=tls, lines=tuple(lines))


def server_folder() -> Path:
    """Return the folder for files that a server creates: `server` in the cache folder."""
    return cache_root() / "server"


def _own_token(folder: Path, lines: list[str]) -> str:
    """Return the token in `folder`; print it only when created, as terminals keep output."""
    path = folder / "token"
    token, is_new = load_or_create_token(path)
    lines.append(f"token: {token} (kept in {path})" if is_new else f"token: as kept in {path}")
    return token
