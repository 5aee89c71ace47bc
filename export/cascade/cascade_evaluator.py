"""Evaluate a cascade: let student and teacher answer the same queries, and measure their cost."""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.compress.data.clusters import ClusterBy, find_clusters
from edgeclip.compress.data.sources import FolderSource, Source
from edgeclip.export.cascade.cascade_eval_set import CascadeEvalSet, Entries, embed_pictures
from edgeclip.export.cascade.cascade_report import Costs
from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, measure_interleaved
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.arrays import FloatArray, Values
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.cascade.certificate import CertifiedLabels, Flags, PairedOutcomes
from edgeclip.runtime.cascade.scores import Margin, Score, Similarities, check_score, embed_views
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.link import LinkProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.quality.retrieval import TIE
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.clusters import Clusters

IndexBy = Literal["teacher", "student"]
_AT_ONCE = 128  # queries whose cosines with all entries are held at a time


class CascadeEvaluator:
    """Run student and teacher over an evaluation set; entries are embedded once.

    Args:
        student: the encoder on the device.
        teacher: the encoder on the server, in the same embedding space.
        eval_set: the labelled queries.
        score: the confidence score of the student's answers.
        index_by: which encoder embeds the entries. The teacher alone always uses its own.

    Raises:
        SpaceMismatchError: the two embedding spaces differ.
        InputError: the score is not defined for such queries.
    """

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        eval_set: CascadeEvalSet,
        score: Score,
        index_by: IndexBy = "teacher",
    ) -> None:
        check_space(teacher.space, student.space, f"the bundle {student.bundle.path}")
        check_score(score, eval_set.query)
        self._student, self._teacher = student, teacher
        self._eval_set, self._score = eval_set, score
        self._indexer = teacher if index_by == "teacher" else student
        self._pictures: dict[int, tuple[Source, FloatArray]] = {}

    @property
    def embedder(self) -> str:
        """Name of what embeds the entries, see `Encoder.embedder`."""
        return self._indexer.embedder("text" if self._eval_set.query == "image" else "image")

    @functools.cached_property
    def labels(self) -> CertifiedLabels | None:
        """The label sets of zero-shot classification; None in retrieval."""
        teachers = self._eval_set.bake_labels(self._teacher)
        if teachers is None:
            return None
        entries = teachers
        if self._indexer is not self._teacher:
            entries = self._eval_set.bake_labels(self._indexer) or teachers
        return CertifiedLabels(entries=entries, teacher=teachers)

    @functools.cached_property
    def _teachers_entries(self) -> Entries:
        labels = None if self.labels is None else self.labels.teacher
        return self._eval_set.embed_entries(self._teacher, labels)

    @functools.cached_property
    def entries(self) -> Entries:
        """The entries that the student's queries choose from."""
        if self._indexer is self._teacher:
            return self._teachers_entries
        labels = None if self.labels is None else self.labels.entries
        return self._eval_set.embed_entries(self._indexer, labels)

    def scores(self, source: Source) -> Values:
        """Confidence scores of the student's answers to a source's queries: float64 [N].

        Raises:
            InputError: a picture cannot be read.
            EngineError: a tower cannot be run.
        """
        answers = self._eval_set.embed_answers(self._indexer, source, self.entries)
        return self._student_answers(source, answers)[0]

    def clusters(self, source: Source, by: ClusterBy) -> Clusters | None:
        """Return which queries of a source belong together, int64 [N]; None if none do.

        By embedding, it is the teacher that finds them nearly the same: see `find_clusters`.

        Raises:
            ConfigError: the source has no folders.
            InputError: a picture cannot be read.
            EngineError: a tower cannot be run.
        """
        spec = self._teacher.spec.image

        def embed(pictures: Sequence[Image.Image]) -> FloatArray:
            return self._teacher.encode_pixels(crop_batch(list(pictures), spec))

        return find_clusters(
            source,
            by,
            embed=embed,
            embeddings=lambda: self._teachers_pictures(source),
            side=spec.size,
        )

    def _teachers_pictures(self, source: Source) -> FloatArray:
        """Embed the pictures of a source by the teacher, once."""
        if id(source) not in self._pictures:
            self._pictures[id(source)] = (source, embed_pictures(self._teacher, source)[0])
        return self._pictures[id(source)][1]

    def paired_outcomes(self, source: Source, clusters: Clusters | None = None) -> PairedOutcomes:
        """Answer a source's queries with student and teacher, and pair the outcomes.

        `clusters` are those of `clusters`.

        Raises:
            InputError: a picture cannot be read.
            EngineError: a tower cannot be run.
        """
        eval_set = self._eval_set
        answers = eval_set.embed_answers(self._indexer, source, self.entries)
        scores, student, first = self._student_answers(source, answers)
        if eval_set.query == "image":
            queries = self._teachers_pictures(source)
        else:
            queries, _ = eval_set.embed_queries(self._teacher, source)
        escalated, others = _answers(queries, self.entries, answers)
        teacher = escalated
        if self._indexer is not self._teacher:
            own = eval_set.embed_answers(self._teacher, source, self._teachers_entries)
            teacher, by_own = _answers(queries, self._teachers_entries, own)
            if eval_set.task == "zero-shot":  # the teacher brings its own labels
                escalated, others = teacher, by_own
        return PairedOutcomes(
            scores=scores,
            student=student,
            escalated=escalated,
            teacher=teacher,
            agree=first == others,
            clusters=clusters,
        )

    def _student_answers(
        self, source: Source, answers: Entries
    ) -> tuple[Values, Flags, NDArray[np.intp]]:
        """Return scores, whether the first entry is right, and which it is: all [N]."""
        queries, views = self._eval_set.embed_queries(self._student, source, self._score.views)
        scores, right, first = [], [], []
        for evidence in _evidence(queries, views, self.entries, answers):
            scores.append(self._score.of(evidence))
            right.append(_is_right(evidence))
            first.append(evidence.cosines.argmax(axis=1))
        return np.concatenate(scores), np.concatenate(right), np.concatenate(first)


def _answers(
    queries: FloatArray, entries: Entries, answers: Entries
) -> tuple[Flags, NDArray[np.intp]]:
    """Return whether the first entry of each query is right, and its column: both [N]."""
    right, first = [], []
    for evidence in _evidence(queries, None, entries, answers):
        right.append(_is_right(evidence))
        first.append(evidence.cosines.argmax(axis=1))
    return np.concatenate(right), np.concatenate(first)


def _is_right(evidence: Similarities) -> Flags:
    """Tell whether the right answer (the last column) beats all others; a tie does not count."""
    others, own = evidence.cosines[:, :-1], evidence.cosines[:, -1]
    return np.asarray(own > others.max(axis=1) + TIE)


def _evidence(
    queries: FloatArray, views: FloatArray | None, entries: Entries, answers: Entries
) -> Iterator[Similarities]:
    """Yield, in batches of queries, the cosines with all other entries and with the right answer.

    An entry with the name of the right answer is that answer itself, or another copy of it.
    """
    codes = {name: code for code, name in enumerate(entries.names)}
    columns = np.array([codes[name] for name in entries.names])
    own = np.array([codes.get(name, -1) for name in answers.names])
    targets = entries.embeddings.astype(np.float64).T
    for start in range(0, len(queries), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        copies = own[part, None] == columns
        wide = queries[part].astype(np.float64)
        seen = np.zeros((0, *wide.shape)) if views is None else views[:, part].astype(np.float64)
        right = answers.embeddings[part].astype(np.float64)
        yield Similarities(
            _cosines(wide, targets, right, copies),
            _cosines(seen, targets, right, copies),
            np.einsum("vnd,nd->vn", seen, wide),
        )


def _cosines(given: Values, targets: Values, right: Values, copies: Flags) -> Values:
    """Return cosines [..., N, K] of `given` [..., N, dim] with the entries, the right answer last.

    Where each query has one copy of its answer among the entries, as with labels, the copy is
    removed. Otherwise the cosines of copies are set to -1, so that they never win.
    """
    found = given @ targets
    if (copies.sum(axis=1) == 1).all():
        shape = (*found.shape[:-1], found.shape[-1] - 1)
        others = found[..., ~copies].reshape(shape)
    else:
        others = np.where(copies, -1.0, found)
    own = np.einsum("...nd,nd->...n", given, right)
    return np.concatenate([others, own[..., None]], axis=-1)


STUDENT, TEACHER = "student and score", "teacher"
_SIZED = 100  # queries whose bytes are averaged

ScoreFunction = Callable[[NDArray[Any]], NDArray[np.float64]]


def score_function(encoder: Encoder, query: Tower, score: Score, entries: Entries) -> ScoreFunction:
    """Make a function from pictures or texts, object [N], to confidence scores, float64 [N]."""

    def scores_of(queries: NDArray[Any]) -> NDArray[np.float64]:
        if query == "text":
            embeddings, views = encoder.encode_text(list(queries), truncate=True), None
        else:
            pixels = crop_batch(list(queries), encoder.spec.image)
            embeddings = encoder.encode_pixels(pixels)
            views = embed_views(encoder.encode_pixels, pixels, score.views)
        return score.of(Similarities.between(embeddings, entries.embeddings, views))

    return scores_of


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
    """Benchmark student and teacher on one decoded query, interleaved, up to the answer.

    Args:
        student: its time includes the score, with all views that the score needs.
        teacher: its time includes the choice among the entries.
        source: its first query is what runs.
        entries: what the queries choose from.
        query: the side of a pair that is the query.
        score: the confidence score.
        workload: how long to measure; only batch 1 is measured.
        link: the network that is added to the costs.

    Raises:
        EngineError: a tower cannot be run.
        InputError: the query cannot be read.
    """
    first = np.empty(1, dtype=object)
    first[0] = source[0].image if query == "image" else str(source.caption(0))
    candidates = (
        BenchmarkTarget(STUDENT, score_function(student, query, score, entries), first.repeat),
        BenchmarkTarget(TEACHER, score_function(teacher, query, Margin(), entries), first.repeat),
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
    """Return the mean size of a query as it is sent: its file, else a PNG, or the text."""
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
