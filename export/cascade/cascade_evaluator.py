"""Student and teacher answer the same queries: confidence, correctness, time and bytes."""

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeclip.compress.data.sources import FolderSource, Source
from edgeclip.export.cascade.cascade_eval_set import CascadeEvalSet, Entries
from edgeclip.export.cascade.cascade_report import Costs
from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, measure_interleaved
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.arrays import FloatArray, Values
from edgeclip.runtime.bundle.index import check_space
from edgeclip.runtime.cascade.certificate import Flags, PairedOutcomes
from edgeclip.runtime.cascade.scores import Margin, Score, Similarities, check_score, embed_views
from edgeclip.runtime.console import progress_bar
from edgeclip.runtime.device.link import LinkProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.quality.retrieval import TIE
from edgeclip.runtime.spec import Tower

IndexBy = Literal["teacher", "student"]
_AT_ONCE = 128  # queries whose cosines with all entries are held at a time


class CascadeEvaluator:
    """Asks a student and its teacher; what they choose from is embedded once.

    Args:
        student: on the device.
        teacher: on the server, in the same embedding space.
        questions: what both are asked.
        score: how sure the student is.
        index_by: who embeds what is chosen from. The teacher by itself always uses entries of
            its own.

    Raises:
        SpaceMismatchError: the two embedding spaces differ.
        InputError: a score that such queries do not have.
    """

    def __init__(
        self,
        student: Encoder,
        teacher: Encoder,
        questions: CascadeEvalSet,
        score: Score,
        index_by: IndexBy = "teacher",
    ) -> None:
        check_space(teacher.space, student.space, f"the bundle {student.bundle.path}")
        check_score(score, questions.query)
        self._student, self._teacher = student, teacher
        self._questions, self._score = questions, score
        self._indexer = teacher if index_by == "teacher" else student

    @functools.cached_property
    def _teachers_entries(self) -> Entries:
        return self._questions.entries(self._teacher)

    @functools.cached_property
    def entries(self) -> Entries:
        """What the student's queries choose from."""
        if self._indexer is self._teacher:
            return self._teachers_entries
        return self._questions.entries(self._indexer)

    def scores(self, source: Source) -> Values:
        """How sure the student is of its answers to a source's queries: float64 [N].

        Raises:
            InputError: a picture cannot be read.
            EngineError: a tower cannot be run.
        """
        wanted = self._questions.wanted(self._indexer, source, self.entries)
        return self._student_answers(source, wanted)[0]

    def trial(self, source: Source) -> PairedOutcomes:
        """What both answer to a source's queries.

        Raises:
            InputError: a picture cannot be read.
            EngineError: a tower cannot be run.
        """
        questions = self._questions
        wanted = questions.wanted(self._indexer, source, self.entries)
        scores, student = self._student_answers(source, wanted)
        queries, _ = questions.asked(self._teacher, source)
        escalated = teacher = _right(queries, self.entries, wanted)
        if self._indexer is not self._teacher:
            own = questions.wanted(self._teacher, source, self._teachers_entries)
            teacher = _right(queries, self._teachers_entries, own)
        return PairedOutcomes(scores=scores, student=student, escalated=escalated, teacher=teacher)

    def _student_answers(self, source: Source, wanted: Entries) -> tuple[Values, Flags]:
        queries, views = self._questions.asked(self._student, source, self._score.views)
        scores, right = [], []
        for evidence in _evidence(queries, views, self.entries, wanted):
            scores.append(self._score.of(evidence))
            right.append(_is_right(evidence))
        return np.concatenate(scores), np.concatenate(right)


def _right(queries: FloatArray, entries: Entries, wanted: Entries) -> Flags:
    found = [_is_right(evidence) for evidence in _evidence(queries, None, entries, wanted)]
    return np.concatenate(found)


def _is_right(evidence: Similarities) -> Flags:
    """Whether the wanted entry, which is the last, beats all others; a tie does not count."""
    others, own = evidence.cosines[:, :-1], evidence.cosines[:, -1]
    return np.asarray(own > others.max(axis=1) + TIE)


def _evidence(
    queries: FloatArray, views: FloatArray | None, entries: Entries, wanted: Entries
) -> Iterator[Similarities]:
    """Yield for some queries at a time their cosines with all other entries and the wanted one.

    An entry that has the wanted one's name is the wanted one itself, or another copy of it.
    """
    codes = {name: code for code, name in enumerate(entries.names)}
    columns = np.array([codes[name] for name in entries.names])
    own = np.array([codes.get(name, -1) for name in wanted.names])
    targets = entries.embeddings.astype(np.float64).T
    for start in range(0, len(queries), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        copies = own[part, None] == columns
        wide = queries[part].astype(np.float64)
        seen = np.zeros((0, *wide.shape)) if views is None else views[:, part].astype(np.float64)
        right = wanted.embeddings[part].astype(np.float64)
        yield Similarities(
            _cosines(wide, targets, right, copies),
            _cosines(seen, targets, right, copies),
            np.einsum("vnd,nd->vn", seen, wide),
        )


def _cosines(given: Values, targets: Values, right: Values, copies: Flags) -> Values:
    """Cosines [..., N, K] of `given` [..., N, dim] with the entries, the wanted one last.

    Where each query has one copy among the entries, as with labels, it is taken out.
    Otherwise copies are put out of reach, at -1.
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
    """A function from pictures or texts, object [N], to how sure the encoder is, float64 [N]."""

    def ask(queries: NDArray[Any]) -> NDArray[np.float64]:
        if query == "text":
            embeddings, views = encoder.encode_text(list(queries), truncate=True), None
        else:
            pixels = crop_batch(list(queries), encoder.spec.image)
            embeddings = encoder.encode_pixels(pixels)
            views = embed_views(encoder.encode_pixels, pixels, score.views)
        return score.of(Similarities.against(embeddings, entries.embeddings, views))

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
