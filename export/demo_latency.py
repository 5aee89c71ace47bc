"""Teacher and student side by side: one image and one caption, interleaved in one run."""

import dataclasses
from collections.abc import Sequence

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.export.demo_quality import STUDENT
from edgeclip.export.embed_pairs import graph_embedder, torch_embedder
from edgeclip.export.to_onnx import TowerPaths
from edgeclip.export.tower_graph import TowerGraph
from edgeclip.profiles.device import DeviceProfile
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle import Bundle
from edgeclip.runtime.intervals import Interval
from edgeclip.runtime.measuring.bundle_candidates import (
    bundle_candidates,
    example_feed,
    golden_inputs,
    measurable_precisions,
)
from edgeclip.runtime.measuring.cold_start import measure_cold_start
from edgeclip.runtime.measuring.interleave import Candidate, measure_interleaved, repeat_rows
from edgeclip.runtime.measuring.measurement import Measurement
from edgeclip.runtime.progress import progress_bar
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.tower_feed import tower_feed

TEACHER_TORCH, TEACHER_ONNX = "teacher torch", "teacher ONNX"
Names = dict[Tower, str]  # which candidate stands for each tower


def measure(
    teacher: DualEncoder,
    teacher_onnx: TowerPaths,
    bundle: Bundle,
    device: DeviceProfile,
    workload: Workload,
) -> tuple[Measurement, ...]:
    """Measure both towers of teacher and student."""
    image = measure_tower(teacher, teacher_onnx.graph("image"), bundle, device, workload)
    return image + measure_tower(teacher, teacher_onnx.graph("text"), bundle, device, workload)


def measure_tower(
    teacher: DualEncoder,
    teacher_onnx: TowerGraph,
    bundle: Bundle,
    device: DeviceProfile,
    workload: Workload,
) -> tuple[Measurement, ...]:
    """Measure the teacher in torch and in ONNX, and the student in all its precisions.

    All get the bundle's golden inputs. Ratios are to the teacher's ONNX.
    """
    tower, spec = teacher_onnx.tower, teacher.image_spec
    inputs = golden_inputs(bundle, tower)
    teacher_embed = graph_embedder(teacher_onnx, spec, device)
    candidates = (
        Candidate(TEACHER_TORCH, torch_embedder(teacher, tower), repeat_rows(inputs)),
        Candidate(TEACHER_ONNX, teacher_embed, repeat_rows(inputs)),
        *bundle_candidates(bundle, tower, device, prefix=STUDENT),
    )
    with progress_bar(f"{tower} tower") as progress:
        measured = measure_interleaved(
            candidates, workload, part=tower, reference=TEACHER_ONNX, progress=progress
        )
    example = tower_feed(inputs[:1], tower, teacher_onnx.pixels, spec)
    models = {TEACHER_ONNX: (teacher_onnx.path, example)} | {
        STUDENT + precision: (
            bundle.tower_path(tower, precision),
            example_feed(bundle, tower, precision),
        )
        for precision in measurable_precisions(bundle, tower, device)
    }
    return tuple(
        dataclasses.replace(
            item,
            cold_start=measure_cold_start(
                *models[item.name], device=device, processes=workload.cold_starts
            ),
        )
        if item.name in models and workload.cold_starts
        else item
        for item in measured
    )


def pair_latency(measured: Sequence[Measurement], names: Names) -> Interval:
    """Milliseconds for one image and one caption: the sum of both towers' medians.

    The ends of the interval are sums of ends, so it covers at least as surely as each.
    """
    parts = [_of(measured, tower, name).latency.p50_ms for tower, name in names.items()]
    return Interval(
        sum(part.value for part in parts),
        sum(part.low for part in parts),
        sum(part.high for part in parts),
    )


def pair_ratio(measured: Sequence[Measurement], names: Names) -> Interval:
    """Time of a student's two towers over the teacher's in ONNX.

    The mean of the towers' paired ratios (medians over rounds), weighted by the teacher's
    time for each; the interval's ends likewise, which is wider than it need be.
    """
    teacher = {tower: _of(measured, tower, TEACHER_ONNX).latency.p50_ms.value for tower in names}
    total = sum(teacher.values())
    value = low = high = 0.0
    for tower, name in names.items():
        paired = _of(measured, tower, name).ratio
        assert paired is not None, "every student is measured against the teacher"
        share = teacher[tower] / total
        value += share * paired.ratio.value
        low += share * paired.ratio.low
        high += share * paired.ratio.high
    return Interval(value, low, high)


def _of(measured: Sequence[Measurement], tower: Tower, name: str) -> Measurement:
    return next(item for item in measured if item.part == tower and item.name == name)
