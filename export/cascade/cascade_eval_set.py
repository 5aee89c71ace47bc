"""Build the labelled queries that a cascade is certified on (retrieval or zero-shot)."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.data.sources import FolderSource, Source, captions_of
from edgeclip.export.graph.embedders import check_captions
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.cascade.certificate import Task
from edgeclip.runtime.cascade.scores import embed_views
from edgeclip.runtime.encoder import DEFAULT_TEMPLATES, Encoder
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.find_images import MaxBad
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.quality.relevance import caption_key
from edgeclip.runtime.spec import Tower

_BATCH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Names and embeddings of K entries: what queries choose from, or their right answers.

    `embeddings` is float32 [K, dim], L2-normalised; a name may occur several times.
    """

    names: tuple[str, ...]
    embeddings: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CascadeEvalSet:
    """Queries with known answers for a cascade, in a calibration and a test part without overlap.

    In retrieval the query is one side of a pair, and the entries are that pair's other side and
    the other sides of all `gallery` pairs. So an answer depends on its own pair alone, and the
    answers to independently drawn pairs are independent. In zero-shot classification a picture
    chooses between all labels.

    Attributes:
        query: the side of a pair that is the query.
        calibration: pairs whose scores become the candidate thresholds.
        test: pairs that the thresholds are tested on.
        gallery: pairs whose other sides all queries choose from; None for zero-shot.
        labels: names of the classes, for zero-shot; the class of a picture is its folder.
        templates: sentences around a label.

    Raises:
        ConfigError: a part without captions or with too few pairs, or fewer than two labels.
    """

    query: Tower
    calibration: Source
    test: Source
    gallery: Source | None = None
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def __post_init__(self) -> None:
        if self.gallery is None and (self.query == "text" or len(self.labels) < 2):
            raise ConfigError("classification is of pictures, with two labels or more")
        if self.gallery is not None:
            for source in (self.calibration, self.test):
                check_captions(source, "retrieval (without --labels)")

    @property
    def task(self) -> Task:
        """The kind of task."""
        return "zero-shot" if self.gallery is None else "retrieval"

    @property
    def entry_count(self) -> int:
        """The number of entries that a query chooses from."""
        return len(self.labels) if self.gallery is None else len(self.gallery) + 1

    @property
    def identity(self) -> str:
        """SHA-256 over the identities of queries and entries, 64 hex digits."""
        parts = (self.query, self.calibration.identity, self.test.identity, self.entries_identity)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def entries_identity(self) -> str:
        """A string that changes whenever the entries do."""
        gallery = "" if self.gallery is None else self.gallery.identity
        return "\n".join((gallery, *self.labels, *self.templates))

    def bake_labels(self, encoder: Encoder) -> LabelSet | None:
        """Embed the labels that all pictures choose from; None in retrieval."""
        if self.gallery is not None:
            return None
        return encoder.bake_labels(self.labels, self.templates)

    def embed_entries(self, encoder: Encoder, labels: LabelSet | None) -> Entries:
        """Embed the entries that all queries choose from; `labels` are those of `bake_labels`."""
        if self.gallery is None:
            assert labels is not None
            return Entries(labels.names, labels.embeddings)
        return Entries(_keys(self.gallery), self._embed_other_side(encoder, self.gallery))

    def embed_answers(self, encoder: Encoder, source: Source, entries: Entries) -> Entries:
        """Embed the right answer to each query of a source, in the order of the queries.

        `entries` must come from the same encoder.
        """
        if self.gallery is not None:
            return Entries(_keys(source), self._embed_other_side(encoder, source))
        names = _classes(source)
        rows = [self.labels.index(name) for name in names]
        return Entries(names, entries.embeddings[rows])

    def embed_queries(
        self, encoder: Encoder, source: Source, views: int = 0
    ) -> tuple[FloatArray, FloatArray | None]:
        """Embed the queries of a source, and `views` augmented views of each.

        Returns:
            float32 [N, dim], and float32 [views, N, dim] or None.
        """
        if self.query == "image":
            return embed_pictures(encoder, source, views)
        return embed_captions(encoder, source), None

    def _embed_other_side(self, encoder: Encoder, source: Source) -> FloatArray:
        """Embed the side of each pair that is not the query."""
        if self.query == "image":
            return embed_captions(encoder, source)
        return embed_pictures(encoder, source)[0]


def retrieval_eval_set(
    data: str,
    query: Tower,
    *,
    calibration: int,
    test: int,
    gallery: int,
    size: int,
    strict: bool = False,
    max_bad: MaxBad | None = None,
) -> CascadeEvalSet:
    """Make a retrieval set from pairs of `--data`; the counts apply to emoji scenes.

    A folder is divided as in `open_source`, and its calibration part is the gallery. Of a picture
    with several captions the first counts: an answer is one other side, not one of several.
    """
    opened = functools.partial(open_source, data, size=size, strict=strict, max_bad=max_bad)
    return CascadeEvalSet(
        query=query,
        calibration=opened(split="calibration", count=calibration),
        test=opened(split="test", count=test),
        gallery=opened(split="calibration", count=gallery),
    )


def zero_shot_eval_set(
    folder: str,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    size: int,
    strict: bool = False,
    max_bad: MaxBad | None = None,
) -> CascadeEvalSet:
    """Make a zero-shot set from a folder with one subfolder of pictures for each class.

    The folder is divided as in `open_source`.

    Raises:
        ConfigError: not a folder, or fewer than two classes.
    """
    opened = functools.partial(
        open_source, folder, count=0, size=size, strict=strict, max_bad=max_bad
    )
    calibration, test = opened(split="calibration"), opened(split="test")
    return CascadeEvalSet(
        query="image",
        calibration=calibration,
        test=test,
        labels=tuple(sorted({*_classes(calibration), *_classes(test)})),
        templates=tuple(templates),
    )


def embed_pictures(
    encoder: Encoder, source: Source, views: int = 0
) -> tuple[FloatArray, FloatArray | None]:
    """Embed all pictures of a source, and `views` augmented views of each.

    Returns:
        float32 [N, dim], and float32 [views, N, dim] or None.
    """
    found, seen = [], []
    for start in range(0, len(source), _BATCH):
        numbers = range(start, min(start + _BATCH, len(source)))
        pixels = crop_batch([source[number].image for number in numbers], encoder.spec.image)
        found.append(encoder.encode_pixels(pixels))
        views_of = embed_views(encoder.encode_pixels, pixels, views)
        seen += [] if views_of is None else [views_of]
    return np.concatenate(found), np.concatenate(seen, axis=1) if seen else None


def embed_captions(encoder: Encoder, source: Source) -> FloatArray:
    """Embed all captions of a source, too long ones cut: float32 [N, dim]."""
    return encoder.encode_text(_captions(source), truncate=True)


def _keys(source: Source) -> tuple[str, ...]:
    return tuple(map(caption_key, _captions(source)))


def _captions(source: Source) -> tuple[str, ...]:
    return tuple(captions_of(source, range(len(source))))


def _classes(source: Source) -> tuple[str, ...]:
    """Return the class of each picture, which is the name of its folder."""
    if not isinstance(source, FolderSource):
        raise ConfigError("classification needs a folder of pictures, in a subfolder per class")
    return tuple(Path(path).parent.name.replace("_", " ") for path in source.paths)
