"""`edgeclip embed`: embed image files or texts, and write an index for `edgeclip search`."""

import argparse
from pathlib import Path

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.cli.options import add_encoder_options, open_encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import find_images
from edgeclip.runtime.inputs.image_folder import embed_files, report_skipped
from edgeclip.runtime.inputs.text_files import read_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("paths", type=Path, nargs="*", help="image files, or folders of them")
    parser.add_argument("--texts", type=Path, help="instead of images: a file, one text per line")
    parser.add_argument("--out", type=Path, required=True, help="the index to write (.npz)")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read, and at files that would be left out "
        "(default: skip and name them)",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="truncate texts that are too long (default: refuse)"
    )
    add_encoder_options(parser)


def run(args: argparse.Namespace) -> int:
    """Embed and write the index; skipped images do not change the exit status."""
    if bool(args.paths) == bool(args.texts):
        raise InputError("give images or folders, or --texts FILE, and not both")
    if args.out.suffix != ".npz":
        raise InputError(f"{args.out}: the name of an index ends in .npz")
    index = _embed_texts(args) if args.texts else _embed_images(args)
    index.save(args.out)
    print(f"{len(index.keys)} embeddings of length {index.embeddings.shape[1]} in {args.out}")
    return 0


def _embed_images(args: argparse.Namespace) -> Index:
    paths = find_images(args.paths, strict=args.strict)
    encoder = open_encoder(args)
    embedded = embed_files(encoder, paths, batch_size=args.batch_size, strict=args.strict)
    report_skipped(embedded)
    keys = tuple(path.as_posix() for path in embedded.paths)
    return Index(keys=keys, embeddings=embedded.embeddings, space=encoder.space)


def _embed_texts(args: argparse.Namespace) -> Index:
    texts = tuple(read_lines(args.texts))  # row i of the index is line i
    encoder = open_encoder(args)
    embeddings = encoder.encode_text(texts, truncate=args.truncate, batch_size=args.batch_size)
    return Index(keys=texts, embeddings=embeddings, space=encoder.space)
