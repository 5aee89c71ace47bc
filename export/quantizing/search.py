"""The fastest form of a tower inside its gates: mixed precision, found by measuring.

All in int8 first. If that misses a gate, remedies that cost no time are tried; if it still
does, groups of products go back to float, those first that damage most for the time they
save, until the gates hold; then those that need not have gone are taken back. Products that
int8 makes no faster go back in any case.

Each point is timed against fp32 as it comes. A machine that others share can favour int8 in one
minute and fp32 in the next, so that two such ratios do not compare: in the end those that may be
shipped race each other, in the same rounds.

What is tried next is decided on held-out calibration pairs. The test pairs are looked at in
the end, once for each config that is about to be shipped: had they chosen it, their
intervals would lie.
"""

import time
from dataclasses import dataclass, replace

from edgeclip.export.errors import ExportError
from edgeclip.export.quantizing.attempts import (
    Attempts,
    Bench,
    Clock,
    Progress,
    TimeUpError,
    line_of,
)
from edgeclip.export.quantizing.config import Float16, Float32, StaticInt8
from edgeclip.export.quantizing.evaluate_point import Judgement
from edgeclip.export.quantizing.give_back import give_back, nodes_of
from edgeclip.export.quantizing.group_gains import Gains
from edgeclip.export.quantizing.point import MEAN_COSINE, Point
from edgeclip.export.quantizing.rank_points import front_of, ranked
from edgeclip.export.quantizing.search_space import SearchSpace
from edgeclip.export.quantizing.sensitivity import Sensitivity
from edgeclip.runtime.errors import EngineError

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
