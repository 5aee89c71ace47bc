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
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from _bars import at_least, at_most, finish, options, say, span
from _cascade_case import BOUND, Case, open_case
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.record.conditions import CpuSnapshot
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.scores import Similarities
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.quality.intervals import bootstrap, bootstrap_ratio

SLOWEST = 0.32  # share of the teacher's mean time
STUDENT, TEACHER, CASCADE = "student", "teacher", "cascade"
FRESH_SEED = 1  # another endless sequence of the same split
WARM_UP, PASSES = 20, 5
CONTENDED = 0.1  # share of the CPU time that other programs had


def take_turns(
    encoders: dict[str, Encoder],
    gallery: FloatArray,
    pictures: Sequence[bytes],
    captions: FloatArray,
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each picture each way; who begins changes from picture to picture.

    The index is the gallery and, in its last row, the caption of the picture that is asked
    about, as in the certificate.
    """
    cascade = Cascade.certified(encoders[STUDENT])
    entries = np.concatenate([gallery, gallery[:1]])

    def embed(name: str, picture: bytes) -> FloatArray:
        encoder = encoders[name]
        return encoder.encode_pixels(crop_batch([picture], encoder.spec.image))

    def best(name: str, picture: bytes) -> int:
        return int((embed(name, picture) @ entries.T).argmax())

    def cascaded(picture: bytes) -> int:
        evidence = Similarities.between(embed(STUDENT, picture), entries)
        if cascade.select(evidence)[0]:
            return best(TEACHER, picture)
        return int(evidence.cosines.argmax())

    runs: dict[str, Callable[[bytes], int]] = {name: partial(best, name) for name in encoders}
    runs[CASCADE] = cascaded
    names = list(runs)
    for name in encoders:
        for picture in pictures[:WARM_UP]:
            runs[name](picture)
    ms = {name: np.zeros(len(pictures)) for name in names}
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        entries[-1] = caption
        for at in round_order(len(names), number):
            start = time.perf_counter()
            runs[names[at]](picture)
            ms[names[at]][number] = 1e3 * (time.perf_counter() - start)
    return ms


def measure(
    case: Case, bundle: Bundle, fresh: EmojiSource, count: int
) -> tuple[dict[str, NDArray[np.float64]], bool | None]:
    """Let student, teacher and cascade take turns; each pass has a cascade of its own.

    Milliseconds of each picture by who answered, float64 [N]; and whether other programs had more
    than a tenth of the CPU time, None if unknown.
    """
    pictures = []
    for number in range(count):
        fresh[number].image.save(file := io.BytesIO(), format="PNG")
        pictures.append(file.getvalue())
    captions = case.teacher.encode_text([fresh.caption(number) for number in range(count)])
    # On one thread each: with more, a busy neighbour costs the short runs most.
    device = replace(case.student.device, threads=1)
    encoders = {STUDENT: Encoder(bundle, device), TEACHER: Encoder(case.teacher.bundle, device)}
    gallery, before = case.evaluator.entries.embeddings, CpuSnapshot.take()
    passes = [take_turns(encoders, gallery, pictures, captions) for _ in range(PASSES)]
    denied = [share for share in CpuSnapshot.take().denied_since(before) if share is not None]
    ms = {name: np.median([each[name] for each in passes], axis=0) for name in passes[0]}
    return ms, max(denied) > CONTENDED if denied else None


def main() -> int:
    args = options(__doc__).parse_args()
    test, calibration, count = (1500, 400, 600) if args.quick else (2000, 1000, 3000)
    with tempfile.TemporaryDirectory() as folder:
        case = open_case(Path(folder), gallery=5000, calibration=calibration, test=test)
        certificate = case.found.certificate
        if certificate is None:
            print("nothing is certified")
            return finish([at_least("cascade_certified", 0, BOUND)], args.out)
        written = add_to_bundle(
            case.student.bundle, certificate.path, certificate.to_json().encode()
        )
        say(f"asking both about {count} fresh scenes ...")
        size = case.student.spec.image.size
        fresh = EmojiSource("test", count, size=size, seed=FRESH_SEED, distinct=True)
        outcomes = case.evaluator.paired_outcomes(fresh)
        say("measuring student, teacher and cascade ...")
        times, contended = measure(case, written, fresh, 200 if args.quick else 400)
    print(f"{certificate.promise}\n")
    for name, ms in times.items():
        share = span(bootstrap_ratio(ms, times[TEACHER]))
        print(f"{name:<8} mean {span(bootstrap(ms), 2)} ms, {share} of the teacher's")
    kept = bootstrap_ratio(outcomes.correct(certificate.threshold), outcomes.teacher)
    ratio = bootstrap_ratio(times[CASCADE], times[TEACHER])
    bars = [
        at_least("cascade_certified", certificate.bound, BOUND),
        at_least("cascade_kept", kept, BOUND),
        at_most("cascade_latency", ratio, SLOWEST, "of the teacher's mean"),
    ]
    means = {name: bootstrap(ms) for name, ms in times.items()}
    return finish(bars, args.out, ms=means, contended=contended)


if __name__ == "__main__":
    sys.exit(main())
