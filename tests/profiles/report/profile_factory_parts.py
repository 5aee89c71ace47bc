"""Parts of the measurements of `profile_factory` that look inside a subject."""

import math
from dataclasses import replace

from edgeclip.profiles.record.measurement import (
    ColdStart,
    Energy,
    Latency,
    LayerProfile,
    LayerTime,
    Roofline,
    ScenarioResult,
    StageName,
    StageTime,
    StartIntervals,
)
from edgeclip.runtime.stats.interval import Interval

STAGES: tuple[tuple[StageName, float], ...] = (
    ("read", 0.06),
    ("decode", 2.31),
    ("resize", 0.74),
    ("copy", 0.05),
    ("run", 0.71),
    ("post", 0.02),
)


def around(value: float, share: float = 0.02) -> Interval:
    """An interval of that share to both sides."""
    return Interval(value, value * (1 - share), value * (1 + share))


def cold_start_of(ms: float, size: int) -> ColdStart:
    """Means over five processes."""
    steps = (182.0, 12 + size / 2e5, ms * 2.4)
    import_ms, load_ms, first_run_ms = steps
    return ColdStart(
        processes=5,
        import_ms=import_ms,
        load_ms=load_ms,
        first_run_ms=first_run_ms,
        peak_memory_mb=61 + 2.2 * size / 1e6,
        file_bytes=size,
        intervals=StartIntervals(
            import_ms=around(import_ms, 0.2),
            load_ms=around(load_ms, 0.2),
            first_run_ms=around(first_run_ms, 0.2),
            total_ms=around(math.fsum(steps), 0.1),
        ),
    )


def energy_of(ms: float) -> Energy:
    """By the processor's own counter."""
    return Energy(
        sensor="RAPL packages",
        covers="processor package",
        joules=around(ms * 0.021, 0.06),
        idle_watts=9.4,
    )


def stages_of(factor: float) -> tuple[StageTime, ...]:
    """Steps of an answer that takes `factor` times as long as the drawn one."""
    return tuple(StageTime(name=name, ms=around(ms * factor, 0.03)) for name, ms in STAGES)


def scenarios_of(ms: float) -> tuple[ScenarioResult, ...]:
    """All four of LoadGen, of which Server missed its bound."""

    def latency(factor: float) -> Latency:
        return Latency(
            runs=4000,
            p50_ms=around(ms * factor),
            p90_ms=around(1.1 * ms * factor),
            p95_ms=around(1.2 * ms * factor),
            p99_ms=around(1.6 * ms * factor, 0.1),
            p99_9_ms=around(3 * ms * factor, 0.2),
        )

    single = ScenarioResult(
        scenario="SingleStream",
        queries=14620,
        samples_per_query=1,
        seconds=10.0,
        latency=latency(1.02),
        samples_per_s=around(980 / ms, 0.01),
        target_qps=None,
        bound_ms=None,
        bound_percentile=None,
        valid=True,
        loadgen_p50_ms=1.021 * ms,
        reasons=(),
        settings=(("min_duration_ms", "10000"),),
    )
    return (
        single,
        replace(
            single,
            scenario="MultiStream",
            queries=1930,
            samples_per_query=8,
            seconds=10.2,
            latency=latency(7.4),
            samples_per_s=around(1081 / ms, 0.01),
            loadgen_p50_ms=7.41 * ms,
        ),
        replace(
            single,
            scenario="Server",
            queries=7200,
            seconds=10.1,
            latency=latency(1.9),
            samples_per_s=around(490 / ms, 0.01),
            target_qps=500 / ms,
            bound_ms=2 * ms,
            bound_percentile=99.0,
            valid=False,
            loadgen_p50_ms=1.9 * ms,
            reasons=("Early stopping: 99.00 percentile latency bound was not met",),
        ),
        replace(
            single,
            scenario="Offline",
            queries=1,
            samples_per_query=24576,
            seconds=11.4,
            latency=None,
            samples_per_s=around(1480 / ms, 0.01),
            loadgen_p50_ms=None,
        ),
    )


def layers_of(total: float) -> LayerProfile:
    """Four blocks of a small vision transformer in int8, and what surrounds them."""
    found: list[tuple[str, str, float, float | None, float | None]] = [
        ("/vision_model/embeddings/patch_embedding/Conv_quant", "QLinearConv", 9, 9.6e6, 4.4e5),
        ("Sub_3", "Sub", 8.9, 1.2e4, 9.8e4),
        ("Div_4", "Div", 7.6, 1.2e4, 9.8e4),
        ("/vision_model/Reshape", "Reshape", 0.4, 0.0, 9.8e4),
        ("opaque_fusion_0", "Attention", 6.0, None, None),
    ]
    for block in range(4):
        where = f"/vision_model/encoder/layers.{block}"
        found += [
            (f"{where}/mlp/fc1/MatMul_quant", "MatMulInteger", 7 - block / 3, 1.7e7, 2.9e5),
            (f"{where}/mlp/fc2/MatMul_quant", "MatMulInteger", 6.4 - block / 3, 1.7e7, 2.9e5),
            (f"{where}/self_attn/qkv/MatMul_quant", "MatMulInteger", 4.1, 1.2e7, 2.2e5),
            (f"{where}/layer_norm1/LayerNormalization", "LayerNormalization", 0.9, 5e4, 6.6e4),
            (f"{where}/mlp/activation_fn/Gelu", "Gelu", 1.3, 1.3e5, 2.6e5),
        ]
    whole = math.fsum(weight for _, _, weight, _, _ in found)
    layers = sorted(
        (
            LayerTime(
                name=name,
                op=op,
                provider="CPUExecutionProvider",
                ms=1.04 * total * weight / whole,
                share=weight / whole,
                flops=flops,
                bytes=moved,
            )
            for name, op, weight, flops, moved in found
        ),
        key=lambda layer: -layer.ms,
    )
    return LayerProfile(
        source="ONNX Runtime profiling",
        runs=200,
        total_ms=1.04 * total,
        plain_ms=total,
        layers=tuple(layers),
    )


def roofline() -> Roofline:
    """Of two threads."""
    return Roofline(
        threads=2,
        peak_gflops=(("fp32", around(231.0, 0.02)), ("int8", around(812.0, 0.03))),
        bandwidth_gb_s=around(21.4, 0.04),
        method="A 2048 x 2048 product, and a triad over 512 MB.",
    )
