"""The configs that a search tries, each once, until its time is up."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from edgeclip.export.errors import ExportError
from edgeclip.export.quantizing.config import Config, Float16, StaticInt8, describe
from edgeclip.export.quantizing.evaluate_point import Judgement
from edgeclip.export.quantizing.group_gains import Gains
from edgeclip.export.quantizing.node_groups import NodeGroup
from edgeclip.export.quantizing.point import Point, PointLatency
from edgeclip.export.quantizing.sensitivity import Sensitivity
from edgeclip.runtime.errors import EngineError

Progress = Callable[[str], None]
Clock = Callable[[], float]  # seconds


class Bench(Protocol):
    """What measures configs; see `TowerTrial`."""

    @property
    def groups(self) -> tuple[NodeGroup, ...]:
        """What can be quantized."""

    def knows(self, config: Config) -> bool:
        """Whether a point is there already."""

    def point(self, config: Config) -> Point:
        """Return a config's point."""

    def damage(self, config: StaticInt8) -> Sensitivity:
        """Measure what each group suffers."""

    def gains(self, config: StaticInt8) -> Gains:
        """Measure what each group saves."""

    def smoothed(self, config: StaticInt8) -> StaticInt8:
        """Return the config with the smoothing that suits it best."""

    def with_islands(self, config: Float16) -> Float16:
        """Return the config with the nodes in fp32 without which it misses its gates."""

    def race(self, configs: Sequence[Config]) -> tuple[PointLatency, ...]:
        """Time configs and fp32 in the same rounds, where points have times."""

    def judge(self, config: Config) -> Judgement:
        """Judge a config on the test pairs."""


class TimeUpError(Exception):
    """Nothing new may be begun; it never leaves a search."""


class Attempts:
    """What was tried, and what came of it.

    Args:
        bench: measures configs; those that it knows already take no time.
        minutes: nothing new is begun after so many; None for no limit.
        progress: called with a line for a person after each step.
        clock: seconds, from any zero.

    Attributes:
        points: in the order in which they were tried, by key.
        failed: what could not be made or run, and the reason.
    """

    def __init__(
        self,
        bench: Bench,
        minutes: float | None = None,
        progress: Progress = lambda line: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.bench, self.say = bench, progress
        self.points: dict[str, Point] = {}
        self.failed: dict[str, str] = {}
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes

    def point(self, config: Config) -> Point | None:
        """Return a config's point; None if it cannot be made or run.

        Raises:
            TimeUpError: it would have to be measured, and time is up.
        """
        if not self.bench.knows(config):
            self.check_time()
        try:
            point = self.bench.point(config)
        except (ExportError, EngineError) as error:
            self.fail(config, error)
            return None
        if point.key not in self.points:
            self.points[point.key] = point
            self.say(line_of(point))
        return point

    def half(self, config: Float16) -> Point | None:
        """Return the point of a config in fp16 with the islands that it needs.

        Raises:
            TimeUpError: see `point`.
        """
        self.check_time()
        try:
            whole = self.bench.with_islands(config)
        except (ExportError, EngineError) as error:
            self.fail(config, error)
            return None
        return self.point(whole)

    def fail(self, config: Config, error: Exception) -> None:
        """Note that a config cannot be made or run."""
        self.failed[describe(config)] = str(error)
        self.say(f"{describe(config)}: not possible here ({error})")

    def check_time(self) -> None:
        """Stop the search if its time is up.

        Raises:
            TimeUpError: it is.
        """
        if self._end is not None and self._clock() >= self._end:
            raise TimeUpError


def line_of(point: Point) -> str:
    """A point in a line, for a person who waits."""
    words = [point.name]
    if point.cosine is not None:
        words.append(f"cosine {point.cosine.value:.5f}")
    if point.latency is not None:
        ratio = point.latency.ratio
        words.append(f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of the time of fp32")
    words.append("inside its gates" if point.passed else "misses its gates")
    return ", ".join(words)
