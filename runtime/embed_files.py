"""Embedding of image files, where one damaged file must not stop the others."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.load_image import list_images
from edgeclip.runtime.preprocess import resize_and_crop


@dataclass(frozen=True, slots=True)
class EmbeddedFiles:
    """The files that could be read, their embeddings (float32 [N, dim]), and the others.

    `skipped` holds (path, reason).
    """

    paths: tuple[Path, ...]
    embeddings: NDArray[np.float32]
    skipped: tuple[tuple[Path, str], ...]


def find_images(paths: Iterable[Path]) -> tuple[Path, ...]:
    """List image files: a folder stands for all images under it, a file for itself.

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
    """Embed image files with a progress bar on stderr, setting aside those it cannot read.

    Raises:
        InputError: with `strict` the first file that cannot be read; else only if none can.
        EngineError: the engine failed.
    """
    kept: list[Path] = []
    parts: list[NDArray[np.float32]] = []
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
    """Name the skipped files and count them on stderr."""
    for _, reason in embedded.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    if embedded.skipped:
        total = len(embedded.paths) + len(embedded.skipped)
        print(f"skipped {len(embedded.skipped)} of {total} images", file=sys.stderr)
