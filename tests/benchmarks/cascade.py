"""Student first, teacher for the unsure: certified quality, and the time it really takes.

The task is to find the caption of a picture of EmojiScenes among 1,001, embedded by the teacher.
The threshold is certified on test scenes; quality is looked at again on scenes that nothing was
chosen on. Time is measured with student, teacher and cascade taking turns on the same pictures,
from the bytes of a PNG file to the best entry of the index, all in one process: no network is part
of it, and what one would add is told beside it, by profiles of links. What counts is the mean over
pictures; each picture's time is the median of five passes, which takes out what other programs do.
Each runs on one thread.

The example of docs/server.md is run as it stands there, commands and programs, and what it answers
about its 1,000 pictures is held against what it promises.
"""

import io
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _bars import EMOJI_BUNDLE, ROOT, Bar, Rule, finish, hold, options, say, span
from _cascade_case import Case, open_case
from _processes import SERVE, ServerProcess
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.export.bundle.add_to_bundle import add_to_bundle
from edgeclip.export.cascade.cascade_evaluator import query_bytes
from edgeclip.export.cascade.cascade_report import Costs
from edgeclip.profiles.measure.interleaved_runs import round_order
from edgeclip.profiles.record.conditions import CpuSnapshot
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.cascade.cascade import Cascade
from edgeclip.runtime.cascade.certificate import CertificateError
from edgeclip.runtime.cascade.scores import Similarities
from edgeclip.runtime.cli.main import main as edgeclip
from edgeclip.runtime.device.link import load_link
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.stats.shares import estimate_kept
from edgeclip.runtime.stats.student_t import estimate_mean, estimate_mean_ratio

BARS: dict[str, Rule] = {
    "documented_example_kept": (">=", None, ""),  # what its certificate promises
    "cascade_certified": (">=", 0.95, ""),
    "cascade_kept": (">=", 0.95, ""),
    "cascade_latency": ("<=", 0.20, "of the teacher's mean, without a network"),
}
KEPT_MODELS = ("export/emoji_bundle",)
LINKS = ("lan", "wifi", "lte")
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
    cascade = Cascade.certified(encoders[STUDENT], state=None)
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


def run_example(folder: Path) -> Bar:
    """Follow "in one go" of docs/server.md in `folder`; the share of the teacher's quality kept.

    The bar is what its certificate promises. A refusal counts as kept: nothing was answered.
    """
    from tests.test_documents import blocks

    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    commands, on_workstation, on_device, *_ = blocks(text)
    (folder / "compress").symlink_to(ROOT / "compress")
    shutil.copytree(EMOJI_BUNDLE, folder / "runs" / "demo" / "bundle")
    os.environ["EDGECLIP_STATE"] = str(folder / "state")
    with chdir(folder):
        for words in commands.commands:
            if words[1] == "serve":
                served = [str(folder / words[2]), *words[3:]]
                continue
            say(shlex.join(words))
            if edgeclip(words[1:]) != 0:
                raise RuntimeError(f"{shlex.join(words)} failed")
        found: dict[str, Any] = {}
        exec(compile(on_workstation.code, "docs/server.md", "exec"), found)
        device = on_device.code
        with ServerProcess([*SERVE, *served]) as server:
            say(f"asking about the pictures of {folder / 'scenes'} ...")
            device = device.replace("http://127.0.0.1:8000", server.url)
            try:
                exec(compile(device, "docs/server.md", "exec"), found)
            except CertificateError as refusal:
                print(f"the example of docs/server.md is refused: {refusal}")
                return hold(BARS, "documented_example_kept", 1.0, 0.0)
        teacher, captions = found["teacher"], found["captions"]
        alone = teacher.search(found["pictures"], found["index"], top=1)
        certificate = found["escalation"].cascade.certificate
    replies = [reply.value[0] for reply in found["replies"]]
    ours, theirs = (
        np.array([hits[0].key == caption for hits, caption in zip(each, captions, strict=True)])
        for each in (replies, alone)
    )
    degraded = sum(reply.degraded is not None for reply in found["replies"])
    print(
        f"the example of docs/server.md: {ours.sum()} of {len(ours)} right, the teacher "
        f"{theirs.sum()}; {degraded} without the teacher who should have been asked"
    )
    kept = estimate_kept(ours, theirs).interval
    return hold(BARS, "documented_example_kept", kept, certificate.bound)


def with_network(
    times: dict[str, NDArray[np.float64]], share: float, size: float
) -> dict[str, float]:
    """The cascade's mean time as a share of the teacher's with each link, by its profile."""
    found = {}
    for name in LINKS:
        costs = Costs(
            student_ms=float(times[STUDENT].mean()),
            teacher_ms=float(times[TEACHER].mean()),
            query_bytes=size,
            link=load_link(name),
        )
        found[name] = costs.mean_ms(share) / costs.always_ms
        print(
            f"with {name}, {costs.link_ms:.1f} ms a query: {found[name]:.3f} of the time that the "
            "teacher takes with it"
        )
    return found


def main() -> int:
    args = options(__doc__).parse_args()
    test, calibration, count = (1500, 400, 600) if args.quick else (4000, 1000, 3000)
    with tempfile.TemporaryDirectory() as folder:
        example = run_example(Path(folder))
        case = open_case(
            Path(folder),
            gallery=1000,
            calibration=calibration,
            test=test,
            teacher=Path(folder) / "teacher",
        )
        certificate = case.found.certificate
        if certificate is None:
            print("nothing is certified")
            return finish([example, hold(BARS, "cascade_certified", 0.0)], args.out)
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
        share = span(estimate_mean_ratio(ms, times[TEACHER]).interval)
        print(f"{name:<8} mean {span(estimate_mean(ms).interval, 2)} ms, {share} of the teacher's")
    kept = estimate_kept(outcomes.correct(certificate.threshold), outcomes.teacher).interval
    ratio = estimate_mean_ratio(times[CASCADE], times[TEACHER]).interval
    escalated = outcomes.escalated_share(certificate.threshold)
    network = with_network(times, escalated, query_bytes(fresh, "image"))
    bars = [
        example,
        hold(BARS, "cascade_certified", certificate.bound),
        hold(BARS, "cascade_kept", kept),
        hold(BARS, "cascade_latency", ratio),
    ]
    means = {name: estimate_mean(ms).interval for name, ms in times.items()}
    return finish(
        bars,
        args.out,
        task=certificate.task,
        escalated=escalated,
        ms=means,
        with_network=network,
        contended=contended,
    )


if __name__ == "__main__":
    sys.exit(main())
