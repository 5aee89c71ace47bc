"""LayerProfile: how long each node of a graph takes, as its engine tells."""

from dataclasses import dataclass


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
