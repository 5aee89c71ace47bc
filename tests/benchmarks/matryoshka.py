"""What shorter and coarser embeddings keep of a student's own R@1, on scenes it never saw.

Two students of the demo's shape are distilled from one cache, without and with `dims`. Each form is
searched by the index itself, in both directions: rows of the index are reduced, queries are not
quantized, and of binary rows the nearest by their signs are scored again. Kept shares are paired
with the full embeddings of the same student; the teacher's rows searched by the student are what a
device does with an index that its server made. Beside the axes stand what they replace: the first
numbers of an embedding as they are, signs on the principal axes without a rotation, and with one
fitted to the signs (ITQ, Gong and Lazebnik, CVPR 2011).

`--quick` measures the student that is kept in the repository, which was not trained for it. Without
it, some 15 minutes on two cores.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bars import ROOT, Bar, Rule, finish, hold, options, say, span

from edgeclip.compress.built_in import built_in_teacher
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.students.student import StudentShape, new_student
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_basis import teacher_basis
from edgeclip.compress.teachers.teacher_cache import TeacherCache, build_cache, embed_source
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.arrays import FloatArray, Values
from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.bundle.reduced_index import AnyIndex, ReducedIndex
from edgeclip.runtime.bundle.reduction import ROW_TYPES, Basis, Form, Reducer
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.shares import estimate_kept, estimate_share

DIMS = (128, 64, 32, 16)
BARS: dict[str, Rule] = {
    "quarter_kept_*": (">=", 0.95, ""),
    "binary_kept_*": (">=", 0.9, ""),
    "binary_bytes": ("<=", 0.03125, "of float32"),
}
KEPT_MODELS = ("compress/emoji_teacher", "export/emoji_bundle")
_DIRECTIONS = ("image_to_text", "text_to_image")
_ITQ_STEPS = 20
_QUERIES = 20  # that are timed in each round
_ROUNDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Embeddings of the test pairs by one model, or by two: queries of one, rows of another."""

    name: str
    queries: tuple[FloatArray, FloatArray]  # of images and of texts
    rows: tuple[FloatArray, FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One form in the table; R@1 and kept shares in the order of `_DIRECTIONS`, then their mean."""

    model: str
    axes: str
    length: int
    dtype: str
    bytes: int
    r1: tuple[Interval, ...]
    kept: tuple[Interval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchTime:
    """Milliseconds of one search of one query, median of all, and of rows."""

    form: str
    rows: int
    ms: float


def hits(index: AnyIndex, queries: FloatArray) -> Values:
    """Whether each query finds the row of its number, alone on the first place."""
    found = []
    for number, best in enumerate(index.search(queries, 2)):
        alone = len(best) < 2 or best[0].score > best[1].score
        found.append(alone and best[0].key == str(number))
    return np.array(found, np.float64)


def reduced(rows: FloatArray, space: str, reducer: Reducer | None) -> AnyIndex:
    index = Index(tuple(map(str, range(len(rows)))), rows, space)
    return index if reducer is None else ReducedIndex.of(index, reducer)


def directions(item: Embedded, space: str, reducer: Reducer | None) -> tuple[Values, ...]:
    """Hits in both directions, and their mean."""
    images, texts = item.rows
    both = (
        hits(reduced(texts, space, reducer), item.queries[0]),
        hits(reduced(images, space, reducer), item.queries[1]),
    )
    return (*both, (both[0] + both[1]) / 2)


def fitted_rotation(rows: Values, seed: int = 0) -> Values:
    """Rotation that brings rows nearest to their signs, by alternating projections (ITQ)."""
    size = rows.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    for _ in range(_ITQ_STEPS):
        left, _, right = np.linalg.svd(np.sign(rows @ turn).T @ rows)
        turn = (left @ right).T
    found: Values = turn
    return found


def reducers(basis: Basis, rows: FloatArray) -> Iterator[tuple[str, Reducer]]:
    """Every form, then what the axes and the rotation replace."""
    dim, space = len(basis.axes), basis.space
    for form in basis.forms:
        yield "principal", basis.reducer(form)
    plain = np.eye(dim, dtype=np.float32)
    for length in basis.lengths[1:]:
        yield "none", Reducer(Form(length, "float32"), plain[:length], space)
    for length in (dim, dim // 4):
        form, axes = Form(length, "binary"), basis.axes[:length]
        yield "none", Reducer(form, plain[:length], space)
        yield "principal, not rotated", Reducer(form, axes, space)
        turn = fitted_rotation((rows @ axes.T).astype(np.float64))
        yield "principal, ITQ", Reducer(form, (turn.T @ axes).astype(np.float32), space)


def measure(item: Embedded, basis: Basis, rows: FloatArray) -> Iterator[Row]:
    full = directions(item, basis.space, None)
    dim = len(basis.axes)
    every: list[tuple[str, Reducer | None]] = [("all", None), *reducers(basis, rows)]
    for axes, reducer in every:
        found = full if reducer is None else directions(item, basis.space, reducer)
        form = Form(dim, "float32") if reducer is None else reducer.form
        shape, dtype = form.row
        row = Row(
            model=item.name,
            axes=axes,
            length=form.length,
            dtype=form.dtype,
            bytes=shape[0] * np.dtype(dtype).itemsize,
            r1=tuple(estimate_share(own).interval for own in found),
            kept=tuple(
                estimate_kept(own, whole).interval for own, whole in zip(found, full, strict=True)
            ),
        )
        print(
            f"{row.model:<26} {row.length:>4} {row.dtype:<8} {row.axes:<23} {row.bytes:>5} B  "
            f"R@1 {row.r1[0].value:.3f} {row.r1[1].value:.3f}  kept {span(row.kept[2])}",
            flush=True,
        )
        yield row


def search_times(rows: FloatArray, queries: FloatArray, basis: Basis) -> Iterator[SearchTime]:
    """Time the forms in turns, in one process, one query at a time."""
    indexes: dict[str, AnyIndex] = {"full float32": reduced(rows, basis.space, None)}
    for length in (len(basis.axes), len(basis.axes) // 4):
        for dtype in ROW_TYPES:
            form = Form(length, dtype)
            if form in basis.forms:
                indexes[str(form)] = reduced(rows, basis.space, basis.reducer(form))
    taken: dict[str, list[float]] = {name: [] for name in indexes}
    for _ in range(_ROUNDS):
        for name, index in indexes.items():
            for query in queries[:_QUERIES]:
                start = time.perf_counter()
                index.search(query[None], 10)
                taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        found = SearchTime(form=name, rows=len(rows), ms=1e3 * float(np.median(seconds)))
        print(f"{name:<14} {found.ms:8.3f} ms a query in {found.rows:,} rows")
        yield found


def bars(rows: Sequence[Row], model: str, dim: int) -> Iterator[Bar]:
    own = {
        (row.length, row.dtype): row
        for row in rows
        if (row.model, row.axes) == (model, "principal")
    }
    for name, form in (("quarter", (dim // 4, "float32")), ("binary", (dim, "binary"))):
        for direction, kept in zip(_DIRECTIONS, own[form].kept, strict=False):
            yield hold(BARS, f"{name}_kept_{direction}", kept)
    yield hold(BARS, "binary_bytes", own[dim, "binary"].bytes / (4 * dim))


def student_of(
    teacher: DualEncoder, cache: TeacherCache, scenes: EmojiSource, basis: Basis | None, out: Path
) -> DualEncoder:
    """Distil a student, with the losses at each length of a basis too."""
    student = new_student(teacher, StudentShape())
    student.basis = basis
    settings = TrainSettings(steps=300, batch_size=128)
    distill(student, cache, scenes, loss_weights=LossWeights(), settings=settings, out=out)
    return student


def embedded(name: str, model: DualEncoder, test: EmojiSource) -> Embedded:
    image, text = (part.numpy() for part in embed_source(model, test))
    return Embedded(name, (image, text), (image, text))


def kept_student(test: EmojiSource) -> Embedded:
    encoder = Encoder.open(ROOT / "export/emoji_bundle", precision="fp32")
    image = encoder.encode_image([test[number].image for number in range(len(test))])
    text = encoder.encode_text([test.caption(number) for number in range(len(test))])
    return Embedded("kept student", (image, text), (image, text))


def main() -> int:
    args = options(__doc__).parse_args()
    scenes_count, count = (512, 300) if args.quick else (12_288, 3_000)
    teacher = DualEncoder.load(built_in_teacher())
    size = teacher.image_spec.size
    scenes = EmojiSource("train", scenes_count, size=size)
    test = EmojiSource("test", count, size=size, distinct=True)
    with tempfile.TemporaryDirectory() as folder:
        say(f"the teacher's embeddings of {scenes_count:,} scenes")
        cache = build_cache(teacher, scenes, Path(folder) / "cache")
        basis = teacher_basis(cache, scenes, DIMS, space=teacher.space)
        every = list(range(scenes_count))
        seen = np.concatenate([cache.image(every), cache.text(every)]).astype(np.float32)
        seen /= np.linalg.norm(seen, axis=1, keepdims=True)
        models = [embedded("teacher", teacher, test)]
        if args.quick:
            models.append(kept_student(test))
        else:
            for name, own in (("student", None), ("student with dims", basis)):
                say(f"distilling: {name}")
                student = student_of(teacher, cache, scenes, own, Path(folder) / name)
                models.append(embedded(name, student, test))
    judged = models[-1]
    models.append(Embedded(f"{judged.name}, teacher's rows", judged.queries, models[0].rows))
    some = seen[:: max(1, len(seen) // 4096)]
    rows = [row for model in models for row in measure(model, basis, some)]
    times = tuple(search_times(seen, judged.queries[0], basis))
    found = {"rows": rows, "search": times, "test_scenes": count, "train_scenes": scenes_count}
    return finish([*bars(rows, judged.name, len(basis.axes))], args.out, **found)


if __name__ == "__main__":
    sys.exit(main())
