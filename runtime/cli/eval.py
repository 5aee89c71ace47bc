"""`edgeclip eval`: measure a bundle's retrieval or zero-shot accuracy on a folder of images."""

import argparse
from pathlib import Path

import numpy as np

from edgeclip.runtime.cli.options import (
    add_encoder_options,
    add_json_option,
    embed_images,
    open_encoder,
    print_json,
)
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.captions import read_captions
from edgeclip.runtime.inputs.find_images import (
    add_max_bad_option,
    list_images,
)
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.quality.retrieval import (
    DirectionMetrics,
    label_ranks,
    pair_ranks,
    retrieval_of_ranks,
)
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "folder",
        type=Path,
        help="images, with captions.csv (columns file,caption) or NAME.txt beside each image; "
        "several captions of one image are all right answers, and so are equal captions",
    )
    parser.add_argument(
        "--labels",
        action="store_true",
        help="measure zero-shot accuracy instead: each class is a subfolder with its images",
    )
    parser.add_argument(
        "--template",
        action="append",
        help="sentence to embed a class name in, at {}; may be repeated "
        f"(default: {DEFAULT_TEMPLATES[0]!r})",
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="truncate captions that are too long (default: refuse)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first image that cannot be read, and at files that would be left out",
    )
    add_max_bad_option(parser)
    add_json_option(parser)
    add_encoder_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the accuracy."""
    return _zero_shot(args) if args.labels else _retrieval(args)


def _retrieval(args: argparse.Namespace) -> int:
    images = list_images(args.folder, strict=args.strict)
    captions = read_captions(args.folder, images, strict=args.strict)
    if captions is None:
        raise InputError(
            f"{args.folder} has no captions: write captions.csv with the columns file,caption, or "
            "NAME.txt beside each image; for a folder per class use --labels"
        )
    encoder = open_encoder(args)
    embedded = embed_images(args, encoder, images, args.max_bad)
    by_image = dict(zip(images, captions, strict=True))
    own = [by_image[path] for path in embedded.paths]
    texts, relevance = [text for captions in own for text in captions], Relevance.of_captions(own)
    if relevance.tells_nothing:
        raise InputError(
            f"{args.folder}: each caption is right for every image, so R@1 says nothing: give "
            "captions that tell the images apart"
        )
    text_embeddings = encoder.encode_text(texts, truncate=args.truncate, batch_size=args.batch_size)
    ranks = pair_ranks(embedded.embeddings, text_embeddings, relevance)
    found = retrieval_of_ranks(ranks)
    mean = estimate_share(ranks.hits(1)).interval
    directions = {
        "image to text": (found.image_to_text, estimate_share(ranks.image_hits(1)).interval),
        "text to image": (found.text_to_image, estimate_share(ranks.text_hits(1)).interval),
    }
    if args.json:
        rows = {name: _direction_json(*values) for name, values in directions.items()}
        counts = {"images": len(own), "captions": len(texts), "skipped": len(embedded.skipped)}
        print_json({**counts, "mean_r1": _interval_json(mean), **rows})
        return 0
    print(f"{len(own)} images, {len(texts)} captions; 95% intervals over the images")
    print(f"{'':<14}{'R@1':<24}{'R@5':>7}{'R@10':>8}{'median rank':>13}{'mean rank':>11}")
    for name, (metrics, interval) in directions.items():
        print(_direction_row(name, metrics, interval))
    print(f"{'mean R@1':<14}{_percent(mean)}")
    return 0


def _zero_shot(args: argparse.Namespace) -> int:
    images = list_images(args.folder, strict=args.strict)
    loose = [path for path in images if path.parent == args.folder]
    if loose:
        raise InputError(f"{loose[0]} is in no class: put each image into its class's subfolder")
    classes = sorted({_class_of(path, args.folder) for path in images})
    encoder = open_encoder(args)
    names = [name.replace("_", " ") for name in classes]
    labels = encoder.bake_labels(names, tuple(args.template or DEFAULT_TEMPLATES))
    embedded = embed_images(args, encoder, images, args.max_bad)
    right = np.array([classes.index(_class_of(path, args.folder)) for path in embedded.paths])
    ranks = label_ranks(embedded.embeddings, labels.embeddings, right)
    top1, top5 = (estimate_share(ranks <= k).interval for k in (1, 5))
    if args.json:
        counts = {
            "images": len(right),
            "classes": len(classes),
            "skipped": len(embedded.skipped),
        }
        print_json({**counts, "top1": _interval_json(top1), "top5": _interval_json(top5)})
        return 0
    print(f"{len(right)} images of {len(classes)} classes; 95% intervals")
    print(f"top-1  {_percent(top1)}\ntop-5  {_percent(top5)}")
    return 0


def _class_of(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0]


def _direction_row(name: str, metrics: DirectionMetrics, r1: Interval) -> str:
    return (
        f"{name:<14}{_percent(r1):<24}{metrics.r5:>7.1%}{metrics.r10:>8.1%}"
        f"{metrics.median_rank:>13.1f}{metrics.mean_rank:>11.1f}"
    )


def _direction_json(metrics: DirectionMetrics, r1: Interval) -> dict[str, object]:
    return {
        "r1": _interval_json(r1),
        "r5": metrics.r5,
        "r10": metrics.r10,
        "median_rank": metrics.median_rank,
        "mean_rank": metrics.mean_rank,
    }


def _interval_json(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"
