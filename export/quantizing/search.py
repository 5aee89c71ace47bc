"""The fastest form of a tower inside its gates: mixed precision, found by measuring.

All in int8 first. If that misses a gate, remedies that cost no time are tried; if it still
does, groups of products go back to float, those first that damage most for the time they
save, until the gates hold; then those that need not have gone are taken back. Products that
int8 makes no faster go back in any case.

What is tried next is decided on held-out calibration pairs. The test pairs are looked at in
the end, once for each config that is about to be shipped: had they chosen it, their
intervals would lie.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgeclip.export.errors import ExportError
from edgeclip.export.quantizing.config import Config, Float32, StaticInt8, describe
from edgeclip.export.quantizing.evaluate_point import Judgement
from edgeclip.export.quantizing.group_gains import Gains
from edgeclip.export.quantizing.node_groups import NodeGroup
from edgeclip.export.quantizing.point import Point
from edgeclip.export.quantizing.rank_points import front_of, ranked
from edgeclip.export.quantizing.search_space import SearchSpace
from edgeclip.export.quantizing.sensitivity import GroupDamage, Sensitivity
from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.intervals import Interval

Progress = Callable[[str], None]
Clock = Callable[[], float]  # seconds

_LOOKS = 3  # configs that are held against the test pairs, at most
_TRIED_BACK = 8  # groups that may be quantized again in the end


class Bench(Protocol):
    """What measures configs; see `TowerTrial`."""

    @property
    def groups(self) -> tuple[NodeGroup, ...]: ...

    def knows(self, config: Config) -> bool: ...

    def point(self, config: Config) -> Point: ...

    def damage(self, config: StaticInt8) -> Sensitivity: ...

    def gains(self, config: StaticInt8) -> Gains: ...

    def smoothed(self, config: StaticInt8) -> StaticInt8: ...

    def judge(self, config: Config) -> Judgement: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        points: all that were tried, in order; the first is fp32.
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
        ExportError: the tower has nothing that can be quantized, or fp32 cannot be made.
        EngineError: the tower cannot be run in fp32.
    """
    return _Search(bench, space, minutes, rank, progress, clock).run()


class _TimeIsUp(Exception):
    """Nothing new may be begun."""


class _Search:
    def __init__(
        self,
        bench: Bench,
        space: SearchSpace,
        minutes: float | None,
        rank: bool,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self._bench, self._space, self._rank = bench, space, rank
        self._say, self._clock = progress, clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self._points: dict[str, Point] = {}
        self._failed: dict[str, str] = {}
        self._damage: Sensitivity | None = None
        self._gains: Gains | None = None

    def run(self) -> SearchResult:
        """Search, then judge."""
        fp32 = self._bench.point(Float32())
        self._points[fp32.key] = fp32
        complete = True
        try:
            if self._space.recipe is not None:
                self._quantize(self._space.recipe)
            for config in self._space.others:
                self._attempt(config)
        except _TimeIsUp:
            complete = False
            self._say("time is up")
        chosen, judged, why = self._judge(fp32)
        points = tuple(self._points.values())
        return SearchResult(
            points=points,
            front=front_of(points),
            chosen=chosen,
            why=why,
            judged=judged,
            damage=self._damage,
            gains=self._gains,
            failed=tuple(self._failed.items()),
            complete=complete,
        )

    def _attempt(self, config: Config) -> Point | None:
        """Return a config's point; None if it cannot be made or run.

        Raises:
            _TimeIsUp: it would have to be measured, and time is up.
        """
        if not self._bench.knows(config):
            self._check_time()
        try:
            point = self._bench.point(config)
        except (ExportError, EngineError) as error:
            self._failed[describe(config)] = str(error)
            self._say(f"{describe(config)}: not possible here ({error})")
            return None
        if point.key not in self._points:
            self._points[point.key] = point
            self._say(line_of(point))
        return point

    def _check_time(self) -> None:
        if self._end is not None and self._clock() >= self._end:
            raise _TimeIsUp

    def _quantize(self, recipe: StaticInt8) -> None:
        """Find the fastest static int8 inside the gates."""
        first = self._attempt(recipe)
        if first is None:
            return
        best = first if first.passed else self._remedied(first)
        config = best.config
        assert isinstance(config, StaticInt8)
        self._check_time()
        self._gains = gains = self._bench.gains(config)
        free = _nodes(group for group in self._bench.groups if gains.of(group.nodes) <= 0)
        if not gains.measured or len(free) == len(_nodes(self._bench.groups)):
            free = ()
        if free:
            self._say(f"{len(free)} products are no faster in int8: tried in float")
            best = self._attempt(replace(config, kept=free)) or best
        if self._rank or not best.passed:
            self._check_time()
            self._say("measuring the damage that each group does alone")
            self._damage = self._bench.damage(config)
        if best.passed:
            self._cheapen(best)
        else:
            self._give_back(config, free)

    def _remedied(self, best: Point) -> Point:
        """Return the most exact of a recipe and its remedied forms."""
        changes = [self._bench.smoothed] if self._space.smoothing else []
        for change in (*changes, *self._space.remedies):
            assert isinstance(best.config, StaticInt8)
            self._check_time()
            changed = change(best.config)
            point = None if changed == best.config else self._attempt(changed)
            if point is not None and _exactness(point) > _exactness(best):
                best = point
            if best.passed:
                break
        return best

    def _cheapen(self, best: Point) -> None:
        """Try what may save some more time while the gates hold."""
        for change in self._space.cheaper:
            assert isinstance(best.config, StaticInt8)
            self._attempt(change(best.config))

    def _give_back(self, config: StaticInt8, free: tuple[str, ...]) -> None:
        """Let groups go back to float until the gates hold; then take back what it can."""
        assert self._damage is not None
        assert self._gains is not None
        order = [
            item
            for item in by_damage_for_time(self._damage, self._gains)
            if not set(item.nodes) <= set(free)
        ]
        fewest = self._fewest(config, free, order)
        if fewest is not None:
            self._take_back(config, free, order[:fewest])

    def _fewest(
        self, config: StaticInt8, free: tuple[str, ...], order: Sequence[GroupDamage]
    ) -> int | None:
        """How many groups must go, the first of `order`; None if none is left in int8.

        Steps grow until the gates hold, then the last one is halved: with a few groups that is
        one after the other.
        """

        def tried(count: int) -> Point | None:
            return self._attempt(replace(config, kept=(*free, *_nodes(order[:count]))))

        most = len(order) - 1  # without any int8 it would be fp32
        low, high = 0, min(1, most)
        while not _holds(point := tried(high)):
            if high >= most or _surely_slower(point):
                return None
            low, high = high, min(2 * high, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _holds(tried(middle)) else (middle, high)
        return high

    def _take_back(
        self, config: StaticInt8, free: tuple[str, ...], given: Sequence[GroupDamage]
    ) -> None:
        """Quantize again what saves most time, where the gates hold without it."""
        gains = self._gains
        assert gains is not None
        left = list(given)
        # The last one is needed: without it the gates did not hold.
        worth = sorted(given[:-1], key=lambda item: -gains.of(item.nodes))
        for item in worth[:_TRIED_BACK]:
            fewer = [other for other in left if other is not item]
            if _holds(self._attempt(replace(config, kept=(*free, *_nodes(fewer))))):
                left = fewer

    def _judge(self, fp32: Point) -> tuple[Point, tuple[Judgement, ...], str]:
        """Hold what is to be shipped against the test pairs, the next best if it misses."""
        candidates, reason = ranked(list(self._points.values()), fp32)
        judged: list[Judgement] = []
        for point in candidates[:_LOOKS]:
            self._say(f"judging on the test pairs: {point.name}")
            judged.append(self._bench.judge(point.config))
            if judged[-1].passed:
                misses = f"; {len(judged) - 1} before it missed on the test pairs"
                return point, tuple(judged), reason + (misses if len(judged) > 1 else "")
        if judged:
            reason = f"the best {len(judged)} inside their gates missed on the test pairs"
        return fp32, tuple(judged), reason


def by_damage_for_time(damage: Sensitivity, gains: Gains) -> tuple[GroupDamage, ...]:
    """Groups in the order in which they should go back: most damage for the time first.

    What saves no time goes first of all.
    """

    def worth(item: GroupDamage) -> tuple[bool, float]:
        saved = gains.of(item.nodes)
        return (saved <= 0, item.divergence.value / saved if saved > 0 else item.divergence.value)

    return tuple(sorted(damage.groups, key=worth, reverse=True))


def line_of(point: Point) -> str:
    """A point in a line, for a person who waits."""
    words = [point.name]
    if point.cosine is not None:
        words.append(f"cosine {point.cosine.value:.5f}")
    if point.latency is not None:
        words.append(f"{_span(point.latency.ratio)} of the time of fp32")
    words.append("inside its gates" if point.passed else "misses its gates")
    return ", ".join(words)


def _span(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _holds(point: Point | None) -> bool:
    return point is not None and point.passed


def _surely_slower(point: Point | None) -> bool:
    """Whether a point takes longer than fp32, so that with more in float it is no use either."""
    return point is not None and point.latency is not None and point.latency.ratio.low >= 1


def _exactness(point: Point) -> float:
    return -1.0 if point.cosine is None else point.cosine.value


def _nodes(groups: Iterable[NodeGroup | GroupDamage]) -> tuple[str, ...]:
    return tuple(node for group in groups for node in group.nodes)
