"""A certificate that the server signs itself, for a client that pins its fingerprint."""

import datetime
import hashlib
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.private_file import write_private

if TYPE_CHECKING:
    from cryptography.x509 import GeneralName

_LIFETIME = datetime.timedelta(days=825)  # the longest that common clients accept
_RENEW_BEFORE = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """A server's certificate and its private key, both PEM.

    Attributes:
        certificate: its file; the server's own certificate comes first.
        key: its file.
        fingerprint: SHA-256 of the certificate (DER), 64 hexadecimal digits: what a client pins.
    """

    certificate: Path
    key: Path
    fingerprint: str

    @classmethod
    def read(cls, certificate: Path, key: Path) -> "TlsFiles":
        """Check files that the user gives.

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


def own_certificate(host: str, folder: Path) -> TlsFiles:
    """The certificate of a host, kept in `folder`: as it is, or made where it cannot be used.

    Raises:
        InputError: a file cannot be read or written.
    """
    files = folder / "certificate.pem", folder / "key.pem"
    names = _names(host)
    if _is_usable(files[0], names):
        try:
            return TlsFiles.read(*files)
        except InputError:  # the key of another certificate: a process died between the two
            pass
    _make(names, *files)
    return TlsFiles.read(*files)


def _make(names: "list[GeneralName]", certificate: Path, key: Path) -> None:
    """Make an EC P-256 key and a certificate for it; the key is written first."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "edgeclip")])
    today = datetime.datetime.now(datetime.UTC)
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

    soon = datetime.datetime.now(datetime.UTC) + _RENEW_BEFORE
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        known = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    return found.not_valid_after_utc > soon and set(names) <= set(known)


def _names(host: str) -> "list[GeneralName]":
    """What the server may be called: its host, or this machine's names where that is any."""
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
    """Keep OpenSSL from asking at the terminal."""
    return ""
