"""Advice on what lies around the graph: pictures, and the start of a process."""

from edgeclip.runtime.inspecting.advice_case import Advice, Case, amdahl, percent
from edgeclip.runtime.providers import PROVIDERS

_MOST = 0.5  # of the whole
_SLOW_START_MS = 500


def smaller_pictures(case: Case) -> Advice | None:
    """Reading, decoding and resizing take more than half of an answer, and more than running."""
    stages = {item.name: item.ms for item in case.measurement.stages}
    before = {name: stages[name] for name in ("read", "decode", "resize") if name in stages}
    total = sum(ms.value for ms in stages.values())
    if not before or "run" not in stages or total <= 0:
        return None
    share = sum(ms.value for ms in before.values()) / total
    if share <= _MOST or sum(ms.low for ms in before.values()) <= stages["run"].high:
        return None
    parts = ", ".join(f"{name} {ms.value:.3g} ms" for name, ms in before.items())
    return Advice(
        topic="pictures",
        what="Give smaller files, JPEG above all, which is reduced while it is decoded, or camera "
        "frames that have the tower's size already (`Encoder.encode_pixels`)",
        evidence=f"{percent(share)} of {total:.3g} ms go by before the tower runs: {parts}; run "
        f"{stages['run'].value:.3g} ms",
        gains="latency",
        at_most=amdahl(share),
    )


def prebuilt_engine(case: Case) -> Advice | None:
    """Loading takes more than half of a cold start and 0.5 s, and the engine compiles then.

    A CPU or CUDA session of ONNX Runtime has nothing that could be kept, and TensorRT's own
    engines are built before any start.
    """
    start = case.measurement.cold_start
    if start is None or start.load_ms < _SLOW_START_MS:
        return None
    total = start.total_ms
    engine, name = case.device.engine, case.device.name
    provider = PROVIDERS.get(engine)
    if start.load_ms <= _MOST * total or provider is None or not provider.has_context:
        return None
    return Advice(
        topic="start",
        what=f"Keep what {engine} compiles: `edgeclip build BUNDLE --device {name} --out FOLDER` "
        "writes EP contexts",
        evidence=f"loading takes {start.load_ms:.0f} of {total:.0f} ms of a cold start",
        gains="start",
        at_most=amdahl(start.load_ms / total),
    )
