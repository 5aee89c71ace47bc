"""Groups of products that go back to float until the gates hold: no more of them than need be."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from edgeclip.export.quantizing.attempts import Attempts
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.group_gains import Gains
from edgeclip.export.quantizing.node_groups import NodeGroup
from edgeclip.export.quantizing.point import Point
from edgeclip.export.quantizing.sensitivity import GroupDamage, Sensitivity

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
