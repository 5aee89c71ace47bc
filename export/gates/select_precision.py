"""Select the precision that a tower ships in: the fastest on this machine inside its gates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgeclip.export.graph.embedders import Embedder
from edgeclip.profiles.measure.interleaved_loads import LoadableTarget, load_ratio, measure_loads
from edgeclip.profiles.measure.interleaved_runs import repeat_rows
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.record.timing_statistics import surely_below
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.spec import Precision, Tower

REFERENCE: Precision = "fp32"
SELECTION_WORKLOAD = Workload(
    name="choose",
    description="latency at batch 1 in each load, enough to tell which precision is faster",
    batch_sizes=(1,),
    min_warmup_runs=5,
    max_warmup_seconds=0.5,
    repeats=15,
    seconds_per_batch=1,
    cold_starts=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedPrecision:
    """The precision selected for a tower, the reason, and the measurements of all precisions.

    `measurements` is empty if nothing was measured.
    """

    tower: Tower
    precision: Precision
    why: str
    measurements: tuple[Measurement, ...] = ()

    def latency_ms(self, precision: Precision) -> float | None:
        """Return the median time of one call at batch 1, if it was measured."""
        found = [item for item in self.measurements if item.name == precision]
        return found[0].latency.p50_ms.value if found else None


def select_precision(
    tower: Tower,
    loaders: Mapping[Precision, Callable[[], Embedder]],
    inputs: NDArray[Any],
    workload: Workload = SELECTION_WORKLOAD,
) -> SelectedPrecision:
    """Benchmark the precisions of a tower, interleaved over several loads; select the fastest.

    Another precision than fp32 is selected only if it is surely faster: by Student's t over the
    loads' ratios to fp32, at 97.5% for all precisions together.

    Args:
        tower: the tower.
        loaders: one for each precision inside its gates, including fp32; loads its engine anew.
        inputs: some of the tower's inputs [N, ...]; the first one is timed.
        workload: how much to measure in each load.

    Raises:
        EngineError: an engine fails.
    """
    targets = [
        LoadableTarget(name=name, load=load, make_batch=repeat_rows(inputs))
        for name, load in loaders.items()
    ]
    measured = measure_loads(targets, workload, part=tower, reference=REFERENCE)
    found = dict(zip(loaders, measured, strict=True))
    base = found[REFERENCE]
    ratios = {name: load_ratio(item, base) for name, item in found.items() if name != REFERENCE}
    surely = dict(zip(ratios, surely_below(list(ratios.values())), strict=True))
    faster = [name for name in ratios if surely[name]]
    notes = [
        f"{name} takes {ratio.value:.2f} of the time of fp32"
        + ("" if surely[name] else " (not surely less)")
        for name, ratio in ratios.items()
    ]
    return SelectedPrecision(
        tower=tower,
        precision=min(faster, key=lambda name: ratios[name].value, default=REFERENCE),
        why=f"fastest inside its gates: {', '.join(notes)}"
        if notes
        else "the only precision in the bundle",
        measurements=measured,
    )
