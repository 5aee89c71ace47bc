"""Short names for the points of a picture."""

from edgeclip.export.quantizing.config import (
    Config,
    DynamicInt8,
    Float8,
    Float16,
    Float32,
    StaticInt8,
    WeightOnly,
)
from edgeclip.export.quantizing.search import SearchResult


def short_names(result: SearchResult) -> dict[str, str]:
    """Names by key of the points that a reader looks for.

    They are fp32, the plain recipe, what was chosen, the front, and all that is not static
    int8. Others are known by their number alone.
    """
    shown = {point.key for point in (*result.front, result.chosen, *result.points[:2])}
    return {
        point.key: short_name(point.config)
        for point in result.points
        if point.key in shown or not isinstance(point.config, StaticInt8)
    }


def short_name(config: Config) -> str:
    """A few letters: what differs between the configs of one search."""
    match config:
        case Float32():
            return "fp32"
        case Float16():
            return "fp16"
        case Float8():
            return "fp8" + _kept(len(config.kept))
        case DynamicInt8():
            return "dynamic int8" + _kept(len(config.kept))
        case WeightOnly():
            return f"{config.bits}-bit weights" + _kept(len(config.kept))
        case StaticInt8():
            words = [
                "all int8" if not config.kept else f"{len(config.kept)} in float",
                "" if config.ranging.method == "minmax" else config.ranging.method,
                "smoothed" if config.smoothing else "",
                "equalised" if config.equalised else "",
                "corrected" if config.bias_corrected else "",
                "" if config.per_channel else "one scale",
            ]
            return ", ".join(filter(None, words))


def _kept(count: int) -> str:
    return f", {count} in float" if count else ""
