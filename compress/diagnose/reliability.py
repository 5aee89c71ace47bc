"""Whether scores can be trusted: calibration, and telling pictures from outside the data."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from edgeclip.runtime.arrays import Values
from edgeclip.runtime.console import digits
from edgeclip.runtime.quality.relevance import Relevance
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.stats.student_t import MeanEstimate, estimate_mean

_BINS = 15
_DRAWS = 200  # of the answers of a perfectly calibrated model
_LEAST, _MOST = 0.05, 20.0  # temperatures that are searched
_NEAR = 1e-3  # of a temperature, that it is found to
_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well the probability of the best text tells whether it is right.

    Attributes:
        error: the expected calibration error over bins of equally many answers.
        expected: what a perfectly calibrated model has on average with so many answers.
        limit: what such a model exceeds in 2.5% of the cases.
        confidence_above_accuracy: mean confidence less the share of right answers; above 0 for a
            model that is too sure.
        temperature: what to divide logits by, so that the likelihood is best, from 0.05 to 20.
    """

    error: float
    expected: float
    limit: float
    confidence_above_accuracy: Interval
    temperature: float

    @property
    def temperature_told(self) -> str:
        """The temperature in words: at an end of the search it is no optimum."""
        if self.temperature >= _MOST * (1 - _NEAR):
            return f"at least {digits(_MOST)}"
        if self.temperature <= _LEAST * (1 + _NEAR):
            return f"at most {digits(_LEAST)}"
        return digits(self.temperature)


def calibration(
    image: Values, text: Values, relevance: Relevance, scale: float, *, seed: int = 0
) -> Calibration:
    """Measure the calibration of each picture's best text among all texts.

    The ECE of Naeini et al. (2015) with bins of equal mass (Nguyen and O'Connor 2015). With few
    answers even a perfect model shows some: its answers are drawn again with the stated
    probabilities (consistency resampling; Broecker and Smith 2007), as Kumar et al. (2019) take the
    bias off. The temperature is that of Guo et al. (2017).

    Args:
        image: L2-normalised embeddings [N, dim].
        text: of all captions, [M, dim].
        relevance: which texts are right for which pictures.
        scale: from cosines to logits.
        seed: of the draws.
    """
    confidence, right = best_answers(image, text, relevance, scale)
    rng = np.random.default_rng(seed)
    drawn = [
        calibration_error(confidence, rng.random(len(confidence)) < confidence)
        for _ in range(_DRAWS)
    ]
    return Calibration(
        error=calibration_error(confidence, right),
        expected=float(np.mean(drawn)),
        limit=float(np.quantile(drawn, 0.975)),
        confidence_above_accuracy=estimate_mean(confidence - right, least=-1, most=1).interval,
        temperature=_best_temperature(image, text, relevance, scale),
    )


def calibration_error(confidence: Values, right: NDArray[np.bool_]) -> float:
    """Return the mean distance of confidence and accuracy over bins of equally many answers."""
    order = np.argsort(confidence, kind="stable")
    found = 0.0
    for part in np.array_split(order, min(_BINS, len(order))):
        gap = abs(float(confidence[part].mean()) - float(right[part].mean()))
        found += gap * len(part) / len(order)
    return found


def best_answers(
    image: Values, text: Values, relevance: Relevance, scale: float
) -> tuple[Values, NDArray[np.bool_]]:
    """Return the probability of each picture's best text, [N], and whether it is right."""
    confidence, right = np.empty(len(image)), np.empty(len(image), np.bool_)
    for part, logits, is_right in _logits(image, text, relevance, scale):
        best = logits.argmax(axis=1)
        places = np.arange(len(logits))
        confidence[part] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        right[part] = is_right[places, best]
    return confidence, right


def _logits(
    image: Values, text: Values, relevance: Relevance, scale: float
) -> Iterator[tuple[slice, Values, NDArray[np.bool_]]]:
    """Yield the logits of some pictures over different captions, and which of these are right."""
    _, first = np.unique(relevance.group, return_index=True)
    step = max(1, _AT_ONCE // len(first))
    for start in range(0, len(image), step):
        part = slice(start, min(start + step, len(image)))
        yield part, scale * image[part] @ text[first].T, relevance.of_images(part)[:, first]


def _best_temperature(image: Values, text: Values, relevance: Relevance, scale: float) -> float:
    """Search the temperature by golden section: the likelihood has one maximum."""

    def loss(log_temperature: float) -> float:
        total = 0.0
        for _, logits, right in _logits(image, text, relevance, scale / math.exp(log_temperature)):
            top = logits.max(axis=1, keepdims=True)
            odds = np.exp(logits - top)
            own = (odds * right).sum(axis=1) / odds.sum(axis=1)
            total -= float(np.log(np.maximum(own, 1e-300)).sum())
        return total

    share = (math.sqrt(5) - 1) / 2
    low, high = math.log(_LEAST), math.log(_MOST)
    inner, outer = high - share * (high - low), low + share * (high - low)
    at_inner, at_outer = loss(inner), loss(outer)
    while high - low > _NEAR:
        if at_inner < at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - share * (high - low)
            at_inner = loss(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + share * (high - low)
            at_outer = loss(outer)
    return math.exp((low + high) / 2)


# Out of the world -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """How well scores tell known items from others.

    Attributes:
        area: the chance that a known item scores above another, ties counting half: the AUROC.
        of_known: for each known item the share of others below it, [N].
        of_others: for each other item the share of known ones above it, [K].
    """

    area: float
    of_known: Values
    of_others: Values

    def estimate(self) -> MeanEstimate:
        """The area with DeLong's standard error (DeLong et al., Biometrics 44, 1988)."""
        return _delong(self.area, self.of_known, self.of_others, 0.0)

    def above(self, other: "Separation") -> MeanEstimate:
        """This area less another's of the same items, with DeLong's error of the paired areas."""
        return _delong(
            self.area - other.area,
            self.of_known - other.of_known,
            self.of_others - other.of_others,
            -1.0,
        )


def _delong(value: float, known: Values, others: Values, least: float) -> MeanEstimate:
    variance = known.var(ddof=1) / len(known) + others.var(ddof=1) / len(others)
    return MeanEstimate(value, math.sqrt(float(variance)), len(known) + len(others) - 2, least, 1.0)


def separation(known: Values, others: Values) -> Separation:
    """Compare scores of known items [N] with those of others [K], two of each at least."""
    below = _share_below(known, others)
    above = 1 - _share_below(others, known)
    return Separation(float(below.mean()), below, above)


def _share_below(values: Values, others: Values) -> Values:
    """Return for each value the share of others below it; equal ones count half."""
    ordered = np.sort(others)
    low, high = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    found: Values = (low + high) / (2 * len(others))
    return found


def dead_leaves(count: int, size: int, *, seed: int = 0) -> Sequence[Image.Image]:
    """Draw pictures of nothing: discs that cover each other, their radii by r^-3.

    They share statistics with photographs (Lee, Mumford and Huang 2001) and show no thing of any
    caption. Used where no pictures from outside are given.
    """
    found = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        picture = Image.new("RGB", (size, size), _colour(rng))
        draw = ImageDraw.Draw(picture)
        low, high = 0.02 * size, 0.5 * size
        for chance in rng.uniform(size=80):
            radius = (low**-2 + chance * (high**-2 - low**-2)) ** -0.5
            x, y = rng.uniform(0, size, 2)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))
        found.append(picture)
    return found


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(level) for level in rng.integers(0, 256, 3))
    return red, green, blue
