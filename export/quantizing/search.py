"""Search for the fastest form of a tower inside its gates: mixed precision, found by measuring."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgeclip.export.errors import ExportError
from edgeclip.export.quantizing.candidate_evaluator import Judgement
from edgeclip.export.quantizing.config import Config, Float16, Float32, StaticInt8, describe
from edgeclip.export.quantizing.node_groups import Gains, NodeGroup
from edgeclip.export.quantizing.quantization_candidate import (
    MEAN_COSINE,
    Point,
    PointLatency,
    front_of,
    ranked,
)
from edgeclip.export.quantizing.search_task import SearchSpace
from edgeclip.export.quantizing.sensitivity import GroupDamage, Sensitivity
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


_TRIED_BACK = 8  # groups that may be quantized again in the end


def give_back(
    attempts: Attempts,
    config: StaticInt8,
    free: tuple[str, ...],
    damage: Sensitivity,
    gains: Gains,
    *,
    allowed: float,
) -> None:
    """Try mixed forms of a config that misses its gates; what came of them is in `attempts`.

    Args:
        attempts: tries them.
        config: with all products in int8.
        free: nodes that int8 makes no faster: they stay in float in any case.
        damage, gains: of each group, with that config.
        allowed: loss of cosine that the gates allow.

    Raises:
        TimeUpError: time is up.
    """
    mixed = _Mixed(attempts, config, free)
    for order in (by_damage_for_time(damage, gains, allowed), damage.groups):
        left = [item for item in order if not set(item.nodes) <= set(free)]
        fewest = mixed.fewest(left)
        if fewest is not None:
            mixed.take_back(left[:fewest], gains)
            return


def by_damage_for_time(
    damage: Sensitivity, gains: Gains, allowed: float
) -> tuple[GroupDamage, ...]:
    """Groups in the order in which they should go back: most damage for the time first.

    What saves no time goes first of all, then what loses more than is `allowed` all alone.
    """

    def worth(item: GroupDamage) -> tuple[bool, bool, float]:
        saved = gains.of(item.nodes)
        hopeless = item.cosine_loss.value > allowed
        return saved <= 0, hopeless, item.divergence.value / (saved if saved > 0 else 1.0)

    return tuple(sorted(damage.groups, key=worth, reverse=True))


def nodes_of(groups: Iterable[NodeGroup | GroupDamage]) -> tuple[str, ...]:
    """Names of all their products."""
    return tuple(node for group in groups for node in group.nodes)


class _Mixed:
    """Forms of one config that differ in what stays in float."""

    def __init__(self, attempts: Attempts, config: StaticInt8, free: tuple[str, ...]) -> None:
        self._attempts, self._config, self._free = attempts, config, free

    def fewest(self, order: Sequence[GroupDamage]) -> int | None:
        """How many groups must go, the first of `order`; None if that would be all.

        Steps grow until the gates hold, then the last one is halved: with a few groups that is
        one after the other.
        """
        most = len(order) - 1  # without any int8 it would be fp32
        low, high = 0, min(1, most)
        while not _holds(point := self._point(order[:high])):
            if high >= most or _surely_slower(point):
                return None
            low, high = high, min(2 * high, most)
        while high - low > 1:
            middle = (low + high) // 2
            holds = _holds(self._point(order[:middle]))
            low, high = (low, middle) if holds else (middle, high)
        return high

    def take_back(self, given: Sequence[GroupDamage], gains: Gains) -> None:
        """Quantize again what saves most time, where the gates hold without it."""
        left = list(given)
        # The last one is needed: without it the gates did not hold.
        worth = sorted(given[:-1], key=lambda item: -gains.of(item.nodes))
        for item in worth[:_TRIED_BACK]:
            fewer = [other for other in left if other is not item]
            if _holds(self._point(fewer)):
                left = fewer

    def _point(self, given: Sequence[GroupDamage]) -> Point | None:
        kept = (*self._free, *nodes_of(given))
        return self._attempts.point(replace(self._config, kept=kept))


def _holds(point: Point | None) -> bool:
    return point is not None and point.passed


def _surely_slower(point: Point | None) -> bool:
    """Whether a point takes longer than fp32, so that with more in float it is no use either."""
    return point is not None and point.latency is not None and point.latency.ratio.low >= 1


_FINALISTS = 4  # that race each other, at most
_LOOKS = 3  # configs that are held against the test pairs, at most
_NEAR = 8.0  # times the loss of cosine that is allowed: finer ranges make no more good


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        points: all that were tried, in order; the first is fp32. Those that took part in the race
            have their times from it.
        front: those that no other beats in both time (or bytes, where no time was measured)
            and mean cosine, the fastest first.
        chosen: what to ship.
        why: it and no other.
        judged: configs that the test pairs have seen, in order, each once.
        damage: of each group; None where it did not matter.
        gains: likewise.
        failed: what could not be made or run, and the reason.
        complete: whether all was tried that was worth it; False where time was up.
    """

    points: tuple[Point, ...]
    front: tuple[Point, ...]
    chosen: Point
    why: str
    judged: tuple[Judgement, ...]
    damage: Sensitivity | None
    gains: Gains | None
    failed: tuple[tuple[str, str], ...]
    complete: bool


def search(
    bench: Bench,
    space: SearchSpace,
    *,
    minutes: float | None = None,
    rank: bool = False,
    progress: Progress = lambda line: None,
    clock: Clock = time.monotonic,
) -> SearchResult:
    """Look for the fastest config inside its gates.

    Args:
        bench: measures configs; those that it knows already take no time.
        space: what is worth trying.
        minutes: nothing new is begun after so many; None for no limit.
        rank: measure the damage of each group even where the gates hold without it.
        progress: called with a line for a person after each step.
        clock: seconds, from any zero.

    Raises:
        ExportError: fp32 cannot be made.
        EngineError: the tower cannot be run in fp32.
    """
    return _Search(Attempts(bench, minutes, progress, clock), space, rank).run()


class _Search:
    def __init__(self, attempts: Attempts, space: SearchSpace, rank: bool) -> None:
        self._attempts, self._bench = attempts, attempts.bench
        self._space, self._rank = space, rank
        self._damage: Sensitivity | None = None
        self._gains: Gains | None = None

    def run(self) -> SearchResult:
        """Search, then judge."""
        attempts = self._attempts
        fp32 = self._bench.point(Float32())
        attempts.points[fp32.key] = fp32
        complete = True
        try:
            if self._space.recipe is not None:
                self._try_int8(self._space.recipe)
            for config in self._space.others:
                if isinstance(config, Float16):
                    attempts.half(config)
                else:
                    attempts.point(config)
        except TimeUpError:
            complete = False
            attempts.say("time is up")
        chosen, judged, why = self._judge(fp32)
        points = tuple(attempts.points.values())
        return SearchResult(
            points=points,
            front=front_of(points),
            chosen=chosen,
            why=why,
            judged=judged,
            damage=self._damage,
            gains=self._gains,
            failed=tuple(attempts.failed.items()),
            complete=complete,
        )

    def _try_int8(self, recipe: StaticInt8) -> None:
        """Look among static int8; where that cannot go on, what was found so far counts."""
        try:
            self._quantize(recipe)
        except (ExportError, EngineError) as error:  # of looking, such as the engine's profiler
            self._attempts.fail(recipe, error)

    def _quantize(self, recipe: StaticInt8) -> None:
        """Find the fastest static int8 inside the gates."""
        first = self._attempts.point(recipe)
        if first is None:
            return
        best = first if first.passed else self._remedied(first)
        config = best.config
        assert isinstance(config, StaticInt8)
        self._attempts.check_time()
        self._gains = gains = self._bench.gains(config)
        free = self._free(gains)
        if free:
            self._attempts.say(f"{len(free)} products are no faster in int8: tried in float")
            best = self._attempts.point(replace(config, kept=free)) or best
        if best.passed:
            self._cheapen(best)
        if self._rank or not best.passed:
            self._attempts.check_time()
            self._attempts.say("measuring the damage that each group does alone")
            self._damage = damage = self._bench.damage(config)
            if not best.passed:
                allowed = _allowed(best)
                give_back(self._attempts, config, free, damage, gains, allowed=allowed)

    def _remedied(self, best: Point) -> Point:
        """Return the first of a recipe's remedied forms inside the gates, else the most exact."""
        changes = [self._bench.smoothed] if self._space.smoothing else []
        for change in (*changes, *self._space.remedies):
            assert isinstance(best.config, StaticInt8)
            if change in self._space.remedies and not _is_near(best):
                break
            self._attempts.check_time()
            changed = change(best.config)
            point = None if changed == best.config else self._attempts.point(changed)
            if point is not None and _worth(point) > _worth(best):
                best = point
            if best.passed:
                break
        return best

    def _free(self, gains: Gains) -> tuple[str, ...]:
        """Nodes that int8 makes no faster, unless that holds for all."""
        groups = self._bench.groups
        free = nodes_of(group for group in groups if gains.of(group.nodes) <= 0)
        return () if not gains.measured or len(free) == len(nodes_of(groups)) else free

    def _cheapen(self, best: Point) -> None:
        """Try what may save some more while the gates hold."""
        for change in self._space.cheaper:
            assert isinstance(best.config, StaticInt8)
            self._attempts.point(change(best.config))

    def _race(self, fp32: Point) -> None:
        """Time in the same rounds what may be shipped, unless there is nothing to choose from."""
        attempts = self._attempts
        candidates, _ = ranked(list(attempts.points.values()), fp32)
        finalists = candidates[:_FINALISTS]
        if len(finalists) < 2 or fp32.latency is None:
            return
        attempts.say(f"{len(finalists)} that may be shipped: timed in the same rounds")
        found = self._bench.race([point.config for point in finalists])
        for point, latency in zip(finalists, found, strict=True):
            raced = replace(point, latency=latency)
            attempts.points[point.key] = raced
            attempts.say(line_of(raced))

    def _judge(self, fp32: Point) -> tuple[Point, tuple[Judgement, ...], str]:
        """Hold what is to be shipped against the test pairs, the next best if it misses."""
        self._race(fp32)
        candidates, reason = ranked(list(self._attempts.points.values()), fp32)
        judged: list[Judgement] = []
        for point in candidates[:_LOOKS]:
            self._attempts.say(f"judging on the test pairs: {point.name}")
            judged.append(self._bench.judge(point.config))
            if judged[-1].passed:
                misses = f"; {len(judged) - 1} before it missed on the test pairs"
                return point, tuple(judged), reason + (misses if len(judged) > 1 else "")
        if judged:
            reason = f"the best {len(judged)} inside their gates missed on the test pairs"
        return fp32, tuple(judged), reason


def _is_near(point: Point) -> bool:
    """Whether a point misses by so little that finer ranges may help."""
    return 1 - _exactness(point) <= _NEAR * _allowed(point)


def _allowed(point: Point) -> float:
    """The loss of cosine that a point's gates allow; none is said if nothing is usable."""
    bounds = [record.bound for record in point.records if record.name == MEAN_COSINE]
    return 1 - bounds[0] if bounds else 0.0


def _worth(point: Point) -> tuple[bool, float]:
    """Of two points the one to go on with has more of it."""
    return point.passed, _exactness(point)


def _exactness(point: Point) -> float:
    return -1.0 if point.cosine is None else point.cosine.value
