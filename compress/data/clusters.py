"""Find pictures that are not independent: of one folder, of one moment, or nearly the same."""

import logging
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from edgeclip.compress.data.near_duplicates import Embed, copies_cosine
from edgeclip.compress.data.sources import FolderSource, Source
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.stats.clusters import Clusters

_log = logging.getLogger(__name__)

ClusterBy = Literal["folder", "time", "embedding", "none"]
# What is assumed of pictures of different clusters.
ASSUMED: dict[ClusterBy, str] = {
    "folder": "pictures of different folders are independent",
    "time": "pictures of different folders, or taken more than a minute apart, are independent",
    "embedding": "pictures that are not nearly the same are independent",
    "none": "all pictures are independent",
}
_SECONDS = 60  # between pictures of one moment
_EXIF_IFD, _TIME_ORIGINAL = 0x8769, 0x9003  # EXIF 2.32, "DateTimeOriginal"
_BLOCK = 2048  # pictures that are compared at a time


def find_clusters(
    source: Source,
    by: ClusterBy,
    *,
    embed: Embed,
    embeddings: Callable[[], FloatArray],
    side: int,
) -> Clusters | None:
    """Return which pictures of a source belong together, int64 [N]; None if none do.

    By embedding, two pictures do that a model finds as alike as a picture and its copy
    (`copies_cosine`).

    Args:
        source: the pictures.
        by: how it is told.
        embed: embeds pictures, by embedding.
        embeddings: those of all pictures, L2-normalised [N, dim], by embedding.
        side: pixels that the model sees.

    Raises:
        ConfigError: no folder of pictures, by folder or time.
    """
    if by == "none":
        return None
    if by == "folder":
        return folder_clusters(source)
    if by == "time":
        return time_clusters(source)
    threshold = copies_cosine(source, range(len(source)), embed, side=side)
    found = embedding_clusters(embeddings(), threshold)
    _log.info(
        "%d pictures are %d independent groups: nearly the same are those with a cosine of "
        "%.3f or more",
        len(found),
        len(np.unique(found)),
        threshold,
    )
    return found


def folder_clusters(source: Source) -> Clusters:
    """Return a number for each picture, the same for those of one folder: int64 [N].

    Raises:
        ConfigError: the source is no folder of pictures.
    """
    return _numbered([path.parent for path in _paths(source)])


def time_clusters(source: Source) -> Clusters:
    """Return a number for each picture, the same for those taken in one go: int64 [N].

    Pictures of one folder belong together where each was taken within 60 s of the one before, by
    EXIF's DateTimeOriginal. A picture without a time is a cluster of its own; how many there are is
    logged.

    Raises:
        ConfigError: the source is no folder of pictures.
    """
    paths = _paths(source)
    found = np.arange(len(paths), dtype=np.int64)
    taken = [(path.parent, time, at) for at, path in enumerate(paths) if (time := _time(path))]
    taken.sort(key=lambda item: (str(item[0]), item[1], item[2]))
    for (folder, earlier, before), (other, later, at) in pairwise(taken):
        if folder == other and (later - earlier).total_seconds() <= _SECONDS:
            found[at] = found[before]
    without = len(paths) - len(taken)
    if without:
        _log.info(
            "%d of %d pictures of %s have no time in their EXIF data: each counts as independent",
            without,
            len(paths),
            source.name,
        )
    return found


def embedding_clusters(embeddings: FloatArray, threshold: float) -> Clusters:
    """Return a number for each picture, the same for those nearly the same: int64 [N].

    Two pictures belong together if the cosine of their embeddings is at least `threshold`, or if
    others between them join them (connected components). All pairs are compared.

    Args:
        embeddings: floats [N, dim], L2-normalised.
        threshold: the least cosine, such as `near_duplicates.copies_cosine` finds it.
    """
    found = np.arange(len(embeddings), dtype=np.int64)
    wide = embeddings.astype(np.float32)
    for first in range(0, len(wide), _BLOCK):
        rows, columns = np.nonzero(
            wide[first : first + _BLOCK] @ wide[: first + _BLOCK].T >= threshold
        )
        for one, other in zip((rows + first).tolist(), columns.tolist(), strict=True):
            if other < one:
                _join(found, one, other)
    return np.array([_root(found, at) for at in range(len(found))], dtype=np.int64)


def _root(parents: Clusters, at: int) -> int:
    """Follow the parents of an item to the first of its cluster, and shorten the way."""
    root = at
    while parents[root] != root:
        root = int(parents[root])
    while parents[at] != root:
        parents[at], at = root, int(parents[at])
    return root


def _join(parents: Clusters, one: int, other: int) -> None:
    first, second = sorted((_root(parents, one), _root(parents, other)))
    parents[second] = first


def _paths(source: Source) -> list[Path]:
    if not isinstance(source, FolderSource):
        raise ConfigError(
            f"{source.name} is no folder of pictures, so neither folders nor times tell which "
            "belong together: take --cluster-by embedding or none"
        )
    return list(source.paths)


def _numbered(keys: list[Path]) -> Clusters:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def _time(path: Path) -> datetime | None:
    """Return when a picture was taken; None where it does not say so."""
    try:
        with Image.open(path) as image:
            exif = image.getexif()
            text = exif.get_ifd(_EXIF_IFD).get(_TIME_ORIGINAL)
        return datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except (OSError, ValueError, SyntaxError):  # no picture for Pillow, or damaged
        return None
