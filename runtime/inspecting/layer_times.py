"""LayerProfile: how long each node of a graph takes, as its engine tells."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgeclip.runtime.errors import InputError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """One node of the graph that the engine really ran (after its own fusions).

    Attributes:
        name: as the engine calls it.
        op: operator, such as "MatMul".
        provider: that ran it.
        ms: median over runs.
        share: of the sum of all layers.
        flops: floating-point (or integer) operations of one run, 2 for a multiply-add; None
            where they cannot be told from shapes.
        bytes: read and written at least once: inputs, weights and outputs; None likewise.
    """

    name: str
    op: str
    provider: str
    ms: float
    share: float
    flops: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """All layers of one tower at batch 1.

    Attributes:
        source: what told the times, such as "ONNX Runtime profiling".
        runs: how many were profiled.
        total_ms: median of the sums.
        plain_ms: median without profiling, to see what profiling itself costs.
        layers: the slowest first.
    """

    source: str
    runs: int
    total_ms: float
    plain_ms: float
    layers: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is known of a layer before it is timed; see `LayerTime`."""

    name: str
    op: str
    provider: str
    flops: float | None
    bytes: float | None


def layer_profile(
    source: str,
    layers: Mapping[Key, Layer],
    runs: Sequence[Mapping[Key, float]],
    plain_ms: Sequence[float],
) -> LayerProfile:
    """Medians over runs, the slowest layer first.

    Args:
        source: see `LayerProfile`.
        layers: every layer that ran, by whatever tells it from the others.
        runs: milliseconds of each layer, one mapping a run; a layer that a run lacks took none.
        plain_ms: whole runs without profiling.
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


def run_in_turns(
    plain: Callable[[], object], profiled: Callable[[], object], *, runs: int, warm_up: int
) -> tuple[float, ...]:
    """Run both `warm_up` times and then `runs` times, in turns; milliseconds of the plain runs.

    Raises:
        InputError: fewer than one run, or less than no warm-up.
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
