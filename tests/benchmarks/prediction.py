"""Does the predicted latency of students that were never measured hold on this machine?

Students of random sizes are exported with random weights and measured in turns with the probes;
their times are then predicted from the probes alone. The same is done with the costs of all but
a few probes transferred: from one thread to two and back, and from fp32 to int8.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _bars import Rule, command, finish, hold, options

from edgeclip.export.probes.probe_plan import STANDARD, ProbePlan
from edgeclip.export.probes.write_probes import write_probes
from edgeclip.profiles.predict.measure_probes import measure_probes, transfer_costs
from edgeclip.profiles.predict.measured_device import CheckTime, MeasuredDevice
from edgeclip.profiles.predict.predict_latency import Predictor
from edgeclip.profiles.predict.probe_set import ProbeSet
from edgeclip.profiles.predict.tower_shapes import (
    AnyTower,
    ConvTower,
    TransformerTower,
    image_tokens,
)
from edgeclip.runtime.console import columns, percent, percent_interval, progress_bar
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.percentiles import estimate_percentile
from edgeclip.runtime.stats.shares import estimate_share

BARS: dict[str, Rule] = {
    "prediction_error_two_threads": ("<=", 10.0, "%"),
    "prediction_error_one_thread": ("<=", 10.0, "%"),
}
SEED = 20
PICTURES = ((64, 8), (96, 16), (224, 32), (224, 16), (224, 14))  # side, patch of known CLIPs
TEXTS = 3
CONVS = (64, 64, 128, 224)  # side of the pictures
QUICK = ProbePlan(
    images=tuple(item for item in STANDARD.images if item.image_size == 64 and item.width < 512),
    texts=tuple(replace(item, lengths=(8, 24)) for item in STANDARD.texts if item.width < 512),
    convs=tuple(item for item in STANDARD.convs if item.side <= 16 and item.width <= 128),
    checks=STANDARD.checks[5:6],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One student in one precision, one way of predicting it."""

    how: str
    student: str
    measured_ms: float
    predicted_ms: float
    low: float
    high: float
    level: float | None

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.measured_ms <= self.high


def unseen(seed: int, *, quick: bool) -> Iterator[AnyTower]:
    """Students of random sizes; no probe is as wide as any of them."""
    draw = np.random.default_rng(seed)
    for size, patch in PICTURES[:1] if quick else PICTURES:
        heads = int(draw.choice([3] if quick else [3, 5, 6, 7]))
        layers = int(draw.integers(3, 9))
        yield transformer("image", heads, layers, image_tokens(size, patch), patch)
    for _ in range(1 if quick else TEXTS):
        heads = int(draw.choice([3] if quick else [3, 5, 6]))
        yield transformer("text", heads, int(draw.integers(2, 9)), int(draw.integers(6, 24)), 0)
    for size in CONVS[:1] if quick else CONVS:
        first = int(draw.choice([24, 40, 56] if quick else [24, 40, 56, 72, 80]))
        depths = tuple(int(value) for value in draw.integers(1, 5, 3))
        widths = (first, 2 * first, 4 * first)
        yield ConvTower(widths=widths, depths=depths, image_size=size, dim=256)


def transformer(part: Tower, heads: int, layers: int, tokens: int, patch: int) -> TransformerTower:
    """Heads of 64 channels, as in the students of nearly every CLIP; embeddings of 256."""
    sizes: dict[str, Any] = {"width": 64 * heads, "heads": heads, "hidden": 256 * heads}
    return TransformerTower(part=part, layers=layers, tokens=tokens, dim=256, patch=patch, **sizes)


def measure(
    probes: ProbeSet, threads: int, rounds: int, known: set[str]
) -> tuple[MeasuredDevice, tuple[CheckTime, ...]]:
    """The device with its own checks only, and the students' times apart."""
    device = replace(load_device(THIS_MACHINE), threads=threads)
    name = f"{threads} thread{'s' * (threads > 1)}"
    with progress_bar(name) as progress:
        found = measure_probes(
            probes, device=device, name=name, command=command(), rounds=rounds, progress=progress
        )
    own = tuple(item for item in found.checks if item.name in known)
    students = tuple(item for item in found.checks if item.name not in known)
    return replace(found, checks=own), students


def predict(how: str, device: MeasuredDevice, students: Sequence[CheckTime]) -> Iterator[Row]:
    predictor = Predictor(device)
    for item in students:
        if item.precision in device.precisions:
            found = predictor.predict_blocks(item.parts, item.precision)
            yield Row(
                how=how,
                student=item.name.removeprefix("check-"),
                measured_ms=item.ms.value,
                predicted_ms=found.ms,
                low=found.low,
                high=found.high,
                level=found.level,
            )


def only_few(device: MeasuredDevice, few_checks: set[str]) -> MeasuredDevice:
    """As if only the few had been measured."""
    costs = tuple(cost for cost in device.costs if cost.few)
    checks = tuple(check for check in device.checks if check.name in few_checks)
    return replace(device, costs=costs, checks=checks)


def as_int8(device: MeasuredDevice) -> MeasuredDevice:
    """What was measured in fp32, as if it were another device's int8."""
    fp32 = [cost for cost in device.costs if cost.precision == "fp32"]
    costs = tuple(replace(cost, precision="int8") for cost in fp32)
    return replace(device, name=f"fp32 on {device.name}", costs=costs, checks=())


def with_floats_as_int8(device: MeasuredDevice) -> MeasuredDevice:
    """Stems are float in every precision: give them the name that `as_int8` gives."""
    floats = ("image-stem", "conv-stem", "conv-down")
    costs = tuple(
        replace(cost, precision="int8")
        for cost in device.costs
        if cost.precision == "int8" or cost.piece.kind in floats
    )
    checks = tuple(check for check in device.checks if check.precision == "int8")
    return replace(device, costs=costs, checks=checks)


def show(rows: Sequence[Row]) -> None:
    """A table of one way of predicting; median and worst error, bias, how often bounds held."""
    cells: list[tuple[str, ...]] = [
        ("student", "measured", "predicted", "low", "high", "error", "")
    ]
    for row in rows:
        times = (row.measured_ms, row.predicted_ms, row.low, row.high)
        mark = "" if row.inside else "OUTSIDE"
        cells.append((row.student, *(f"{ms:.3f}" for ms in times), f"{row.error:+.1%}", mark))
    errors = np.array([row.error for row in rows])
    print(f"\n{rows[0].how}\n{columns(cells)}")
    # A student in two precisions is one student.
    towers = [row.student.removesuffix("-int8").removesuffix("-fp32") for row in rows]
    clusters = np.unique(towers, return_inverse=True)[1].astype(np.int64)
    inside = estimate_share(np.array([row.inside for row in rows]), clusters).interval
    levels = sorted({row.level for row in rows if row.level is not None})
    promised = " or ".join(map(percent, levels)) or "none"
    print(
        f"error {np.median(abs(errors)):.1%} (median), {abs(errors).max():.1%} (worst), "
        f"{np.median(errors):+.1%} (bias); {percent(inside.value)} of {len(rows)} between their "
        f"bounds ({percent_interval(inside)}; promised: {promised})",
        flush=True,
    )


def evaluate(probes: ProbeSet, plan: ProbePlan, rounds: int) -> tuple[list[Row], bool | None]:
    """Measure with two threads and with one, and predict in every way."""
    known = {check.name for check in plan.check_towers()}
    few = {check.name for check in plan.check_towers() if check.few}
    two, students = measure(probes, 2, rounds, known)
    one, alone = measure(probes, 1, rounds, known)
    few_two, few_one = only_few(two, few), only_few(one, few)
    int8 = transfer_costs(as_int8(two), with_floats_as_int8(few_two))
    students_int8 = [item for item in students if item.precision == "int8"]
    ways: tuple[tuple[str, MeasuredDevice, Sequence[CheckTime]], ...] = (
        ("two threads, all probes", two, students),
        ("one thread, all probes", one, alone),
        ("two threads, transferred from one", transfer_costs(one, few_two), students),
        ("one thread, transferred from two", transfer_costs(two, few_one), alone),
        ("int8, transferred from fp32", int8, students_int8),
    )
    rows: list[Row] = []
    for way in ways:
        found = [*predict(*way)]
        show(found)
        rows += found
    watched = [item.interference.disturbed for item in (one, two) if item.interference is not None]
    told = [disturbed for disturbed in watched if disturbed is not None]
    return rows, any(told) if told else None


def main() -> int:
    args = options(__doc__).parse_args()
    plan = QUICK if args.quick else STANDARD
    towers = tuple((tower, False) for tower in unseen(SEED, quick=args.quick))
    with tempfile.TemporaryDirectory() as folder:
        print("writing probes and students", flush=True)
        probes, device = Path(folder) / "probes", load_device(THIS_MACHINE)
        everything = replace(plan, checks=(*plan.checks, *towers))
        write_probes(probes, device=device, command=command(), plan=everything)
        rows, disturbed = evaluate(ProbeSet.open(probes), plan, 8 if args.quick else 40)
    bars = []
    for threads in ("two threads", "one thread"):
        errors = [abs(row.error) for row in rows if row.how == f"{threads}, all probes"]
        name = f"prediction_error_{threads.replace(' ', '_')}"
        bars.append(hold(BARS, name, estimate_percentile(100 * np.array(errors), 50).interval))
    told = [asdict(row) | {"error": row.error, "inside": row.inside} for row in rows]
    return finish(bars, args.out, disturbed=disturbed, rows=told)


if __name__ == "__main__":
    sys.exit(main())
