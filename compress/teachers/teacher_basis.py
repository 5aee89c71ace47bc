"""The principal axes of a teacher's embedding space, from its cached embeddings."""

from collections.abc import Iterable, Sequence

import numpy as np

from edgeclip.compress.data.sources import Source
from edgeclip.compress.teachers.teacher_cache import TeacherCache
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.bundle.reduction import Basis, make_basis

_MOST = 1 << 16  # pictures that are looked at, evenly spread
_AT_ONCE = 4096


def teacher_basis(
    cache: TeacherCache,
    source: Source,
    dims: Sequence[int],
    *,
    space: str,
    without: Iterable[int] = (),
) -> Basis:
    """Compute the basis by which embeddings of the teacher's space are cut to `dims`.

    Pictures and captions count alike, however many there are of each.

    Args:
        cache: the teacher's embeddings.
        source: what they are of.
        dims: the lengths.
        space: the fingerprint of the teacher's space.
        without: pictures that are left out, such as those held out of training.

    Raises:
        ConfigError: see `check_lengths`.
    """
    dim = cache.settings.dim
    bad = {*cache.unreadable, *without}
    chosen = np.linspace(0, len(source) - 1, min(len(source), _MOST)).astype(np.int64)
    indices = np.array([index for index in chosen.tolist() if index not in bad])
    moments: list[Values] = [np.zeros((dim, dim)), np.zeros((dim, dim))]
    counts = [0, 0]
    for first in range(0, len(indices), _AT_ONCE):
        part = indices[first : first + _AT_ONCE]
        rows = [cache.image(part.tolist())]
        if cache.settings.captions:
            rows.append(cache.text(part[cache.caption_counts(part.tolist()) > 0].tolist()))
        for number, own in enumerate(rows):
            wide = own.astype(np.float64)
            moments[number] += wide.T @ wide
            counts[number] += len(wide)
    moment = sum(
        (own / max(1, count) for own, count in zip(moments, counts, strict=True)),
        start=np.zeros((dim, dim)),
    )
    return make_basis(moment, space, dims)
