"""`edgeclip search`: print the entries of an index most similar to texts or images."""

import argparse
import dataclasses
import logging
import os
from pathlib import Path

from edgeclip.runtime.bundle.index import Hit
from edgeclip.runtime.bundle.reduced_index import AnyIndex, load_index
from edgeclip.runtime.cli.options import (
    add_encoder_options,
    add_json_option,
    open_encoder,
    positive,
    print_json,
)
from edgeclip.runtime.console import on_one_line
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import IMAGE_SUFFIXES, MORE_SUFFIXES

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("texts", nargs="*", help="texts to search for")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="image file to search for; may be repeated",
    )
    parser.add_argument("--index", type=Path, required=True, help="index of `edgeclip embed`")
    parser.add_argument("--top", type=positive, default=10, help="hits per query (default: 10)")
    add_json_option(parser)
    add_encoder_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the hits of each query, best first."""
    if not args.texts and not args.image:
        raise InputError("nothing to search for: give a text, or --image FILE")
    for text in args.texts:  # else the file's name would be searched for
        if not text.strip():
            raise InputError("a text to search for is empty: give a text, or --image FILE")
        if Path(text).suffix.lower() in IMAGE_SUFFIXES | MORE_SUFFIXES:
            if os.path.isfile(text):
                raise InputError(f"{text} is an image file: search by it with --image {text}")
            _log.warning("%s is searched for as a text: there is no such file", text)
        if text.lower().endswith(".txt") and os.path.isfile(text):
            raise InputError(f"{text} is a file: give the texts themselves")
    index = load_index(args.index)
    found = _search(open_encoder(args), index, args)
    if args.json:
        print_json({query: [dataclasses.asdict(hit) for hit in hits] for query, hits in found})
        return 0
    for query, hits in found:
        print(on_one_line(query))
        for hit in hits:
            print(f"  {hit.score:+.3f}  {on_one_line(hit.key)}")
    return 0


def _search(
    encoder: Encoder, index: AnyIndex, args: argparse.Namespace
) -> list[tuple[str, tuple[Hit, ...]]]:
    found: list[tuple[str, tuple[Hit, ...]]] = []
    for queries in (args.texts, args.image):
        if queries:
            hits = encoder.search(queries, index, top=args.top)
            found.extend(zip(map(str, queries), hits, strict=True))
    return found
