"""Select the precision that a tower ships in: the fastest on this machine inside its gates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from edgeclip.export.graph.embedders import Embedder
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    repeat_rows,
)
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.spec import Precision, Tower

REFERENCE: Precision = "fp32"
SELECTION_WORKLOAD = Workload(
    name="choose",
    description="latency at batch 1, enough to tell which precision is faster",
    batch_sizes=(1,),
    min_warmup_runs=5,
    max_warmup_seconds=2,
    repeats=60,
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
    embedders: Mapping[Precision, Embedder],
    inputs: NDArray[Any],
    workload: Workload = SELECTION_WORKLOAD,
) -> SelectedPrecision:
    """Benchmark the precisions of a tower, interleaved, and select the fastest.

    Another precision than fp32 is selected only if the whole interval of its time divided by that
    of fp32, round by round, is below 1.

    Args:
        tower: the tower.
        embedders: one for each precision inside its gates, including fp32.
        inputs: some of the tower's inputs [N, ...]; the first one is timed.
        workload: how much to measure.

    Raises:
        EngineError: an engine fails.
    """
    targets = [
        BenchmarkTarget(name=name, run=embed, make_batch=repeat_rows(inputs))
        for name, embed in embedders.items()
    ]
    measured = measure_interleaved(targets, workload, part=tower, reference=REFERENCE)
    best, best_ratio = REFERENCE, 1.0
    notes = []
    for precision, item in zip(embedders, measured, strict=True):
        if item.ratio is None:
            continue
        ratio = item.ratio.ratio
        notes.append(f"{precision} takes {ratio.value:.2f} of the time of fp32")
        if ratio.high < 1 and ratio.value < best_ratio:
            best, best_ratio = precision, ratio.value
    why = f"fastest inside its gates: {', '.join(notes)}"
    return SelectedPrecision(
        tower=tower,
        precision=best,
        why=why if notes else "the only precision in the bundle",
        measurements=measured,
    )
