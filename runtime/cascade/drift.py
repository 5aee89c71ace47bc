"""Detect drift of the confidence scores with a test martingale, whose state can be saved."""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from edgeclip.runtime.bundle.files import atomic_file
from edgeclip.runtime.device.schema import check_bounds, parse
from edgeclip.runtime.errors import ConfigError, InputError

_LINEAR = np.array([0.0, -0.95, -0.5, 0.5, 0.95, 0.0, 0.0])  # times 2p - 1
_CURVED = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -0.95, 1.9])  # times 6p^2 - 6p + 1
_BETTORS = len(_LINEAR)
_JUMPS = np.array([1e-4, 1e-3, 1e-2, 1e-1])[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MartingaleState:
    """The state of a `JumperMartingale`, as plain numbers.

    Attributes:
        shares: for each jump rate, the share of the capital that each bettor holds.
        logs: for each jump rate, the natural logarithm of the capital.

    Raises:
        ValueError: another number of jump rates or bettors, or shares that are not shares.
    """

    shares: tuple[tuple[float, ...], ...] = ((1 / _BETTORS,) * _BETTORS,) * len(_JUMPS)
    logs: tuple[float, ...] = (0.0,) * len(_JUMPS)

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.shares]
        if rows != [_BETTORS] * len(_JUMPS) or len(self.logs) != len(_JUMPS):
            raise ValueError("the state was saved by another version: start a new detector")
        sound = all(min(row) >= 0 and abs(sum(row) - 1) < 1e-6 for row in self.shares)
        if not sound or not all(map(math.isfinite, self.logs)):
            raise ValueError("the capital's shares must be shares, and its logarithms finite")


class JumperMartingale:
    """The capital of a bet against the hypothesis that p-values are uniform, step by step.

    Args:
        capital: the state to continue from; by default the initial one.
    """

    def __init__(self, capital: MartingaleState | None = None) -> None:
        start = capital or MartingaleState()
        self._shares = np.array(start.shares)
        self._logs = np.array(start.logs)

    @property
    def log_capital(self) -> float:
        """Natural logarithm of the capital, which is 0 at the beginning."""
        return float(np.logaddexp.reduce(self._logs)) - math.log(len(_JUMPS))

    @property
    def state(self) -> MartingaleState:
        """The state to continue from later."""
        shares = tuple(tuple(map(float, row)) for row in self._shares)
        return MartingaleState(shares=shares, logs=tuple(map(float, self._logs)))

    def bet(self, p_value: float) -> float:
        """Take the next p-value, in [0, 1]; return the logarithm of what the capital grew by."""
        before = self.log_capital
        moved = (1 - _JUMPS) * self._shares + _JUMPS / _BETTORS
        moved *= _pays(p_value)
        total = moved.sum(axis=1)
        self._shares = moved / total[:, None]
        self._logs = self._logs + np.log(total)
        return self.log_capital - before


def _pays(p_value: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the payoff of each bettor per unit; at least 0.05, so that no capital is ever 0."""
    curve = 6 * p_value * p_value - 6 * p_value + 1
    return 1 + _LINEAR * (2 * p_value - 1) + _CURVED * curve


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftState:
    """The state of a `DriftDetector`: about 3 kB, however long the stream was.

    Attributes:
        seed: seed of the random numbers that break ties.
        counts: number of scores in each bin, including those of the certificate.
        seen: number of scores of the stream so far.
        capital: the martingale.
        restarts: natural logarithm of the Shiryaev-Roberts sum; None before the first score.
        alarm_at: the number of the score that raised the alarm, from 1; None if none did.

    Raises:
        ValueError: a negative number.
    """

    seed: Annotated[int, Ge(0)]
    counts: tuple[int, ...]
    seen: Annotated[int, Ge(0)] = 0
    capital: MartingaleState = field(default_factory=MartingaleState)
    restarts: float | None = None
    alarm_at: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self)

    def save(self, path: Path) -> None:
        """Write the state as JSON, atomically.

        Raises:
            InputError: the file cannot be written.
        """
        with atomic_file(path) as temporary:
            text = json.dumps(dataclasses.asdict(self), allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "DriftState | None":
        """Read a state that `save` wrote; None if there is no such file.

        Raises:
            InputError: it cannot be read, or is damaged.
        """
        hint = "delete it to start a new detector"
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            return parse(DriftState, data, source=str(path))
        except FileNotFoundError:
            return None
        except ConfigError as error:
            raise InputError("; ".join(str(error).split("\n  ")) + f": {hint}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path} is not the state of a drift detector ({error}): {hint}"
            ) from None


_BINS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSample:
    """Histogram of the scores of the queries that a threshold was certified on.

    Attributes:
        edges: ascending; bin i holds scores in [edges[i - 1], edges[i]).
        counts: number of scores in each of the len(edges) + 1 bins.

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
        """Make bins at the quantiles of `calibration` [M], and count the scores `test` [N]."""
        edges = np.unique(np.quantile(calibration, np.arange(1, _BINS) / _BINS))
        bins = np.searchsorted(edges, test, side="right")
        counts = np.bincount(bins, minlength=len(edges) + 1)
        return cls(edges=tuple(map(float, edges)), counts=tuple(map(int, counts)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRule:
    """When a detector raises the alarm.

    Attributes:
        alpha: without drift, the probability of an alarm, ever, is at most this.
        mean_queries: if given, a rule for endless streams instead: without drift, the mean
            number of queries until a false alarm is at least this. It detects a late drift as
            fast as an early one.

    Raises:
        ValueError: a value out of bounds.
    """

    alpha: Annotated[float, Gt(0), Lt(1)] = 0.01
    mean_queries: Annotated[float | None, Ge(1)] = None

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def log_limit(self) -> float:
        """Natural logarithm of the evidence at which the alarm is raised."""
        return -math.log(self.alpha) if self.mean_queries is None else math.log(self.mean_queries)


class DriftDetector:
    """Test scores one by one for drift; once raised, the alarm stays.

    With S the capital of the bet, the alarm of `DriftRule.alpha` is raised where S reaches
    1 / alpha (Ville's inequality). That of `mean_queries` watches the Shiryaev-Roberts sum
    R[n] = (R[n-1] + 1) x S[n] / S[n-1] of all bets that could have begun until then. R[n] - n
    is a martingale, so the mean time until R reaches c is at least c (Vovk 2021, "Testing
    randomness online").

    Args:
        sample: scores without drift.
        rule: when to raise the alarm.
        state: the state to continue from; by default the initial one.
        seed: seed of the random numbers that break ties, if there is no `state`.

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
        """Number of scores so far."""
        return self._seen

    @property
    def evidence(self) -> float:
        """Natural logarithm of the evidence, to compare with the rule's `log_limit`."""
        by_alpha = self.rule.mean_queries is None
        return self._martingale.log_capital if by_alpha else self._restarts

    @property
    def state(self) -> DriftState:
        """The state to continue from later, with the same sample and rule."""
        return DriftState(
            seed=self._seed,
            seen=self._seen,
            counts=tuple(map(int, self._counts)),
            capital=self._martingale.state,
            restarts=self._restarts if math.isfinite(self._restarts) else None,
            alarm_at=self._alarm_at,
        )

    def update(self, scores: Iterable[float]) -> bool:
        """Add the next scores of the stream; return whether the alarm is, or was, raised.

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
        raise InputError("the drift detector was saved for another certificate: start a new one")
