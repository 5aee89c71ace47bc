"""Does the detector raise no false alarms, and does it find what really changes?

False alarms: streams of margins of real test scenes in random order, from which the histogram
of the certificate is drawn as well. Detection: such a stream that turns, after 200 pictures,
into scenes with noise, blur, little light, or emoji that no training showed. Slight noise and
blur cost few answers: how often they are found is told, not held.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from _bars import at_least, at_most, finish, options, say
from _cascade_case import Case, open_case
from PIL import Image, ImageEnhance, ImageFilter

from edgeclip.compress.data.sources import EmojiSource, Pair, Source
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.cascade.drift import DriftDetector, DriftRule, ScoreSample
from edgeclip.runtime.quality.intervals import bootstrap

Alter = Callable[[Image.Image, np.random.Generator], Image.Image]

ALPHA = 0.05  # of the bar; so many streams tell 1% from 0.8% by chance only
MEAN_QUERIES = 1000  # of the rule for endless streams
BEFORE = 200  # pictures without a shift
WITHIN = 200  # pictures in which a shift is to be found
FOUND = 0.95


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


def false_alarms(scores: Values, edges: Values, streams: int, length: int) -> Values:
    """Whether each stream without a shift raised the alarm: [streams], 0 or 1."""
    raised = np.zeros(streams)
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        sample = ScoreSample.of(edges, rng.choice(scores, 1000))
        detector = DriftDetector(sample, DriftRule(alpha=ALPHA), seed=seed)
        raised[seed] = detector.update(rng.choice(scores, length))
    return raised


def endless(scores: Values, edges: Values, streams: int) -> Values:
    """Pictures until the false alarm of the rule for endless streams: [streams].

    A stream ends after ten times the mean that is asked for, and counts as it stands.
    """
    times = np.zeros(streams)
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        sample = ScoreSample.of(edges, rng.choice(scores, 1000))
        detector = DriftDetector(sample, DriftRule(mean_queries=MEAN_QUERIES), seed=seed)
        for _ in range(10):
            if detector.update(rng.choice(scores, MEAN_QUERIES)):
                break
        times[seed] = detector.alarm_at or detector.seen
    return times


def found(sample: ScoreSample, clean: Values, shifted: Values) -> list[bool]:
    """Whether the alarm comes soon enough after the shift, and not before it, in each stream."""
    hits = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        detector = DriftDetector(sample, seed=seed)
        early = detector.update(rng.choice(clean, BEFORE))
        detector.update(rng.permutation(shifted))
        late = detector.alarm_at is None or detector.alarm_at > BEFORE + WITHIN
        hits.append(not early and not late)
    return hits


def shifted_sources(case: Case, count: int) -> Iterator[tuple[str, Source]]:
    """Scenes that differ from those of the certificate, by what is different."""
    size = case.student.spec.image.size
    plain = EmojiSource("test", count, size=size, seed=2, distinct=True)
    for name, alter in ALTERS.items():
        yield name, Altered(plain, name, alter)
    yield "unseen emoji", EmojiSource("unseen", count, size=size, distinct=True)


def main() -> int:
    args = options(__doc__).parse_args()
    streams, length, endless_ones, shifted = (1000, 3000, 1500, 600)
    sizes = {"gallery": 5000, "calibration": 1000, "test": 2000}
    if args.quick:
        streams, length, endless_ones, shifted = (200, 1000, 100, 300)
        sizes = {"gallery": 1000, "calibration": 400, "test": 800}
    scores: dict[str, Values] = {}
    with tempfile.TemporaryDirectory() as folder:
        case = open_case(Path(folder), **sizes)
        certificate, clean = case.found.certificate, case.found.outcomes.scores
        assert certificate is not None, "tests/benchmarks/cascade.py shows that it is certified"
        edges = case.evaluator.scores(case.eval_set.calibration)
        for name, source in shifted_sources(case, shifted):
            say(f"asking the student about {source.name} ...")
            scores[name] = case.evaluator.scores(source)
    say("streams without a shift ...")
    alarms = bootstrap(false_alarms(clean, edges, streams, length))
    times = bootstrap(endless(clean, edges, endless_ones))
    bars = [
        at_most("drift_false_alarms", alarms, ALPHA),
        at_least("drift_mean_time_to_false_alarm", times, MEAN_QUERIES, "pictures"),
    ]
    for name, values in scores.items():
        hits = bootstrap(np.array(found(certificate.sample, clean, values)))
        print(f"{name}: found in {WITHIN} pictures in {hits.value:.0%} of 100 streams")
        if not name.startswith("slight"):
            bars.append(at_least(f"drift_found_{name.replace(' ', '_')}", hits, FOUND))
    return finish(bars, args.out)


if __name__ == "__main__":
    sys.exit(main())
