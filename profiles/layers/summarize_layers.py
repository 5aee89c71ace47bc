"""Summarize the times of layers over several runs, whichever engine told them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgeclip.profiles.record.measurement import LayerProfile, LayerTime
from edgeclip.runtime.errors import InputError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer before it is timed; the fields are those of `LayerTime`."""

    name: str
    op: str
    provider: str
    flops: float | None
    bytes: float | None


def summarize_layers(
    source: str,
    layers: Mapping[Key, Layer],
    runs: Sequence[Mapping[Key, float]],
    plain_ms: Sequence[float],
) -> LayerProfile:
    """Make a layer profile from several runs: medians, the slowest layer first.

    Args:
        source: see `LayerProfile`.
        layers: every layer that ran, by a key of its own.
        runs: milliseconds by layer key, one mapping for each run; a missing layer counts as 0.
        plain_ms: milliseconds of whole runs without profiling.
    """
    medians = {key: statistics.median(run.get(key, 0.0) for run in runs) for key in layers}
    total = sum(medians.values())
    times = (
        LayerTime(
            name=layer.name,
            op=layer.op,
            provider=layer.provider,
            ms=medians[key],
            share=medians[key] / total if total else 0.0,
            flops=layer.flops,
            bytes=layer.bytes,
        )
        for key, layer in layers.items()
    )
    return LayerProfile(
        source=source,
        runs=len(runs),
        total_ms=statistics.median(sum(run.values()) for run in runs),
        plain_ms=statistics.median(plain_ms),
        layers=tuple(sorted(times, key=lambda layer: -layer.ms)),
    )


def run_alternately(
    plain: Callable[[], object], profiled: Callable[[], object], *, runs: int, warm_up: int
) -> tuple[float, ...]:
    """Run the plain and the profiled function alternately; return ms of the plain runs.

    Each runs `warm_up + runs` times; the first `warm_up` times are left out.

    Raises:
        InputError: `runs` is below 1 or `warm_up` below 0.
    """
    if runs < 1 or warm_up < 0:
        raise InputError(f"profile at least 1 run after 0 or more, not {runs} after {warm_up}")
    times = []
    for number in range(warm_up + runs):
        if number % 2:
            profiled()
        start = time.perf_counter()
        plain()
        times.append(1e3 * (time.perf_counter() - start))
        if not number % 2:
            profiled()
    return tuple(times[warm_up:])
