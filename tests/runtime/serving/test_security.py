"""Tokens and certificates: made where they are needed, kept from others, checked."""

import datetime
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.security import (
    TlsFiles,
    choose_security,
    is_authorized,
    load_or_create_certificate,
    load_or_create_token,
    read_token,
    write_private,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("shown", "passes"),
    [
        (b"Bearer right-token", True),
        (b"bearer right-token", True),
        (b"Bearer  right-token ", True),
        (b"Bearer right-toke", False),
        (b"Bearer right-token2", False),
        (b"Basic right-token", False),
        (b"right-token", False),
        (b"Bearer \xff\xfe", False),
        (b"", False),
    ],
)
def test_only_the_token_passes(shown: bytes, passes: bool) -> None:
    assert is_authorized({b"authorization": shown}, b"right-token") is passes
    assert is_authorized({b"authorization": shown}, None)
    assert not is_authorized({}, b"right-token")


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  from-a-file\n")
    assert read_token(file, {"EDGECLIP_TOKEN": "from-outside"}) == "from-a-file"
    assert read_token(None, {"EDGECLIP_TOKEN": "from-outside"}) == "from-outside"
    assert read_token(None, {}) is None


@pytest.mark.parametrize("text", ["", "short", "two words here", "t\u00f6kentoken"])
def test_poor_tokens_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one ASCII word of at least 8"):
        read_token(None, {"EDGECLIP_TOKEN": text})
    (tmp_path / "token").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="one ASCII word of at least 8"):
        load_or_create_token(tmp_path / "token")


def test_an_own_token_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "server" / "token"
    token, is_made = load_or_create_token(path)
    assert is_made
    assert len(token) >= 40
    assert mode(path) == 0o600
    assert load_or_create_token(path) == (token, False)


def test_private_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_private(path, b"one")
    write_private(path, b"two")
    assert (path.read_bytes(), mode(path)) == (b"two", 0o600)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot write"):
        write_private(path / "below", b"three")


@pytest.mark.parametrize("host", ["edge.example", "10.1.2.3", "::1", "0.0.0.0", "::"])
def test_a_certificate_names_its_host(host: str, tmp_path: Path) -> None:
    files = load_or_create_certificate(host, tmp_path)
    found = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = [str(name.value) for name in names]
    assert host in known or "localhost" in known
    assert found.not_valid_after_utc > datetime.datetime.now(datetime.timezone.utc)
    assert mode(files.key) == 0o600
    der = ssl.PEM_cert_to_DER_cert(files.certificate.read_text())
    assert x509.load_der_x509_certificate(der) == found
    assert load_or_create_certificate(host, tmp_path) == files


def test_a_certificate_is_made_again_where_it_cannot_serve(tmp_path: Path) -> None:
    first = load_or_create_certificate("10.0.0.1", tmp_path)
    second = load_or_create_certificate("10.0.0.2", tmp_path)
    assert second.fingerprint != first.fingerprint
    other = load_or_create_certificate("10.0.0.2", tmp_path / "other")
    second.key.write_bytes(other.key.read_bytes())  # as if a process died between the two
    third = load_or_create_certificate("10.0.0.2", tmp_path)
    assert third.fingerprint != second.fingerprint
    third.certificate.write_text("damaged")
    assert load_or_create_certificate("10.0.0.2", tmp_path).fingerprint != third.fingerprint


def test_a_users_certificate_is_checked(tmp_path: Path) -> None:
    one, other = (
        load_or_create_certificate("one.example", tmp_path / "1"),
        load_or_create_certificate("b", tmp_path / "2"),
    )
    assert TlsFiles.read(one.certificate, one.key) == one
    for certificate, key in (
        (one.certificate, other.key),
        (one.key, one.certificate),
        (tmp_path / "missing", one.key),
        (one.certificate, tmp_path),
    ):
        with pytest.raises(InputError, match="cannot use the certificate"):
            TlsFiles.read(certificate, key)


def test_what_protects_a_server(tmp_path: Path) -> None:
    local = choose_security("127.0.0.1", is_local=True, environment={})
    assert (local.token, local.tls, local.lines) == (None, None, ())
    chosen = {"EDGECLIP_TOKEN": "chosen-token"}
    assert choose_security("::1", is_local=True, environment=chosen).token == "chosen-token"
    outside = choose_security("10.0.0.1", is_local=False, folder=tmp_path, environment=chosen)
    assert outside.token == "chosen-token"
    assert outside.tls is not None
    assert outside.tls.fingerprint in outside.lines[0]
    assert not (tmp_path / "token").exists()
    made = choose_security("10.0.0.1", is_local=False, folder=tmp_path, environment={})
    assert made.token is not None
    assert made.token in made.lines[0]
    open_to_all = choose_security("10.0.0.1", is_local=False, is_insecure=True, environment=chosen)
    assert (open_to_all.token, open_to_all.tls) == (None, None)
    assert "anyone who reaches 10.0.0.1" in open_to_all.lines[0]


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="belong together"):
        choose_security("::1", is_local=True, key=tmp_path)
    with pytest.raises(InputError, match="leave the other options out"):
        choose_security("::1", is_local=True, is_insecure=True, token_file=tmp_path)
