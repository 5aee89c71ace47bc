"""Advice on what the layers show: which side of the roofline holds them, and islands.

None of it where ONNX Runtime drives a GPU: what it tells of a node there is the host's time.
"""

from edgeclip.runtime.inspecting.advice_case import (
    NOISE,
    Advice,
    Case,
    amdahl,
    percent,
    share_of_time,
)
from edgeclip.runtime.inspecting.node_costs import is_product
from edgeclip.runtime.inspecting.roofline_distance import LayerDistance, Limit, peak_of

_MOST = 0.5  # of the time of all layers
_NEAR = 0.6  # of the roof: kernels rarely come closer outside the largest shapes
_MANY = 10  # layers
_NOTABLE = 0.1  # of the time of all layers
_TENSORRT_PRODUCTS = {"convolution", "gemm", "matrixmultiply"}
# Where profiling costs more than this, times of short layers are mostly its own.
_PROFILING = 1.5
_FUSE = "`edgeclip export STUDENT --device DEVICE` on the device itself tries rewrites"
_ISLANDS = {
    "Q/DQ": ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    "Cast": ("Cast",),
    "Transpose": ("Transpose", "ReorderInput", "ReorderOutput"),
}
_MENDS = {
    "Q/DQ": "a quantized product between float layers pays for both ways: "
    "compare with `--precision fp32`",
    "Cast": "the engine converts where it has no kernel for the type: compare with "
    "`--precision fp32`",
    "Transpose": f"{_FUSE} such as merged projections and fused attention",
}


def smaller_model(case: Case) -> Advice | None:
    """Products that compute at more than 60% of their roof take most of the time.

    No setting makes those faster. int8 is named where its measured peak is higher and the
    same run has not tried it; its bound is the ratio of the peaks. Otherwise a student of
    half the layers is, which at most halves that time.
    """
    layers = _held_by(case, "compute")
    share = share_of_time(layers)
    if case.roofline is None or share <= _MOST:
        return None
    reached = sum((layer.share or 0) * layer.share_of_time for layer in layers) / share
    evidence = f"{percent(share)} of the time reaches {percent(reached)} of this machine's peak"
    own = peak_of(case.roofline, case.precision or "fp32")
    int8 = peak_of(case.roofline, "int8")
    if own and int8 and int8 > own and _may_try_int8(case):
        return Advice(
            topic="precision",
            what="Try int8: `edgeclip export STUDENT --precisions int8`, which is refused "
            "outside its quality gates",
            evidence=f"{evidence}, and int8's peak is {int8:.0f}, not {own:.0f} GFLOP/s",
            gains="latency",
            at_most=amdahl(share, int8 / own),
        )
    return Advice(
        topic="model",
        what="Only a smaller model makes this faster: `edgeclip distill --image-layers` and "
        "`--text-layers` (half of them is the bound here)",
        evidence=evidence,
        gains="latency",
        at_most=amdahl(share, 2),
    )


def smaller_weights(case: Case) -> Advice | None:
    """Products that wait for memory, at more than 60% of its bandwidth, take most of the time.

    int8 weights have a quarter of the bytes, fp16 half of them; on a CPU fp16 weights are
    made fp32 when they are loaded. What the same run has tried is not named.
    """
    layers = [item for item in _held_by(case, "memory") if item.op != "MultiHeadAttention"]
    share = share_of_time(layers)
    if share <= _MOST or case.precision not in ("fp32", "fp16"):
        return None
    tried = case.measured_precisions()
    half = case.precision == "fp32" and not case.device.on_cpu and "fp16" not in tried
    if half and "fp16" in case.device.precisions:
        precision, times = "fp16", 2.0
    elif _may_try_int8(case):
        stored_as_fp32 = case.precision == "fp32" or case.device.on_cpu
        precision, times = "int8", 4.0 if stored_as_fp32 else 2.0
    else:
        return None
    moved = max(item.achieved_gb_s or 0 for item in layers)
    return Advice(
        topic="precision",
        what=f"Make the weights smaller: `edgeclip export STUDENT --precisions {precision}`, "
        "which is refused outside its quality gates",
        evidence=f"{percent(share)} of the time goes to products that wait for memory, at up to "
        f"{moved:.3g} GB/s",
        gains="latency",
        at_most=amdahl(share, times),
    )


def short_layers(case: Case) -> Advice | None:
    """At least 10 layers too short to tell anything of take most of the time.

    Not where profiling makes the tower more than 1.5 times as slow: then it is the profiler.
    """
    layers = [item for item in case.distances if item.limit == "overhead"]
    share = share_of_time(layers)
    if len(layers) < _MANY or share <= _MOST or not _believable(case):
        return None
    return Advice(
        topic="short layers",
        what=f"Have fewer and larger layers: {_FUSE}, a larger batch shares what starting a "
        "layer costs, and one thread needs no waking",
        evidence=f"{len(layers)} layers that take less than 0.01 ms each have {percent(share)} "
        "of the time",
        gains="latency",
        at_most=amdahl(share),
    )


def islands(case: Case) -> Advice | None:
    """Nodes that only convert (Q/DQ, Cast or Transpose) take at least 10% of the time.

    Not where profiling makes the tower more than 1.5 times as slow.
    """
    found = {
        kind: [item for item in case.distances if item.op in operators]
        for kind, operators in _ISLANDS.items()
    }
    kind = max(found, key=lambda name: share_of_time(found[name]))
    layers, share = found[kind], share_of_time(found[kind])
    if share < _NOTABLE or not _believable(case):
        return None
    slowest = sorted(layers, key=lambda item: -item.ms)[:3]
    return Advice(
        topic="islands",
        what=f"Look at the {kind} nodes: {_MENDS[kind]}",
        evidence=f"{len(layers)} of them have {percent(share)} of the time, the slowest are "
        + ", ".join(f"{item.name} ({item.ms:.3g} ms)" for item in slowest),
        gains="latency",
        at_most=amdahl(share),
    )


def _held_by(case: Case, limit: Limit) -> list[LayerDistance]:
    """Products close to that side of their roof; none where the roof is too low.

    What is far above the roof of the memory has its data in a cache, and waits for nothing.
    """
    if case.above_the_roof() is not None:
        return []
    return [
        item
        for item in case.distances
        if item.limit == limit
        and _NEAR <= (item.share or 0) <= NOISE
        and (is_product(item.op) or item.op in _TENSORRT_PRODUCTS)
        and _told_by_engine(case)
    ]


def _told_by_engine(case: Case) -> bool:
    """Times of ONNX Runtime's nodes on a GPU are the host's, which goes on meanwhile."""
    return case.device.on_cpu or not case.device.engine.startswith("onnxruntime")


def _may_try_int8(case: Case) -> bool:
    return (
        case.precision not in (None, "int8")
        and "int8" in case.device.precisions
        and "int8" not in case.measured_precisions()
    )


def _believable(case: Case) -> bool:
    layers = case.measurement.layers
    if layers is None or not _told_by_engine(case):
        return False
    return sum(layer.ms for layer in layers.layers) <= _PROFILING * layers.plain_ms
