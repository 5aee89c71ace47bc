"""Does the detector raise no false alarms, and does it find what really changes?

False alarms: streams of margins of real test scenes in random order, from which the histogram
of the certificate is drawn as well. Detection: such a stream that turns, after 200 pictures,
into scenes with noise, blur, little light, or emoji that no training showed. What the cascade
keeps of the teacher's quality there, were it not revoked, stands beside it.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _bars import Bar, command, finish, options
from _cascade_case import Case, Sizes, open_case, say
from PIL import Image, ImageEnhance, ImageFilter

from edgeclip.compress.data.sources import EmojiSource, Pair, Source
from edgeclip.export.cascade.certify import CascadePlan, certify
from edgeclip.runtime.arrays import Values
from edgeclip.runtime.cascade.certificate import Certificate, PairedOutcomes
from edgeclip.runtime.cascade.drift import DriftDetector, DriftRule, ScoreSample
from edgeclip.runtime.cascade.scores import Margin
from edgeclip.runtime.quality.intervals import Interval, bootstrap, bootstrap_ratio

Alter = Callable[[Image.Image, np.random.Generator], Image.Image]

ALPHA = 0.05  # of the bar; so many streams tell 1% from 0.8% by chance only
SMALL_ALPHA = 0.01
MEAN_QUERIES = 1000  # of the rule for endless streams
BEFORE = 200  # pictures without a shift
WITHIN = 200  # pictures in which a shift is to be found
FOUND = 0.95
FEWEST_RIGHT = 20  # answers of the teacher, for a ratio to mean anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How many streams, how long, and how many altered scenes."""

    streams: int
    length: int
    endless: int
    shifted: int
    sizes: Sizes


FULL = Effort(
    streams=1000,
    length=3000,
    endless=1500,
    shifted=600,
    sizes=Sizes(gallery=5000, calibration=1000, test=2000, fresh=1),
)
QUICK = Effort(
    streams=200,
    length=1000,
    endless=100,
    shifted=300,
    sizes=Sizes(gallery=1000, calibration=400, test=800, fresh=1),
)


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


def noise(levels: float) -> Alter:
    """Gaussian noise, as of a small sensor at night."""

    def alter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        noisy = np.asarray(image) + rng.normal(0, levels, (image.height, image.width, 3))
        return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))

    return alter


def blur(pixels: float) -> Alter:
    """A Gaussian blur, as of a lens out of focus."""
    return lambda image, rng: image.filter(ImageFilter.GaussianBlur(pixels))


def dark(light: float) -> Alter:
    """A share of the light."""
    return lambda image, rng: ImageEnhance.Brightness(image).enhance(light)


ALTERS: dict[str, Alter] = {
    "slight noise": noise(30),
    "slight blur": blur(1.2),
    "noise": noise(50),
    "blur": blur(3),
    "dark": dark(0.6),
}
UNSEEN = "unseen emoji"
SLIGHT = ("slight noise", "slight blur")  # cost few answers, and are no bars


def false_alarms(scores: Values, edges: Values, rule: DriftRule, effort: Effort) -> Values:
    """Whether each stream without a shift raised the alarm: [streams], 0 or 1."""
    raised = []
    for seed in range(effort.streams):
        rng = np.random.default_rng(seed)
        sample = ScoreSample.of(edges, rng.choice(scores, 1000))
        raised.append(
            DriftDetector(sample, rule, seed=seed).update(rng.choice(scores, effort.length))
        )
    return np.array(raised, dtype=np.float64)


def endless(scores: Values, edges: Values, effort: Effort) -> Values:
    """Pictures until the false alarm of the rule for endless streams: [streams].

    A stream ends after ten times the mean that is asked for, and counts as it stands.
    """
    times = []
    for seed in range(effort.endless):
        rng = np.random.default_rng(seed)
        sample = ScoreSample.of(edges, rng.choice(scores, 1000))
        detector = DriftDetector(sample, DriftRule(mean_queries=MEAN_QUERIES), seed=seed)
        for _ in range(10):
            if detector.update(rng.choice(scores, MEAN_QUERIES)):
                break
        times.append(detector.alarm_at or detector.seen)
    return np.array(times, dtype=np.float64)


def delays(certificate: Certificate, clean: Values, shifted: Values, streams: int) -> Values:
    """Pictures from the shift to the alarm: [streams], infinite where there was none.

    A stream with an alarm before the shift counts as one that never saw it.
    """
    found = []
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        detector = DriftDetector(certificate.sample, seed=seed)
        if detector.update(rng.choice(clean, BEFORE)):
            found.append(np.inf)
            continue
        detector.update(rng.permutation(shifted))
        found.append(np.inf if detector.alarm_at is None else detector.alarm_at - BEFORE)
    return np.array(found)


def shifted_sources(case: Case, count: int) -> dict[str, Source]:
    """Scenes that differ from those of the certificate, by what is different."""
    size = case.student.spec.image.size
    plain = EmojiSource("test", count, size=size, seed=2, distinct=True)
    found: dict[str, Source] = {"none": plain}
    found |= {name: Altered(plain, name, alter) for name, alter in ALTERS.items()}
    found[UNSEEN] = EmojiSource("unseen", count, size=size, distinct=True)
    return found


def row(name: str, outcomes: PairedOutcomes, threshold: float, found: Values | None) -> str:
    """A line of the table of shifts."""
    kept = "few answers right"
    if outcomes.teacher.sum() >= FEWEST_RIGHT:
        ratio = bootstrap_ratio(outcomes.correct(threshold), outcomes.teacher)
        kept = f"{ratio.value:.1%} [{ratio.low:.1%}, {ratio.high:.1%}]"
    cells = (
        f"{name:<14}{outcomes.teacher.mean():>9.1%}{outcomes.student.mean():>9.1%}"
        f"{outcomes.escalated_share(threshold):>11.1%}  {kept:<23}"
    )
    if found is None:
        return cells
    middle, late = np.quantile(found, (0.5, 0.95), method="higher")
    return f"{cells}{middle:>8.0f}{late:>8.0f}{(found <= WITHIN).mean():>8.1%}"


def main() -> int:
    """Certify, then detector."""
    args = options(__doc__ or "").parse_args()
    effort = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        case = open_case(Path(folder), effort.sizes)
        plan = CascadePlan(
            student=case.student,
            teacher=case.teacher,
            eval_set=case.eval_set,
            score=Margin(),
            command=command(),
        )
        evaluator = plan.evaluator()
        found = certify(plan, evaluator)
        certificate = found.certificate
        assert certificate is not None, "tests/benchmarks/cascade.py shows that it is certified"
        edges = evaluator.scores(case.eval_set.calibration)
        sources = shifted_sources(case, effort.shifted)
        outcomes_by_name = {}
        for name, source in sources.items():
            say(f"asking student and teacher about {source.name}")
            outcomes_by_name[name] = evaluator.paired_outcomes(source)
    clean = found.outcomes.scores
    print(f"\n{'shift':<14}{'teacher':>9}{'student':>9}{'escalated':>11}  {'kept':<23}", end="")
    print(f"{'found':>8}{'95%':>8}{f'in {WITHIN}':>8}")
    print(row("none", outcomes_by_name["none"], certificate.threshold, None))
    seen: dict[str, Values] = {}
    for name in [*ALTERS, UNSEEN]:
        seen[name] = delays(certificate, clean, outcomes_by_name[name].scores, 100)
        print(row(name, outcomes_by_name[name], certificate.threshold, seen[name]))
    print(f"\n{effort.streams} streams of {effort.length} pictures without a shift")
    raised = {}
    for alpha in (ALPHA, SMALL_ALPHA):
        say(f"detector them with alpha {alpha:g}")
        raised[alpha] = bootstrap(false_alarms(clean, edges, DriftRule(alpha=alpha), effort))
        print(f"alpha {alpha:g}: alarm in {raised[alpha].value:.2%} of them")
    bars = [_bar("drift_false_alarms", raised[ALPHA], "<=", ALPHA)]
    say("detector endless streams without a shift")
    times = bootstrap(endless(clean, edges, effort))
    bars.append(_bar("drift_mean_time_to_false_alarm", times, ">=", MEAN_QUERIES, "pictures"))
    for name, values in seen.items():
        if name in SLIGHT:
            continue
        hits = bootstrap(values <= WITHIN)
        bars.append(_bar(f"drift_found_{name.replace(' ', '_')}", hits, ">=", FOUND))
    return finish(bars, args.out)


def _bar(name: str, value: Interval, direction: str, bound: float, unit: str = "") -> Bar:
    return Bar(
        name=name,
        value=value.value,
        direction=">=" if direction == ">=" else "<=",
        bound=bound,
        unit=unit,
        interval=value,
    )


if __name__ == "__main__":
    sys.exit(main())
