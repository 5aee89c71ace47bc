"""What a query costs student and teacher on this machine: time, and bytes to send."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.sources import FolderSource, Source
from edgeclip.export.questions import Entries
from edgeclip.profiles.link import LinkProfile
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.cascade.cascade_curve import Costs
from edgeclip.runtime.cascade.scores import Evidence, Margin, Score
from edgeclip.runtime.cascade.views import embed_views
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.measuring.interleave import Candidate, measure_interleaved
from edgeclip.runtime.measuring.measurement import Measurement
from edgeclip.runtime.preprocess import crop_batch
from edgeclip.runtime.progress import progress_bar
from edgeclip.runtime.spec import Tower

STUDENT, TEACHER = "student and score", "teacher"
_SIZED = 100  # queries whose bytes are averaged

Ask = Callable[[NDArray[Any]], NDArray[np.float64]]


def asker(encoder: Encoder, query: Tower, score: Score, entries: Entries) -> Ask:
    """A function from pictures or texts, object [N], to how sure the encoder is, float64 [N]."""

    def ask(queries: NDArray[Any]) -> NDArray[np.float64]:
        if query == "text":
            embeddings, views = encoder.encode_text(list(queries), truncate=True), None
        else:
            pixels = crop_batch(list(queries), encoder.spec.image)
            embeddings = encoder.encode_pixels(pixels)
            views = embed_views(encoder.encode_pixels, pixels, score.views)
        return score.of(Evidence.against(embeddings, entries.embeddings, views))

    return ask


def measure_costs(
    student: Encoder,
    teacher: Encoder,
    source: Source,
    entries: Entries,
    *,
    query: Tower,
    score: Score,
    workload: Workload,
    link: LinkProfile | None = None,
) -> tuple[Costs, tuple[Measurement, ...]]:
    """Measure both on one query, taking turns: from the decoded query to the answer.

    Args:
        student: its time includes the score, with all views that this needs.
        teacher: its time includes the choice among the entries.
        source: its first query is what runs.
        entries: what is chosen from.
        query: the side of a pair that is asked with.
        score: how sure the student is.
        workload: how long to measure; only batch 1 is.
        link: the network that the costs count in.

    Raises:
        EngineError: a tower cannot be run.
        InputError: the query cannot be read.
    """
    first = np.empty(1, dtype=object)
    first[0] = source[0].image if query == "image" else str(source.caption(0))
    candidates = (
        Candidate(STUDENT, asker(student, query, score, entries), first.repeat),
        Candidate(TEACHER, asker(teacher, query, Margin(), entries), first.repeat),
    )
    single = replace(workload, batch_sizes=(1,), cold_starts=0)
    with progress_bar("latency") as progress:
        measured = measure_interleaved(
            candidates, single, part=query, reference=TEACHER, progress=progress
        )
    costs = Costs(
        student_ms=measured[0].latency.p50_ms.value,
        teacher_ms=measured[1].latency.p50_ms.value,
        query_bytes=query_bytes(source, query),
        link=link,
    )
    return costs, measured


def query_bytes(source: Source, query: Tower) -> float:
    """Mean size of a query as it is sent: the file as it is, a drawn picture as PNG, a text."""
    numbers = range(min(_SIZED, len(source)))
    if query == "text":
        sizes = [len(str(source.caption(number)).encode()) for number in numbers]
    elif isinstance(source, FolderSource):
        sizes = [source.paths[number].stat().st_size for number in numbers]
    else:
        sizes = [_png_bytes(source, number) for number in numbers]
    return float(np.mean(sizes))


def _png_bytes(source: Source, number: int) -> int:
    file = io.BytesIO()
    source[number].image.save(file, format="PNG")
    return len(file.getvalue())
