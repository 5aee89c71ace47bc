"""How far each layer is from what the machine can do: the roofline model.

Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", Communications of the ACM 52 (4), 2009.
"""

from dataclasses import dataclass
from typing import Literal

from edgeclip.runtime.inspecting.layer_times import LayerProfile, LayerTime
from edgeclip.runtime.inspecting.roofline import Roofline
from edgeclip.runtime.spec import Precision

Limit = Literal["compute", "memory", "overhead"]

# Starting a node, and waking threads for it, takes some microseconds by itself, and profilers
# count in whole ones.
TOO_SHORT_MS = 0.01
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """One layer beside the roof above it; None is what its shapes do not tell.

    Attributes:
        name, op: of the layer.
        ms: that it took.
        share_of_time: of the sum of all layers.
        precision: whose peak is its roof; in an int8 graph what is not quantized has fp32's.
        intensity: operations a byte.
        achieved_gflops: 10^9 operations a second.
        attainable_gflops: min(peak, intensity * bandwidth), the roof.
        achieved_gb_s: 10^9 bytes a second.
        least_ms: that the roof allows.
        share: of the roof that was reached, `least_ms / ms`; of the bandwidth where there are
            no operations. Above 1 where data came from a cache: the roof is that of the
            memory.
        limit: what stops it first: computing, or memory; "overhead" where it is too short to
            tell anything but what starting a node costs.
    """

    name: str
    op: str
    ms: float
    share_of_time: float
    precision: Precision
    intensity: float | None
    achieved_gflops: float | None
    attainable_gflops: float | None
    achieved_gb_s: float | None
    least_ms: float | None
    share: float | None
    limit: Limit | None


def distances(
    layers: LayerProfile, roofline: Roofline, precision: Precision
) -> tuple[LayerDistance, ...]:
    """Each layer's distance from the roofline, in the order of `layers`.

    The roof counts every operation like half a multiply-add. An `exp` or `erf` is dearer, so
    that layers of these stay far below it, and only products come near.

    Args:
        layers: of a tower at batch 1. Those of ONNX Runtime on a GPU are the host's times,
            which say nothing here.
        roofline: of the same machine and threads.
        precision: of the tower.
    """
    return tuple(_distance(layer, roofline, precision) for layer in layers.layers)


def peak_of(roofline: Roofline, precision: Precision) -> float | None:
    """10^9 operations a second; None where that precision was not measured.

    fp16 that was not measured is computed in fp32 (see `find_roofline`).
    """
    peaks = {name: interval.value for name, interval in roofline.peak_gflops}
    return peaks.get(precision, peaks.get("fp32") if precision == "fp16" else None)


def _distance(layer: LayerTime, roofline: Roofline, tower: Precision) -> LayerDistance:
    precision = _precision_of(layer, tower)
    peak, bandwidth = peak_of(roofline, precision), roofline.bandwidth_gb_s.value
    flops, moved = layer.flops or None, layer.bytes or None
    intensity = flops / moved if flops and moved else None
    attainable = None
    if flops and peak is not None:
        attainable = peak if intensity is None else min(peak, intensity * bandwidth)
    computing = flops / peak / 1e6 if flops and peak is not None else None
    moving = moved / bandwidth / 1e6 if moved else None
    least = max((ms for ms in (computing, moving) if ms is not None), default=None)
    if flops and attainable is None:
        least = None  # its roof is not known
    return LayerDistance(
        name=layer.name,
        op=layer.op,
        ms=layer.ms,
        share_of_time=layer.share,
        precision=precision,
        intensity=intensity,
        achieved_gflops=_rate(flops, layer.ms),
        attainable_gflops=attainable,
        achieved_gb_s=_rate(moved, layer.ms),
        least_ms=least,
        share=least / layer.ms if least is not None and layer.ms > 0 else None,
        limit=_limit(layer.ms, computing, moving, knows_roof=least is not None),
    )


def _precision_of(layer: LayerTime, tower: Precision) -> Precision:
    """ONNX Runtime's names tell on the CPU which nodes of an int8 graph are quantized.

    `MatMulNBits` may round its activations too: its roof is the higher one.
    """
    if tower != "int8" or layer.provider != _CPU:
        return tower
    quantized = layer.op.startswith(("QLinear", "QGemm", "QAttention", "MatMulNBits")) or (
        "Integer" in layer.op or "DynamicQuantize" in layer.op
    )
    return "int8" if quantized else "fp32"


def _rate(amount: float | None, ms: float) -> float | None:
    """10^9 a second."""
    return amount / ms / 1e6 if amount is not None and ms > 0 else None


def _limit(
    ms: float, computing: float | None, moving: float | None, *, knows_roof: bool
) -> Limit | None:
    if ms < TOO_SHORT_MS:
        return "overhead"
    if not knows_roof or moving is None:
        return None
    return "compute" if computing is not None and computing >= moving else "memory"
