"""Fetch WebDataset shards from elsewhere once, so that they can be read at random."""

import hashlib
import logging
import re
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from tqdm import tqdm

from edgeclip.runtime.bundle.files import atomic_file, cache_root, require_space
from edgeclip.runtime.errors import ConfigError, InputError

_log = logging.getLogger(__name__)

_PIPE = "pipe:"
_SCHEME = re.compile(r"([a-z][a-z0-9+]*)://")
# How users of these stores read a file with the stores' own programs.
_PIPES = {
    "s3": "aws s3 cp {} -",
    "gs": "gcloud storage cat {}",
    "az": "az storage blob download --blob-url {} --file /dev/stdout",
    "hdfs": "hdfs dfs -cat {}",
}
_CHUNK = 1 << 20
_AT_ONCE = 4  # connections
_ASKED = 8  # shards whose sizes tell that of all
_TRIES = 4
_TIMEOUT = 60.0  # seconds without a byte
_PAUSE = 1.0  # seconds before the second try; each further one waits twice as long


def is_remote(data: str) -> bool:
    """Tell whether shards have to be fetched."""
    return data.startswith(_PIPE) or _SCHEME.match(data) is not None


def fetch_shards(addresses: Sequence[str]) -> tuple[Path, ...]:
    """Fetch shards into this user's cache, as they are; return their files in the same order.

    `https://...`, `http://...` and `pipe:COMMAND`, whose output is the shard, are fetched; what
    lies there already is not. Each shard appears whole or not at all, so an interrupted fetch goes
    on with the next shard. Proxies are those of the environment.

    Raises:
        ConfigError: another kind of address.
        InputError: a shard cannot be fetched in several tries, or the disk has no room.
    """
    for address in addresses:
        _check(address)
    addresses = tuple(dict.fromkeys(addresses))
    folder = cache_root() / "shards"
    targets = [folder / _file_name(address) for address in addresses]
    lacking = [
        (address, target)
        for address, target in zip(addresses, targets, strict=True)
        if not target.exists()
    ]
    if lacking:
        _fetch_all(lacking, folder, len(addresses))
    return tuple(targets)


def _check(address: str) -> None:
    scheme = _SCHEME.match(address)
    if address.startswith(_PIPE) or (scheme and scheme[1] in ("http", "https")):
        return
    name = scheme[1] if scheme else ""
    command = _PIPES.get(name, "COMMAND-THAT-PRINTS {}").format(address)
    raise ConfigError(
        f"{address}: addresses of the kind {name}:// are not fetched here; give the command that "
        f"does: --data 'pipe:{command}'"
    )


def _file_name(address: str) -> str:
    """Return a name that no other address has, with the end of the address to know it by."""
    path = address if address.startswith(_PIPE) else urlsplit(address).path
    shown = re.sub(r"[^A-Za-z0-9._-]+", "-", path).strip("-")[-60:].removesuffix(".tar")
    return f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{shown}.tar"


def _fetch_all(lacking: Sequence[tuple[str, Path]], folder: Path, count: int) -> None:
    about = _size_of_all([address for address, _ in lacking])
    told = "of unknown size" if about is None else f"about {about / 1e9:.3g} GB"
    _log.info(
        "fetching %d of %d shards (%s) to %s; the others are there",
        *(len(lacking), count, told, folder),
    )
    if about is not None:
        try:
            require_space(folder, about)
        except InputError as error:
            raise InputError(f"{error} (EDGECLIP_CACHE=FOLDER)") from error
    with (
        tqdm(total=about, desc="fetch", unit="B", unit_scale=True, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        stop = threading.Event()

        def got(count: int) -> None:
            bar.update(count)
            if stop.is_set():
                raise _RefusedError("it was stopped")

        waiting = [pool.submit(_fetch, *item, got) for item in lacking]
        try:
            for done in as_completed(waiting):
                done.result()
        except BaseException:
            stop.set()  # or Ctrl-C would wait for the shards in hand
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _size_of_all(addresses: Sequence[str]) -> int | None:
    """Return about how many bytes the shards have, by asking for some; None if nobody tells."""
    step = max(1, len(addresses) // _ASKED)
    asked = [address for address in addresses[::step][:_ASKED] if not address.startswith(_PIPE)]
    with ThreadPoolExecutor(_ASKED) as pool:
        sizes = [size for size in pool.map(_size, asked) if size is not None]
    return sum(sizes) * len(addresses) // len(sizes) if sizes else None


def _size(address: str) -> int | None:
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
    except (OSError, ValueError):
        return None  # fetching it will say why
    return int(length) if length and length.isdigit() else None


def _fetch(address: str, target: Path, got: Callable[[int], object]) -> None:
    for attempt in range(_TRIES):
        taken = 0
        try:
            with atomic_file(target) as temporary, temporary.open("wb") as file:
                for chunk in _chunks(address):
                    file.write(chunk)
                    taken += len(chunk)
                    got(len(chunk))
            return
        except _RefusedError as error:
            raise InputError(f"{address} cannot be fetched: {error}") from error
        except _BrokenError as error:
            if attempt + 1 == _TRIES:
                raise InputError(
                    f"{address} cannot be fetched: {error}, {_TRIES} times; run it again to go on "
                    "with what is there"
                ) from error
            _log.debug("%s: %s; trying again", address, error)
            got(-taken)
            time.sleep(_PAUSE * 2**attempt)


class _RefusedError(Exception):
    """Another try would end in the same way."""


class _BrokenError(Exception):
    """Another try may succeed."""


def _chunks(address: str) -> Iterator[bytes]:
    if address.startswith(_PIPE):
        yield from _output_of(address.removeprefix(_PIPE))
    else:
        yield from _download(address)


def _download(address: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
            taken = 0
            while chunk := answer.read(_CHUNK):
                taken += len(chunk)
                yield chunk
    except urllib.error.HTTPError as error:
        told = f"the server answers {error.code} {error.reason}"
        if error.code >= 500 or error.code in (408, 429):
            raise _BrokenError(told) from error
        raise _RefusedError(told) from error
    except (OSError, ValueError) as error:
        raise _BrokenError(str(getattr(error, "reason", error))) from error
    except Exception as error:  # http.client's are no OSError
        raise _BrokenError(f"{type(error).__name__} {error}") from error
    if length and length.isdigit() and taken != int(length):
        raise _BrokenError(f"{taken} of {length} bytes came")


def _output_of(command: str) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            stream: IO[bytes] = process.stdout
            while chunk := stream.read(_CHUNK):
                yield chunk
        if process.returncode:
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
            told = f": {lines[-1]}" if lines else ""
            raise _BrokenError(f"the command ends with {process.returncode}{told}")
