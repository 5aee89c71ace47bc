"""Student first, teacher for the unsure: certified quality, and the time it really takes.

The threshold is certified on test scenes of EmojiScenes; quality is looked at again on scenes
that nothing was chosen on. Time is measured with student, teacher and cascade taking turns on
the same pictures, from the bytes of a PNG file to the best entry of the index, all in one
process: no network is part of it. What counts is the mean over pictures; each picture's time is
the median of five passes, which takes out what other programs do. Each runs on one thread.
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from _bars import Bar, command, finish, options
from _cascade_case import FULL, QUICK, Case, open_case, say
from numpy.typing import NDArray

from edgeclip.compress.data.sources import Source
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.export.cascade.cascade_evaluator import CascadeEvaluator, query_bytes
from edgeclip.export.cascade.cascade_report import (
    CascadeReport,
    Costs,
    curve,
    curve_table,
    write_cascade_page,
)
from edgeclip.export.cascade.certify import (
    CascadePlan,
    CertificationResult,
    certify,
    choose_threshold,
)
from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.record.conditions import CpuSnapshot
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.certificate import PairedOutcomes
from edgeclip.runtime.cascade.scores import Margin, Similarities
from edgeclip.runtime.device.machine import detect_machine
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.quality.intervals import Interval, bootstrap, bootstrap_ratio

BOUND, DELTA, SLOWEST = 0.95, 0.05, 0.32
MORE_BOUNDS = (0.97, 0.98, 0.99)
STUDENT, TEACHER, CASCADE = "student", "teacher", "cascade"
WARM_UP, PASSES = 20, 5
CONTENDED = 0.1

Run = Callable[[bytes], int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Times:
    """Milliseconds of each picture, by who answered: float64 [N].

    `escalated` is the share of pictures that the cascade showed to the teacher, and `contended`
    whether other programs had more than a tenth of the CPU time; None if unknown.
    """

    ms: dict[str, NDArray[np.float64]]
    escalated: float
    contended: bool | None

    def ratio(self, name: str) -> Interval:
        """Mean time over the teacher's, paired by picture."""
        return bootstrap_ratio(self.ms[name], self.ms[TEACHER])


class Ways:
    """Three ways from the bytes of a picture to the best entry of an index.

    The index is the gallery and, in its last row, the caption of the picture that is asked
    about, as in the certificate.
    """

    def __init__(
        self, student: Encoder, teacher: Encoder, cascade: Cascade, gallery: FloatArray
    ) -> None:
        self._encoders = {STUDENT: student, TEACHER: teacher}
        self._cascade = cascade
        self._entries = np.concatenate([gallery, gallery[:1]])
        self.asked = 0

    def expect(self, caption: FloatArray) -> None:
        """Put the embedding [dim] of the next picture's caption into the index."""
        self._entries[-1] = caption

    def runs(self) -> dict[str, Run]:
        """Each way by its name."""
        return {
            STUDENT: lambda picture: self._best(self._embed(STUDENT, picture)),
            TEACHER: lambda picture: self._best(self._embed(TEACHER, picture)),
            CASCADE: self._cascaded,
        }

    def _embed(self, name: str, picture: bytes) -> FloatArray:
        encoder = self._encoders[name]
        return encoder.encode_pixels(crop_batch([picture], encoder.spec.image))

    def _best(self, embedding: FloatArray) -> int:
        return int((embedding @ self._entries.T).argmax())

    def _cascaded(self, picture: bytes) -> int:
        evidence = Similarities.between(self._embed(STUDENT, picture), self._entries)
        if self._cascade.select(evidence)[0]:
            self.asked += 1
            return self._best(self._embed(TEACHER, picture))
        return int(evidence.cosines.argmax())


def measure(case: Case, bundle: Bundle, gallery: FloatArray, count: int) -> Times:
    """Let student, teacher and cascade take turns; each pass has a cascade of its own."""
    pictures = png_files(case.fresh, count)
    captions = case.teacher.encode_text([case.fresh.caption(i) for i in range(len(pictures))])
    # On one thread each: with more, a busy neighbour costs the short runs most.
    device = replace(case.student.device, threads=1)
    student, teacher = Encoder(bundle, device), Encoder(case.teacher.bundle, device)
    passes, escalated = [], 0.0
    before = CpuSnapshot.take()
    for _ in range(PASSES):
        ways = Ways(student, teacher, Cascade.certified(student), gallery)
        passes.append(take_turns(ways, pictures, captions))
        escalated += ways.asked / len(pictures) / PASSES
    waiting, stolen = CpuSnapshot.take().denied_since(before)
    denied = [share for share in (waiting, stolen) if share is not None]
    ms = {name: np.median([each[name] for each in passes], axis=0) for name in passes[0]}
    contended = max(denied) > CONTENDED if denied else None
    return Times(ms=ms, escalated=escalated, contended=contended)


def take_turns(
    ways: Ways, pictures: Sequence[bytes], captions: FloatArray
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each picture each way; who begins changes from picture to picture."""
    runs = ways.runs()
    for name in (STUDENT, TEACHER):
        for picture in pictures[:WARM_UP]:
            runs[name](picture)
    names = list(runs)
    ms = {name: np.zeros(len(pictures)) for name in names}
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        ways.expect(caption)
        for at in round_order(len(names), number):
            start = time.perf_counter()
            runs[names[at]](picture)
            ms[names[at]][number] = 1e3 * (time.perf_counter() - start)
    return ms


def png_files(source: Source, count: int) -> list[bytes]:
    """The first pictures of a source as PNG files."""
    found = []
    for number in range(min(count, len(source))):
        file = io.BytesIO()
        source[number].image.save(file, format="PNG")
        found.append(file.getvalue())
    return found


def more_bounds(found: CertificationResult, fresh: PairedOutcomes, times: Times) -> str:
    """What other promises would cost, from the same answers; each is a certificate of its own.

    Their share of the teacher's time is reckoned: the student's, and the teacher's for those it is
    asked about.
    """
    lines = [f"{'asked for':>9}  {'escalated':>9}  {'kept, fresh':>20}  {'time, reckoned':>14}"]
    student = float(times.ms[STUDENT].mean() / times.ms[TEACHER].mean())
    for bound in (BOUND, *MORE_BOUNDS):
        chosen = choose_threshold(found.outcomes, found.grid, bound=bound, delta=DELTA)
        if chosen is None:
            lines.append(f"{bound:>9.0%}  nothing is certified")
            continue
        kept = bootstrap_ratio(fresh.correct(chosen.threshold), fresh.teacher)
        share = fresh.escalated_share(chosen.threshold)
        interval = f"{kept.value:.1%} [{kept.low:.1%}, {kept.high:.1%}]"
        lines.append(f"{bound:>9.0%}  {share:>9.1%}  {interval:>20}  {student + share:>14.1%}")
    return "\n".join(lines)


def report(
    case: Case, found: CertificationResult, fresh: PairedOutcomes, times: Times, page: Path | None
) -> None:
    """Print the whole curve, on the fresh scenes, and perhaps draw it."""
    certificate = found.certificate
    assert certificate is not None, "main ends before"
    costs = Costs(
        student_ms=float(times.ms[STUDENT].mean()),
        teacher_ms=float(times.ms[TEACHER].mean()),
        query_bytes=query_bytes(case.fresh, "image"),
    )
    points = curve(fresh, found.grid, certified=found.count, costs=costs)
    print(f"\n{len(fresh):,} fresh scenes, {case.eval_set.entry_count:,} captions to choose from:")
    print(curve_table(points, costs))
    print(f"\nmeasured over {len(times.ms[TEACHER])} pictures in one process:")
    for name, ms in times.ms.items():
        mean, ratio = bootstrap(ms), times.ratio(name)
        print(
            f"{name:<8} mean {mean.value:6.2f} ms [{mean.low:.2f}, {mean.high:.2f}], "
            f"{ratio.value:6.1%} of the teacher [{ratio.low:.1%}, {ratio.high:.1%}]"
        )
    print(f"escalated while measured: {times.escalated:.1%}")
    if times.contended:
        print("CONTENDED: other programs had more than 10% of the CPU time; measure again")
    print()
    print(more_bounds(found, fresh, times))
    print(f"\n{certificate.promise}\n")
    if page is not None:
        write_cascade_page(
            CascadeReport(
                title="emoji-student first, emoji-teacher for the unsure",
                verdict=certificate.promise,
                bound=BOUND,
                points=points,
                costs=costs,
                certificate=certificate,
                machine=detect_machine().cpu,
            ),
            page,
        )


def bars(found: CertificationResult, fresh: PairedOutcomes, times: Times) -> list[Bar]:
    """The bars; the first can only be missed where nothing is certified, see `main`."""
    certificate = found.certificate
    assert certificate is not None, "main ends before"
    kept = bootstrap_ratio(fresh.correct(certificate.threshold), fresh.teacher)
    latency = times.ratio(CASCADE)
    return [
        Bar(name="cascade_certified", value=certificate.bound, direction=">=", bound=BOUND),
        Bar(name="cascade_kept", value=kept.value, direction=">=", bound=BOUND, interval=kept),
        Bar(
            name="cascade_latency",
            value=latency.value,
            direction="<=",
            bound=SLOWEST,
            unit="of the teacher's mean",
            interval=latency,
        ),
    ]


def main() -> int:
    """Certify, check, measure."""
    parser = options(__doc__ or "")
    parser.add_argument("--page", type=Path, help="draw the curve into this HTML file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        case = open_case(Path(folder), QUICK if args.quick else FULL)
        plan = CascadePlan(
            student=case.student,
            teacher=case.teacher,
            eval_set=case.eval_set,
            score=Margin(),
            bound=BOUND,
            delta=DELTA,
            command=command(),
        )
        evaluator = CascadeEvaluator(case.student, case.teacher, case.eval_set, plan.score)
        found = certify(plan, evaluator)
        if found.certificate is None:
            print("nothing is certified")
            return finish(
                [Bar(name="cascade_certified", value=0, direction=">=", bound=BOUND)], args.out
            )
        made = found.certificate
        written = add_to_bundle(case.student.bundle, made.path, made.to_json().encode())
        say(f"asking both about {len(case.fresh)} fresh scenes")
        fresh = evaluator.paired_outcomes(case.fresh)
        say("measuring student, teacher and cascade")
        count = 200 if args.quick else 400
        times = measure(case, written, evaluator.entries.embeddings, count)
        report(case, found, fresh, times, args.page)
    means = {name: bootstrap(ms) for name, ms in times.ms.items()}
    told = {name: asdict(mean) for name, mean in means.items()}
    return finish(bars(found, fresh, times), args.out, ms=told, contended=times.contended)


if __name__ == "__main__":
    sys.exit(main())
