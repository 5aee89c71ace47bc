"""Options that several commands have in common, and the outputs that they check and lock."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.spec import Precision

if TYPE_CHECKING:
    from edgeclip.runtime.encoder import Encoder
    from edgeclip.runtime.inputs.find_images import EmbeddedFiles, MaxBad

_LOCK = ".edgeclip-lock"
_PROBE_BYTES = 4096


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add `--bundle`, `--device`, `--precision` and `--batch-size`."""
    parser.add_argument("--bundle", type=Path, required=True, help="directory of the bundle")
    add_device_option(parser, tuned=True)
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="precision of both towers (default: the bundle's choice for each)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="images or texts per batch (default: 32)"
    )


def add_device_option(parser: argparse.ArgumentParser, *, tuned: bool = False) -> None:
    """Add `--device`; with `tuned`, None stands for what `edgeclip tune` found."""
    default = "what `edgeclip tune` found, else this-machine" if tuned else "this-machine"
    parser.add_argument(
        "--device",
        default=None if tuned else "this-machine",
        help=f"name of a device, or its YAML file (default: {default})",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs to read")


def open_encoder(args: argparse.Namespace) -> "Encoder":
    """Open the encoder for the options of `add_encoder_options`."""
    from edgeclip.runtime.encoder import Encoder  # imports Pillow, which few commands need

    return Encoder.open(args.bundle, device=args.device, precision=args.precision)


def embed_images(
    args: argparse.Namespace,
    encoder: "Encoder",
    paths: Sequence[Path],
    limit: "MaxBad | None" = None,
) -> "EmbeddedFiles":
    """Embed image files by `--batch-size` and `--strict`, and report those that were skipped.

    Raises:
        InputError: more were skipped than `limit` allows (None: any number), or all.
    """
    from edgeclip.runtime.inputs.find_images import embed_files, report_skipped

    embedded = embed_files(
        encoder.encode_pixels,
        encoder.spec.image,
        paths,
        batch_size=args.batch_size,
        threads=encoder.device.threads,
        strict=args.strict,
    )
    report_skipped(embedded, limit)
    return embedded


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object on stdout, in ASCII, which every console and pipe can carry."""
    print(json.dumps(value, indent=2, allow_nan=False))


def positive(text: str) -> int:
    """Convert an argument to a whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def zero_or_more(text: str) -> int:
    """Convert an argument to a whole number of 0 or above, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


@dataclass(frozen=True, slots=True)
class Targets:
    """What a command writes; None stands for an option that was not given.

    Attributes:
        files: written beside and renamed.
        directories: likewise, whole.
        folders: filled in place, such as a run.
        shared: likewise, by several processes that lock what they write themselves.
    """

    files: tuple[Path | None, ...] = ()
    directories: tuple[Path | None, ...] = ()
    folders: tuple[Path | None, ...] = ()
    shared: tuple[Path | None, ...] = ()


@contextmanager
def claim_targets(targets: Targets) -> Iterator[None]:
    """Hold a lock on each target during the block, after writing a little beside it or into it.

    A lock file lies where the target is written, and the operating system frees it when the
    process ends in whatever way. Folders made for it are removed again if they stay empty.

    Raises:
        InputError: a target cannot be written, another process writes it, or two are the same.
    """
    with ExitStack() as stack:
        seen: set[Path] = set()
        for path in targets.files:
            if path is not None and path.exists() and not path.is_file():
                what = "directory" if path.is_dir() else "device or pipe"
                raise InputError(f"{path} is a {what}: give the name of a file to write")
        for path in targets.directories:
            if path is not None and path.is_dir() and os.path.ismount(path):
                raise InputError(
                    f"{path} is a mount point, which cannot be replaced: give a directory in it"
                )
        for path in (*targets.directories, *targets.folders, *targets.shared):
            if path is not None and not _is_utf8(path):
                raise InputError(
                    f"{path} is not valid UTF-8, and no model can be saved there: choose another "
                    "name"
                )
        for path in (*targets.folders, *targets.shared):
            if path is not None:
                full = _new(path.resolve(), seen, path)
                stack.enter_context(_made(full, path))
                _probe(full, path)
                if path in targets.folders:
                    stack.enter_context(_locked(full / _LOCK, path))
                    # Another command may replace the folder as a whole, if that is possible here.
                    if full.name and os.access(full.parent, os.W_OK):
                        stack.enter_context(_locked(_beside(full), path))
        for path in (*targets.directories, *targets.files):
            if path is not None:
                full = _new(path.parent.resolve() / path.name, seen, path)
                stack.enter_context(_made(full.parent, path))
                _probe(full.parent, path)
                stack.enter_context(_locked(_beside(full), path))
        yield


def _beside(full: Path) -> Path:
    return full.with_name(f"{_LOCK}.{full.name}")


def _new(full: Path, seen: set[Path], path: Path) -> Path:
    if full in seen:
        raise InputError(f"two outputs are {path}: give each a name of its own")
    seen.add(full)
    return full


def _is_utf8(path: Path) -> bool:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _made(folder: Path, target: Path) -> Iterator[None]:
    """Make a folder, and remove it after the block if it was made here and is still empty."""
    made = [item for item in (folder, *folder.parents) if not item.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            for item in made:
                item.rmdir()


def _probe(folder: Path, target: Path) -> None:
    """Write a few bytes under a name like those of temporary files, and remove them."""
    token = secrets.token_hex(4)
    path = folder / f".edgeclip-tmp-{os.getpid()}-{token}.{target.name}"
    try:
        try:
            with path.open("xb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}") from error


if sys.platform == "win32":

    @contextmanager
    def _locked(path: Path, target: Path) -> Iterator[None]:
        """Hold a file that the system deletes when its process ends."""
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_TEMPORARY)
        except OSError as error:
            raise InputError(_busy(target)) from error
        try:
            yield
        finally:
            os.close(descriptor)

else:
    import fcntl

    @contextmanager
    def _locked(path: Path, target: Path) -> Iterator[None]:
        """Hold a lock file; who holds it may delete it, so its inode is compared."""
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
            except OSError as error:
                raise InputError(f"cannot write {target}: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise InputError(_busy(target)) from None
            except OSError:
                break  # a file system without locks
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _busy(target: Path) -> str:
    return (
        f"another process of edgeclip writes {target}: wait until it has ended, or choose another "
        "name"
    )
