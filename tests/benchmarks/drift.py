"""Does the watch raise no false alarms, however often it starts, and does it find what changes?

False alarms: devices that start 30 times, each with a certificate of its own and a state that is
saved at every end; their queries are margins of real test scenes in random order, from which the
certificates are drawn as well. Detection: such a stream that turns, after 200 pictures, into scenes
with noise, blur, little light, or emoji that no training showed. Slight noise and blur cost few
answers: how often they are found is told, not held.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from _bars import Rule, finish, hold, options, say
from _cascade_case import Case, open_case
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from edgeclip.compress.data.sources import EmojiSource, Pair, Source
from edgeclip.export.cascade.certify import watched_shares
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.cascade.certificate import Certificate
from edgeclip.runtime.cascade.drift import DriftRule, DriftWatch
from edgeclip.runtime.stats.percentiles import estimate_percentile
from edgeclip.runtime.stats.shares import estimate_share

Alter = Callable[[Image.Image, np.random.Generator], Image.Image]

ALPHA = 0.05  # of the bar; so many streams tell 1% from 0.8% by chance only
STARTS = 30
BEFORE = 200  # pictures without a shift
WITHIN = 150  # pictures in which a shift is to be found
BARS: dict[str, Rule] = {
    "drift_false_alarms_30_starts": ("<=", 0.05, ""),
    "drift_found_*": (">=", 0.98, ""),
}
KEPT_MODELS = ("export/emoji_bundle",)


class Altered:
    """The pairs of a source with their pictures altered, the same each time."""

    has_captions = True

    def __init__(self, source: Source, name: str, alter: Alter) -> None:
        self._source, self._alter = source, alter
        self.name = f"{source.name}, {name}"
        self.split = source.split
        self.identity = f"{source.identity}:{name}"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        pair = self._source[index]
        return Pair(self._alter(pair.image, np.random.default_rng(index)), pair.caption)

    def caption(self, index: int) -> str | None:
        return self._source.caption(index)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._source.captions(index)

    def content(self, index: int) -> str:
        return hashlib.sha256(f"{self.identity}:{index}".encode()).hexdigest()


def noise(levels: float) -> Alter:
    """Gaussian noise, as of a small sensor at night."""

    def alter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        noisy = np.asarray(image) + rng.normal(0, levels, (image.height, image.width, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))

    return alter


ALTERS: dict[str, Alter] = {
    "slight noise": noise(30),
    "slight blur": lambda image, _: image.filter(ImageFilter.GaussianBlur(1.2)),
    "noise": noise(50),
    "blur": lambda image, _: image.filter(ImageFilter.GaussianBlur(3)),
    "dark": lambda image, _: ImageEnhance.Brightness(image).enhance(0.6),
}


def false_alarms(
    calibration: Values, scores: Values, folder: Path, streams: int, queries: int
) -> NDArray[np.bool_]:
    """Whether each device without a shift ever raised the alarm: bool [streams].

    Args:
        calibration: scores that the marks are made from.
        scores: of real test scenes.
        folder: where the states are kept.
        streams: number of devices.
        queries: number of queries of each start.
    """
    raised = np.zeros(streams, np.bool_)
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        watched = watched_shares(calibration, rng.choice(scores, len(scores)))
        for _ in range(STARTS):
            path = folder / f"{seed}.json"
            watch = DriftWatch(f"{seed}", watched, DriftRule(alpha=ALPHA), path=path)
            watch.update(rng.choice(scores, queries))
            watch.close()
        raised[seed] = watch.alarm_at is not None
    return raised


def delays(certificate: Certificate, clean: Values, shifted: Values) -> Values:
    """Pictures from the shift to the alarm in each of 100 streams: float64 [100].

    Infinite where no alarm came, or one came before the shift.
    """
    found = np.full(100, np.inf)
    for seed in range(len(found)):
        rng = np.random.default_rng(seed)
        watch = DriftWatch("", certificate.watched)
        if not watch.update(rng.choice(clean, BEFORE)):
            watch.update(rng.permutation(shifted))
            if watch.alarm_at is not None:
                found[seed] = watch.alarm_at - BEFORE
    return found


def shifted_sources(case: Case, count: int) -> Iterator[tuple[str, Source]]:
    """Scenes that differ from those of the certificate, by what is different."""
    size = case.student.spec.image.size
    plain = EmojiSource("test", count, size=size, seed=2, distinct=True)
    for name, alter in ALTERS.items():
        yield name, Altered(plain, name, alter)
    yield "unseen emoji", EmojiSource("unseen", count, size=size, distinct=True)


def main() -> int:
    args = options(__doc__).parse_args()
    streams, queries, shifted = (1000, 100, 600)
    test = 4000
    if args.quick:
        streams, queries, shifted = (200, 30, 300)
        test = 2000
    scores: dict[str, Values] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = open_case(Path(folder), gallery=1000, calibration=1000, test=test)
        certificate, clean = case.found.certificate, case.found.outcomes.scores
        assert certificate is not None, "tests/benchmarks/cascade.py shows that it is certified"
        calibration = case.evaluator.scores(case.eval_set.calibration)
        for name, source in shifted_sources(case, shifted):
            say(f"asking the student about {source.name} ...")
            scores[name] = case.evaluator.scores(source)
    say("devices without a shift ...")
    with tempfile.TemporaryDirectory() as folder:
        alarms = false_alarms(calibration, clean, Path(folder), streams, queries)
    bars = [hold(BARS, "drift_false_alarms_30_starts", estimate_share(alarms).interval)]
    for name, values in scores.items():
        took = delays(certificate, clean, values)
        hits = estimate_share(took <= WITHIN).interval
        median = estimate_percentile(np.minimum(took, shifted), 50).value
        print(
            f"{name}: found in {WITHIN} pictures in {hits.value:.0%} of "
            f"{len(took)} streams, in {median:.0f} pictures in half of them"
        )
        if not name.startswith("slight"):
            bars.append(hold(BARS, f"drift_found_{name.replace(' ', '_')}", hits))
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
