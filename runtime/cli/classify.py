"""`edgeclip classify`: print the most likely labels of image files."""

import argparse
import dataclasses
from pathlib import Path

from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.cli.options import (
    add_encoder_options,
    add_json_option,
    embed_images,
    open_encoder,
    positive,
    print_json,
)
from edgeclip.runtime.console import on_one_line
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES, Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.find_images import find_images
from edgeclip.runtime.inputs.text_files import labels_file, read_label_file, split_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("paths", type=Path, nargs="+", help="image files, or folders of them")
    parser.add_argument(
        "--labels",
        help="names separated by commas, a label set of the bundle, a file with a name on each "
        "line, or a label set's file (.npz) "
        "(default: the label set of the bundle's label head, or its only label set)",
    )
    parser.add_argument(
        "--template",
        action="append",
        help="sentence to embed a name in, at {}; may be repeated "
        f"(default: {DEFAULT_TEMPLATES[0]!r})",
    )
    parser.add_argument("--top", type=positive, default=5, help="labels per image (default: 5)")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read, and at files that would be left out",
    )
    add_json_option(parser)
    add_encoder_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the labels of each image."""
    paths = find_images(args.paths, strict=args.strict)
    encoder = open_encoder(args)
    if args.labels is not None and not args.labels.strip():
        raise InputError("--labels is empty: give names separated by commas, or a file of them")
    labels = read_labels(encoder, args.labels or _default_labels(encoder), args.template)
    embedded = embed_images(args, encoder, paths)
    answers = encoder.classify_embeddings(embedded.embeddings, labels, top=args.top)
    if args.json:
        images = {
            path.as_posix(): [dataclasses.asdict(item) for item in best]
            for path, best in zip(embedded.paths, answers, strict=True)
        }
        skipped = {path.as_posix(): reason for path, reason in embedded.skipped}
        print_json({"images": images, "skipped": skipped})
        return 0
    for path, best in zip(embedded.paths, answers, strict=True):
        print(on_one_line(path.as_posix()))
        for item in best:
            print(f"  {item.score:6.1%}  {item.label}")
    return 0


def _default_labels(encoder: Encoder) -> str:
    head, sets = encoder.bundle.manifest.label_head, encoder.bundle.label_names
    if head is not None:
        return head
    if len(sets) == 1:
        return sets[0]
    raise InputError(
        "this bundle has no label head: give the labels with --labels"
        + (f", such as {sets[0]}" if sets else "")
    )


def read_labels(encoder: Encoder, labels: str, templates: list[str] | None) -> LabelSet:
    """Load a label set from its file or from the bundle, or embed the given names.

    Raises:
        InputError: the file does not exist or cannot be read, or there are no names.
        SpaceMismatchError: the labels belong to another embedding space.
    """
    if labels.endswith(".npz"):
        return LabelSet.load(Path(labels))
    if labels in encoder.bundle.label_names:
        return encoder.bundle.labels(labels)
    file = labels_file(labels)
    names = split_names(labels) if file is None else read_label_file(file)
    return encoder.bake_labels(names, tuple(templates or DEFAULT_TEMPLATES))
