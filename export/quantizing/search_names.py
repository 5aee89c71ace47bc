"""Short names of configs, where there is little room."""

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


def key_points(result: SearchResult) -> set[str]:
    """Keys of the points that a picture names; others are known by their number alone.

    They are fp32, the plain recipe, what was chosen, the front, and all that is not static
    int8.
    """
    shown = {point.key for point in (*result.front, result.chosen, *result.points[:2])}
    others = {p.key for p in result.points if not isinstance(p.config, StaticInt8)}
    return shown | others


def short_name(config: Config) -> str:
    """A few letters: what differs between the configs of one search."""
    match config:
        case Float32():
            return "fp32"
        case Float16():
            return f"fp16, {len(config.islands)} in fp32" if config.islands else "fp16"
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
                "7-bit" if config.reduce_range else "",
                "int8 tables" if config.int8_tables else "",
            ]
            return ", ".join(filter(None, words))


def _kept(count: int) -> str:
    return f", {count} in float" if count else ""
