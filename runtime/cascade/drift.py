"""Does the stream of scores still look like the one that a threshold was certified on?

A conformal test martingale (Vovk, Nouretdinov and Gammerman 2003; Volkhonskiy et al. 2017).
Each score is ranked among all that came before it, those of the certificate's own test
included; such a rank is a p-value. As long as all of them are exchangeable, these p-values
are independent and uniform, whatever the scores' distribution, and `martingale` bets that
they are not.

Ranks are taken among bins, with ties broken by a random number: the past is then a count
for each bin, however long the stream. The edges of the bins come from other scores
(the calibration part), or the test part would not be exchangeable with the stream.

Frames of a video are not exchangeable even where nothing drifts: watch one frame of each scene.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.profiles.ranges import Range, check_ranges
from edgeclip.runtime.cascade.drift_state import DriftState
from edgeclip.runtime.cascade.martingale import JumperMartingale
from edgeclip.runtime.errors import InputError

_BINS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSample:
    """Scores of the queries that a threshold was certified on, as a histogram.

    Attributes:
        edges: ascending; bin i holds scores in [edges[i - 1], edges[i]).
        counts: how many scores fell into each of the len(edges) + 1 bins.

    Raises:
        ValueError: edges that do not ascend, or counts that do not fit them.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.edges or list(self.edges) != sorted(set(self.edges)):
            raise ValueError("edges must be finite and ascend")
        if len(self.counts) != len(self.edges) + 1 or min(self.counts) < 0 or not any(self.counts):
            raise ValueError("counts must hold one number for each bin, and not only zeros")

    @classmethod
    def of(cls, calibration: NDArray[Any], test: NDArray[Any]) -> "ScoreSample":
        """Cut at the quantiles of `calibration` [M], and count the scores of `test` [N]."""
        edges = np.unique(np.quantile(calibration, np.arange(1, _BINS) / _BINS))
        bins = np.searchsorted(edges, test, side="right")
        counts = np.bincount(bins, minlength=len(edges) + 1)
        return cls(edges=tuple(map(float, edges)), counts=tuple(map(int, counts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """When a watch raises the alarm.

    Attributes:
        alpha: without drift, the chance that the watch ever raises it is at most this.
        mean_queries: if given, a rule for streams without an end instead: without drift, the
            mean number of queries until a false alarm is at least this. It forgets what it
            lost while all was well, so it finds a late drift as fast as an early one.

    Raises:
        ValueError: a value out of bounds.
    """

    alpha: Annotated[float, Range(above=0, below=1)] = 0.01
    mean_queries: Annotated[float | None, Range(at_least=1)] = None

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def log_limit(self) -> float:
        """Natural logarithm of what the evidence must reach."""
        return -math.log(self.alpha) if self.mean_queries is None else math.log(self.mean_queries)


class DriftWatch:
    """Looks at one score after the other; the alarm, once raised, stays.

    With S the capital of the bet, the alarm of `DriftRule.alpha` is raised where S reaches
    1 / alpha (Ville's inequality). That of `mean_queries` watches the Shiryaev-Roberts sum
    R[n] = (R[n-1] + 1) x S[n] / S[n-1] of all bets that could have begun until then. R[n] - n
    is a martingale, so the mean time until R reaches c is at least c (Vovk 2021, "Testing
    randomness online").

    Args:
        sample: scores without drift.
        rule: when to raise the alarm.
        state: where to go on from; by default the beginning.
        seed: of the random numbers that break ties, where there is no `state`.

    Raises:
        InputError: `state` is of another sample.
    """

    def __init__(
        self,
        sample: ScoreSample,
        rule: DriftRule | None = None,
        *,
        state: DriftState | None = None,
        seed: int = 0,
    ) -> None:
        self.rule = rule or DriftRule()
        start = state or DriftState(seed=seed, counts=sample.counts)
        _check_state(start, sample)
        self._edges = np.array(sample.edges)
        self._counts = np.array(start.counts, dtype=np.int64)
        self._martingale = JumperMartingale(start.capital)
        self._restarts = -math.inf if start.restarts is None else start.restarts
        self._seed, self._seen, self._alarm_at = start.seed, start.seen, start.alarm_at
        ties = np.random.PCG64(start.seed)
        self._ties = np.random.Generator(ties.advance(start.seen))  # one draw for each score

    @property
    def alarm_at(self) -> int | None:
        """The number of the score that raised the alarm, counted from 1; None if none did."""
        return self._alarm_at

    @property
    def seen(self) -> int:
        """How many scores were looked at."""
        return self._seen

    @property
    def evidence(self) -> float:
        """Natural logarithm of what the rule holds against its `log_limit`."""
        by_alpha = self.rule.mean_queries is None
        return self._martingale.log_capital if by_alpha else self._restarts

    @property
    def state(self) -> DriftState:
        """All there is to know to go on later, with the same sample and rule."""
        return DriftState(
            seed=self._seed,
            seen=self._seen,
            counts=tuple(map(int, self._counts)),
            capital=self._martingale.state,
            restarts=self._restarts if math.isfinite(self._restarts) else None,
            alarm_at=self._alarm_at,
        )

    def see(self, scores: Iterable[float]) -> bool:
        """Look at the next scores of the stream; tell whether the alarm is, or was, raised.

        A score that is NaN counts as lower than all others.
        """
        values = np.nan_to_num(np.asarray(list(scores), dtype=np.float64), nan=-np.inf)
        for number in np.searchsorted(self._edges, values, side="right"):
            self._step(int(number))
        return self._alarm_at is not None

    def _step(self, number: int) -> None:
        below = int(self._counts[:number].sum())
        self._counts[number] += 1
        self._seen += 1
        here, total = int(self._counts[number]), int(self._counts.sum())
        grown = self._martingale.bet((below + self._ties.random() * here) / total)
        self._restarts = float(np.logaddexp(self._restarts, 0.0)) + grown
        if self._alarm_at is None and self.evidence >= self.rule.log_limit:
            self._alarm_at = self._seen


def _check_state(state: DriftState, sample: ScoreSample) -> None:
    pairs = zip(state.counts, sample.counts, strict=False)
    grown = [now - before for now, before in pairs]
    fits = len(state.counts) == len(sample.counts) and min(grown) >= 0 and sum(grown) == state.seen
    if not fits:
        raise InputError("the drift watch was kept for another certificate: start a new one")
