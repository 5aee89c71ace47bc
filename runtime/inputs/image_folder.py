"""Embed image files, and skip damaged ones."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.inputs.bad_items import MaxBad, report_bad
from edgeclip.runtime.inputs.preprocess import resize_and_crop


@dataclass(frozen=True, slots=True)
class EmbeddedFiles:
    """Image files that were embedded, their embeddings float32 [N, dim], and files skipped.

    `skipped` holds (path, reason).
    """

    paths: tuple[Path, ...]
    embeddings: FloatArray
    skipped: tuple[tuple[Path, str], ...]


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


def report_skipped(embedded: EmbeddedFiles, limit: MaxBad | None = None) -> None:
    """Log the skipped files with the reasons, and their number.

    Raises:
        InputError: more were skipped than `limit` allows; None allows any number.
    """
    reasons = [reason for _, reason in embedded.skipped]
    report_bad(reasons, len(embedded.paths) + len(reasons), limit)
