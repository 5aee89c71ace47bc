"""`edgeclip embed`: embed image files or texts, and write or update an index for `search`.

An index that exists is updated: only what is new or changed is embedded, what is gone from the
named folders or damaged now is removed and named, and entries of other folders stay. A stopped run
goes on.
"""

import argparse
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import ContentHashes, require_space
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.bundle.index_update import IndexChange, IndexUpdate, index_bytes
from edgeclip.runtime.bundle.reduced_index import ReducedIndex
from edgeclip.runtime.bundle.reduction import ROW_TYPES, Form, Reducer
from edgeclip.runtime.cli.options import Targets, add_encoder_options, open_encoder, positive
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.find_images import add_max_bad_option, find_images, report_bad
from edgeclip.runtime.inputs.preprocess import crop_ahead
from edgeclip.runtime.inputs.text_files import read_lines
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import Tower

_log = logging.getLogger(__name__)
Item = TypeVar("Item")
_TEXTS_AT_ONCE = 4096  # that are tokenized
_NAMED = 20  # removed entries that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("paths", type=Path, nargs="*", help="image files, or folders of them")
    parser.add_argument("--texts", type=Path, help="instead of images: a file, one text per line")
    parser.add_argument(
        "--out", type=Path, required=True, help="the index to write or to update (.npz)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="embed everything anew, and keep no other entry"
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read, and at files that would be left out "
        "(default: skip and name them)",
    )
    add_max_bad_option(parser)
    parser.add_argument(
        "--truncate", action="store_true", help="truncate texts that are too long (default: refuse)"
    )
    parser.add_argument(
        "--dim",
        type=positive,
        help="cut embeddings to so many numbers, a length that the bundle gives (default: all)",
    )
    parser.add_argument(
        "--embeddings",
        choices=ROW_TYPES,
        default="float32",
        help="what the index holds of each number: 4 bytes, 1 byte, or its sign alone (default: "
        "float32)",
    )
    parser.add_argument(
        "--basis",
        type=Path,
        metavar="BUNDLE",
        help="take the axes by which embeddings are cut from another bundle of the same embedding "
        "space, such as that of the student who will search what the teacher embeds",
    )
    add_encoder_options(parser)


def targets(args: argparse.Namespace) -> Targets:
    """Return what the command writes."""
    return Targets(files=(args.out,))


def run(args: argparse.Namespace) -> int:
    """Embed and write the index; skipped images do not change the exit status."""
    if bool(args.paths) == bool(args.texts):
        raise InputError("give images or folders, or --texts FILE, and not both")
    if args.out.suffix != ".npz":
        raise InputError(f"{args.out}: the name of an index ends in .npz")
    is_update = args.out.exists() and not args.replace
    change = _embed_texts(args) if args.texts else _embed_images(args)
    index = change.index
    if isinstance(index, ReducedIndex):
        length, how = index.reducer.form.length, f" as {index.reducer.form.dtype}"
    else:
        length, how = index.embeddings.shape[1], ""
    print(f"{len(index.keys)} embeddings of length {length}{how} in {args.out}")
    if is_update:
        if change.removed:
            names, more = ", ".join(change.removed[:_NAMED]), len(change.removed) - _NAMED
            _log.info("removed: %s%s", names, f" and {more} more" if more > 0 else "")
        counts = (len(change.added), len(change.changed), len(change.removed), change.kept)
        print("{} added, {} changed, {} removed, {} as before".format(*counts))
    return 0


def _embed_images(args: argparse.Namespace) -> IndexChange:
    paths = find_images(args.paths, strict=args.strict)
    encoder = open_encoder(args)
    hashes = ContentHashes()
    kept: list[tuple[Path, bytes]] = []
    bad: list[str] = []
    unopened: set[str] = set()
    with (
        _update(args, encoder, "image", len(paths)) as update,
        tqdm(total=len(paths), desc="embed", unit="image", file=sys.stderr) as bar,
    ):
        for chunk in _chunks(paths, args.batch_size):
            read: list[tuple[Path, bytes]] = []
            new: dict[bytes, Path] = {}
            for path in chunk:
                try:
                    content = hashes.of(path)
                except InputError as error:
                    if args.strict:
                        raise
                    bad.append(str(error))
                    unopened.add(path.as_posix())
                    continue
                read.append((path, content))
                if content not in update:
                    new.setdefault(content, path)
            threads = encoder.device.threads
            found = crop_ahead(
                list(new.values()), encoder.spec.image, threads=threads, ahead=len(new)
            )
            crops = dict(zip(new, found, strict=True))
            for path, content in read:
                crop = crops.get(content)
                if not isinstance(crop, InputError):
                    kept.append((path, content))
                elif args.strict:
                    raise crop
                else:
                    same = "" if new[content] == path else f"{path.as_posix()}, the same file: "
                    bad.append(same + str(crop))
            good = {
                content: crop for content, crop in crops.items() if isinstance(crop, np.ndarray)
            }
            if good:
                update.add(tuple(good), encoder.encode_pixels(np.stack(list(good.values()))))
            bar.update(len(chunk))
        report_bad(bad, len(paths), args.max_bad)
        keys = [path.as_posix() for path, _ in kept]
        contents = [content for _, content in kept]
        is_under = _under(args.paths)
        # A picture whose bytes cannot be read may be the same as before, so its entry stays.
        return update.finish(
            keys, contents, is_named=lambda key: key not in unopened and is_under(key)
        )


def _embed_texts(args: argparse.Namespace) -> IndexChange:
    texts = tuple(read_lines(args.texts))  # row i of the index is line i
    encoder = open_encoder(args)
    contents = [hashlib.sha256(f"text {args.truncate} {text}".encode()).digest() for text in texts]
    with _update(args, encoder, "text", len(texts)) as update:
        tokenizer = TextTokenizer.from_file(encoder.bundle.tokenizer_path, encoder.spec.text)
        for start, chunk in enumerate(_chunks(texts, _TEXTS_AT_ONCE)):  # all, before long work
            tokenizer.encode(chunk, truncate=args.truncate, first=start * _TEXTS_AT_ONCE)
        for numbers in _chunks(range(len(texts)), args.batch_size):
            new = {contents[n]: texts[n] for n in numbers if contents[n] not in update}
            if new:
                embeddings = encoder.encode_text(
                    list(new.values()), truncate=args.truncate, batch_size=args.batch_size
                )
                update.add(tuple(new), embeddings)
        # The file is the whole list: what it no longer holds is removed.
        return update.finish(texts, contents, is_named=lambda _: True)


@contextmanager
def _update(
    args: argparse.Namespace, encoder: Encoder, tower: Tower, count: int
) -> Iterator[IndexUpdate]:
    """Open the index of `--out` for `count` embeddings of a tower; say on Ctrl-C what is kept."""
    dim = encoder.spec.dim
    reducer = _reducer(args, encoder)
    require_space(args.out, index_bytes(count, dim, reducer))
    update = IndexUpdate(
        args.out,
        space=encoder.space,
        model=encoder.model_of(tower),
        dim=dim,
        replace=args.replace,
        reducer=reducer,
    )
    try:
        with closing(update):
            yield update
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; {len(update)} embeddings are kept, so run it again to go on"
        ) from None


def _reducer(args: argparse.Namespace, encoder: Encoder) -> Reducer | None:
    """Return what reduces embeddings as the options ask; None for full ones."""
    form = Form(args.dim or encoder.spec.dim, args.embeddings)
    if form == Form(encoder.spec.dim, "float32"):
        if args.basis is not None:
            raise ConfigError(
                "--basis is for shorter or coarser embeddings: give --dim or --embeddings too"
            )
        return None
    if args.basis is None:
        return encoder.reducer(form.length, form.dtype)
    reducer = Bundle.open(args.basis).reducer(form)
    check_space(encoder.space, reducer.space, f"the bundle {args.basis}")
    return reducer


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _under(paths: Sequence[Path]) -> Callable[[str], bool]:
    """Return whether a key lies at one of the given files or under one of the folders.

    A folder is the same however it is spelled: `.` does not hold `../a.png`, and a folder that was
    named by a relative path may be named by an absolute one.
    """
    places = [PurePath(os.path.abspath(path)) for path in paths]
    return lambda key: any(PurePath(os.path.abspath(key)).is_relative_to(place) for place in places)
