"""Does `edgeclip tune` find the fastest way? Its choice against a full run of all ways.

The kept student, and a ViT-B/32 of random weights, exported here in fp32, fp16 and int8. A tower is
tuned as the command does; then every way that is right, and at a glance took less than twice the
time of the best, is loaded six times and timed interleaved with the choice and all others of its
batch, and the choice is compared with the fastest. These are other runs than those of the choice.
On a processor with AMX the best way at batch 16 is also compared with ONNX Runtime in fp32 on all
cores; other processors have no such bar.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _bars import Bar, Rule, finish, hold, options, say, span
from graph_work import random_vit_b32

from edgeclip.compress.data.open_source import open_source
from edgeclip.export.bundle.build_bundle import build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.profiles.measure.tune import (
    Goal,
    TimedConfig,
    devices_here,
    time_configs,
    tune_tower,
)
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.device.machine import detect_processor
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "*_over_best": ("<=", 1.03, ""),
    "*_batch_16_over_onnxruntime_fp32": ("<=", 0.22, ""),
}
KEPT_MODELS = ("export/emoji_bundle",)

ROOT = Path(__file__).parents[2]
_SLOW = 2.0  # a way that took so many times the least time is not the fastest
_SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tower tuned for a goal: the choice's time over that of the fastest in the full run."""

    model: str
    tower: Tower
    goal: Goal
    usual: str
    chosen: str
    fastest: str
    over_best: Interval
    over_usual: Interval
    ways: tuple[TimedConfig, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return f"{self.model}_{self.tower}_{self.goal}"


def vit_b32_bundle(folder: Path, *, quick: bool) -> Bundle:
    """A bundle of random weights: bounds of retrieval are open, parity and agreement are not."""
    torch.manual_seed(0)
    plan = BundlePlan(
        student=random_vit_b32(**(_SMALL if quick else {})),
        calibration=open_source("emoji", split="calibration", count=32, size=224),
        test=open_source("emoji", split="test", count=32, size=224),
        device=load_device("this-machine"),
        origin=Origin(
            name="vit_b32", teacher="none", student="random", command=__file__, licence="none"
        ),
        bounds={name: replace(item, r1_loss=100.0) for name, item in DEFAULT_BOUNDS.items()},
        workload=None,
        accept_undecided=True,
    )
    return build_bundle(plan, folder / "bundle").bundle


def measure(bundle: Bundle, tower: Tower, goal: Goal) -> Case:
    """Tune a tower, then run all ways interleaved, their ratios to the choice."""
    name = bundle.manifest.name
    say(f"{name} {tower} {goal}")
    found = tune_tower(bundle, tower, devices_here(load_device("this-machine")), goal)
    chosen = found.chosen.config
    least = min(item.ms_per_row.value for item in found.timed)
    others = [
        item.config
        for item in found.timed
        if item.config != chosen and (item.compared or item.ms_per_row.value < _SLOW * least)
    ]
    timed = list[TimedConfig]()
    for batch in sorted({way.batch for way in others}):  # a group at a time, for memory's sake
        group = [chosen, *(way for way in others if way.batch == batch)]
        own, *rest = time_configs(bundle, tower, group)
        timed += [own, *rest] if batch == chosen.batch else rest
    best = min(timed, key=lambda item: 1.0 if item.ratio is None else item.ratio.value)
    usual = next(item for item in timed if item.config == found.default)
    return Case(
        model=name,
        tower=tower,
        goal=goal,
        usual=str(found.default),
        chosen=str(chosen),
        fastest=str(best.config),
        over_best=inverse(best.ratio),
        over_usual=inverse(usual.ratio),
        ways=tuple(timed),
        left_out=found.left_out,
    )


def inverse(ratio: Interval | None) -> Interval:
    """The choice's time over another's, of the other's over the choice's; 1 for the choice."""
    if ratio is None:
        return Interval(1.0, 1.0, 1.0)
    low = float("inf") if ratio.low <= 0 else 1 / ratio.low
    return Interval(1 / ratio.value, 1 / ratio.high, low)


def batch_16(case: Case) -> Interval | None:
    """The best way at batch 16 over ONNX Runtime's fp32 at that batch, on all cores."""
    rows = [item for item in case.ways if item.config.batch == 16]
    base = [
        item
        for item in rows
        if (item.config.device.engine, item.config.precision) == ("onnxruntime-cpu", "fp32")
    ]
    if not base:
        return None
    reference = min(base, key=lambda item: -item.config.device.threads)
    best = min(rows, key=lambda item: item.ms_per_row.value)
    value = best.ms_per_row.value / reference.ms_per_row.value
    low = best.ms_per_row.low / reference.ms_per_row.high
    return Interval(value, low, best.ms_per_row.high / reference.ms_per_row.low)


def table(case: Case) -> str:
    """The fastest ways of a case in the full run, then the choice."""
    rows = [("way", "ms a row")]
    ordered = sorted(case.ways, key=lambda item: item.ms_per_row.value)
    rows += [(str(item.config), span(item.ms_per_row)) for item in ordered[:8]]
    lines = [f"{case.model}, {case.tower} tower, {case.goal}", columns(rows, left=1)]
    lines.append(f"chosen: {case.chosen}")
    lines.append(f"over the fastest {span(case.over_best)}, over the usual {span(case.over_usual)}")
    batch = batch_16(case)
    if batch is not None:
        lines.append(f"best at batch 16 over ONNX Runtime fp32 {span(batch)}")
    return "\n".join([*lines, *(f"left out: {way}: {why}" for way, why in case.left_out)])


def bars(cases: Sequence[Case]) -> Iterator[Bar]:
    """Every choice near the fastest; AMX's at batch 16 where there is AMX."""
    has_amx = "amx_int8" in detect_processor().flags
    for case in cases:
        yield hold(BARS, f"{case.name}_over_best", case.over_best)
        ratio = batch_16(case)
        if has_amx and ratio is not None and case.model == "vit_b32" and case.tower == "image":
            yield hold(BARS, f"{case.name}_batch_16_over_onnxruntime_fp32", ratio)


def main() -> int:
    """Tune, run all, print tables and bars."""
    args = options(__doc__).parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = [
            Bundle.open(ROOT / KEPT_MODELS[0]),
            vit_b32_bundle(Path(folder), quick=args.quick),
        ]
        asked: list[tuple[Tower, Goal]] = [
            ("image", "latency"),
            ("text", "latency"),
            ("image", "throughput"),
        ]
        for bundle in bundles:
            for tower, goal in asked:
                cases.append(measure(bundle, tower, goal))
                print(f"\n{table(cases[-1])}", flush=True)
    return finish(list(bars(cases)), args.out, cases=cases)


if __name__ == "__main__":
    sys.exit(main())
