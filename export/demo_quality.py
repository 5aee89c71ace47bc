"""How well teacher and student retrieve: embeddings of test scenes, ranks, gallery."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.batches import embed_source
from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import EmojiSource
from edgeclip.profiles.device import DeviceProfile
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.choose_precision import usable_precisions
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.intervals import Interval, bootstrap
from edgeclip.runtime.quality import Ranks, pair_ranks, retrieval_of_ranks
from edgeclip.runtime.reporting.report_data import (
    DirectionQuality,
    GalleryEntry,
    ModelQuality,
    Role,
    ShownAnswer,
)
from edgeclip.runtime.spec import Precision, Tower

TEACHER, STUDENT, SHIPPED = "teacher", "student ", "student as shipped"
Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """One model's embeddings of the test pairs, float32 [N, dim], and what they rank."""

    name: str
    role: Role
    image: Matrix
    text: Matrix
    ranks: Ranks

    @property
    def mean_r1(self) -> Interval:
        """R@1, mean of both directions, with its bootstrap interval over pairs."""
        return bootstrap(self.ranks.hits(1))


def evaluate(
    teacher: DualEncoder, bundle: Bundle, device: DeviceProfile, source: EmojiSource
) -> tuple[Embedded, ...]:
    """The teacher, then the student in each precision that both towers have, and as it ships.

    The last is left out if both towers ship in one precision; `shipped_name` says which it is.
    """
    image, text = (usable_precisions(item, device) for item in bundle.manifest.towers)
    both = [item for item in image if item in text]
    models = [_embed_with_torch(TEACHER, teacher, source)]
    models += [_embed_with_bundle(STUDENT + item, bundle, device, source, item) for item in both]
    if shipped_name(Encoder(bundle, device).precisions) == SHIPPED:
        models.append(_embed_with_bundle(SHIPPED, bundle, device, source))
    return tuple(models)


def shipped_name(shipped: Mapping[Tower, Precision]) -> str:
    """The name, among those of `evaluate`, of the student whose towers run in `shipped`."""
    chosen = set(shipped.values())
    return STUDENT + chosen.pop() if len(chosen) == 1 else SHIPPED


def evaluate_unseen(
    teacher: DualEncoder, bundle: Bundle, device: DeviceProfile, count: int
) -> tuple[Embedded, Embedded]:
    """Teacher and student as it ships, on scenes of emoji that no training showed."""
    source = EmojiSource("unseen", count, size=teacher.image_spec.size, distinct=True)
    return (
        _embed_with_torch(f"{TEACHER}, unseen emoji", teacher, source),
        _embed_with_bundle(f"{SHIPPED}, unseen emoji", bundle, device, source),
    )


def _embed_with_torch(name: str, model: DualEncoder, source: EmojiSource) -> Embedded:
    """Embed with the torch model, in full precision."""
    image, text = (part.numpy() for part in embed_source(model, source))
    return Embedded(name, "teacher", image, text, pair_ranks(image, text))


def _embed_with_bundle(
    name: str,
    bundle: Bundle,
    device: DeviceProfile,
    source: EmojiSource,
    precision: Precision | None = None,
) -> Embedded:
    """Embed as a device does: the bundle's towers on its engine, from pictures and texts."""
    encoder = Encoder(bundle, device, precision)
    numbers = range(len(source))
    image = encoder.encode_image([source[number].image for number in numbers])
    text = encoder.encode_text([source.caption(number) for number in numbers])
    return Embedded(name, "student", image, text, pair_ranks(image, text))


def quality_row(model: Embedded) -> ModelQuality:
    """The row of a report."""
    metrics = retrieval_of_ranks(model.ranks)
    rows = []
    for found, ranks in (
        (metrics.image_to_text, model.ranks.image_to_text),
        (metrics.text_to_image, model.ranks.text_to_image),
    ):
        rows.append(
            DirectionQuality(
                r1=bootstrap((ranks <= 1).astype(np.float64)),
                r5=found.r5,
                r10=found.r10,
                median_rank=found.median_rank,
                mean_rank=found.mean_rank,
            )
        )
    return ModelQuality(
        name=model.name, role=model.role, image_to_text=rows[0], text_to_image=rows[1]
    )


def gallery(
    source: EmojiSource, teacher: Embedded, student: Embedded, numbers: Iterable[int]
) -> tuple[GalleryEntry, ...]:
    """Test pictures with the three captions that each model finds nearest."""
    return tuple(
        GalleryEntry(
            picture=source.picture(number, size=192),
            caption=source.caption(number),
            teacher=_nearest(source, teacher, number),
            student=_nearest(source, student, number),
        )
        for number in numbers
    )


def failures(student: Embedded, *, most: int) -> list[int]:
    """Pictures whose caption the student ranks worst, among those it does not rank first."""
    ranks = student.ranks.image_to_text
    worst = np.argsort(-ranks, kind="stable")[:most]
    return [int(number) for number in worst if ranks[number] > 1]


def _nearest(source: EmojiSource, model: Embedded, number: int) -> tuple[ShownAnswer, ...]:
    scores = model.text @ model.image[number]
    return tuple(
        ShownAnswer(source.caption(int(at)), float(scores[at]), int(at) == number)
        for at in np.argsort(-scores)[:3]
    )
