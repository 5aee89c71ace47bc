"""Folders of image files: find them, read their captions, embed them and skip damaged ones."""

import csv
import io
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.images import list_images
from edgeclip.runtime.inputs.preprocess import resize_and_crop

_log = logging.getLogger(__name__)
TABLE_NAME = "captions.csv"


@dataclass(frozen=True, slots=True)
class EmbeddedFiles:
    """Image files that were embedded, their embeddings float32 [N, dim], and files skipped.

    `skipped` holds (path, reason).
    """

    paths: tuple[Path, ...]
    embeddings: FloatArray
    skipped: tuple[tuple[Path, str], ...]


def find_images(paths: Iterable[Path]) -> tuple[Path, ...]:
    """List the image files at the given paths; a folder stands for all images under it.

    Raises:
        InputError: a path that does not exist, or a folder without images.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist: give image files or folders")
        found.update(dict.fromkeys(list_images(path) if path.is_dir() else (path,)))
    return tuple(found)


def embed_files(
    encoder: Encoder, paths: Sequence[Path], *, batch_size: int = 32, strict: bool = False
) -> EmbeddedFiles:
    """Embed image files, skipping those that cannot be read; shows a progress bar on stderr.

    Raises:
        InputError: with `strict`, the first file that cannot be read; else only if none can.
        EngineError: the engine failed.
    """
    kept: list[Path] = []
    parts: list[FloatArray] = []
    skipped: list[tuple[Path, str]] = []
    with tqdm(total=len(paths), desc="embed", unit="image", file=sys.stderr) as bar:
        for start in range(0, len(paths), batch_size):
            chunk = paths[start : start + batch_size]
            pixels = []
            for path in chunk:
                try:
                    pixels.append(resize_and_crop(path, encoder.spec.image))
                    kept.append(path)
                except InputError as error:
                    if strict:
                        raise
                    skipped.append((path, str(error)))
            if pixels:
                parts.append(encoder.encode_pixels(np.stack(pixels)))
            bar.update(len(chunk))
    if not parts:
        raise InputError(f"none of {len(paths)} images could be read; the first: {skipped[0][1]}")
    return EmbeddedFiles(tuple(kept), np.concatenate(parts), tuple(skipped))


def report_skipped(embedded: EmbeddedFiles) -> None:
    """Log each skipped file with the reason, and their number."""
    for _, reason in embedded.skipped:
        _log.info("skipped: %s", reason)
    if embedded.skipped:
        total = len(embedded.paths) + len(embedded.skipped)
        _log.info("skipped %d of %d images", len(embedded.skipped), total)


def read_captions(folder: Path, images: Sequence[Path]) -> tuple[str, ...] | None:
    """Return one caption for each image; None if the folder has no captions at all.

    `captions.csv` has a header with the columns `file` (relative to the folder) and `caption`.
    Without that file, `NAME.txt` beside `NAME.jpg` holds the caption.

    Raises:
        InputError: some images have a caption and others none, or the table is damaged, lists
            an image twice or one that does not exist.
    """
    table = folder / TABLE_NAME
    found = (
        _captions_of_table(table, images)
        if table.is_file()
        else [_caption_beside(path) for path in images]
    )
    missing = [path for path, caption in zip(images, found, strict=True) if not caption]
    if len(missing) == len(images):
        return None
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(images)} images have no caption, the first is "
            f"{missing[0].relative_to(folder)}: give every image one"
        )
    return tuple(found)


def _caption_beside(image: Path) -> str:
    beside = image.with_suffix(".txt")
    return _read_text(beside).strip() if beside.is_file() else ""


def _captions_of_table(table: Path, images: Sequence[Path]) -> list[str]:
    captions: dict[Path, str] = {}
    known = set(images)
    for line, row in _rows(table):
        image = table.parent / (row["file"] or "")
        if image in captions:
            raise InputError(f"{table}, line {line}: {row['file']} is listed twice")
        if image not in known:
            raise InputError(f"{table}, line {line}: {row['file']} is no image in this folder")
        captions[image] = (row["caption"] or "").strip()
    return [captions.get(image, "") for image in images]


def _rows(table: Path) -> Iterator[tuple[int, dict[str | Any, str | Any]]]:
    """Yield each row of a table with the number of its last line."""
    rows = csv.DictReader(io.StringIO(_read_text(table), newline=""), strict=True)
    line = 0
    try:
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise InputError(f"{table} needs a header with the columns file and caption")
        line = rows.line_num
        for row in rows:
            line = rows.line_num
            yield line, row
    except csv.Error as error:  # the reader may be far beyond the row that failed
        raise InputError(
            f"{table}, the row from line {line + 1} on: {error}; close every quote, and write "
            "it twice inside a quoted caption"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as UTF-8 text: {error}") from error
