"""Which remedies the quantization search chooses where plain int8 fails its gates.

Three image towers are searched for this machine, as `edgeclip quantize` does:

- the built-in teacher with outlier channels planted behind every LayerNorm;
- the same with outlier channels planted in the values of every attention too;
- a CLIP ViT-B/32 with random weights, whose retrieval means nothing and is not judged.

Each remedy is also measured alone on the plain recipe. Planting changes no embedding in fp32.
A remedy wins if it is part of the configuration that is shipped. Takes some twenty minutes.
"""

import copy
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bars import Bar, finish, options
from _quantizer_grow import plant_outliers
from graph_work import random_vit_b32

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, Bounds
from edgeclip.export.quantizing.candidate_evaluator import SEARCH_WORKLOAD, open_evaluator
from edgeclip.export.quantizing.config import StaticInt8, describe
from edgeclip.export.quantizing.quantization_file import export_searched
from edgeclip.export.quantizing.search import TrialLog, search
from edgeclip.export.quantizing.search_table import search_table
from edgeclip.export.quantizing.search_task import (
    JudgedPairs,
    SearchTask,
    search_space,
    split_calibration,
)
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.spec import Precision

_OUTLIERS, _FACTOR = 0.01, 64.0  # share of the channels of the values, and how much larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration, and what was measured of it on held-out calibration pairs."""

    name: str
    mean_cosine: float | None
    time_ratio: float | None
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """One tower: each remedy alone, all that the search tried, and what it ships."""

    model: str
    alone: tuple[Candidate, ...]
    tried: tuple[Candidate, ...]
    chosen: str
    why: str
    remedies: tuple[str, ...]


def plant_values(dual: DualEncoder, *, seed: int = 1) -> DualEncoder:
    """Return a copy that computes the same, with some channels of each attention's values larger.

    Attention averages values channel by channel, so the projection behind it undoes the factor.
    """
    planted = copy.deepcopy(dual)
    draw = np.random.default_rng(seed)
    model: Any = planted.model
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            values, result = layer.self_attn.v_proj, layer.self_attn.out_proj
            count = len(values.weight)
            for channel in draw.choice(count, max(1, round(_OUTLIERS * count)), replace=False):
                values.weight[channel] *= _FACTOR
                values.bias[channel] *= _FACTOR
                result.weight[:, channel] /= _FACTOR
    return planted


def remedies_of(config: StaticInt8, recipe: StaticInt8) -> tuple[str, ...]:
    """What a configuration has beside the plain recipe, in words."""
    plain = describe(recipe).split(", ")
    return tuple(word for word in describe(config).split(", ") if word not in plain)


def searched(
    name: str, dual: DualEncoder, bounds: dict[Precision, Bounds], *, minutes: float, pairs: int
) -> Searched:
    """Search one image tower, and measure each remedy alone."""
    device, size = load_device(THIS_MACHINE), dual.image_spec.size
    calibration = EmojiSource("calibration", 2 * pairs, size=size, distinct=True)
    ranges, steering = split_calibration(calibration, pairs)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_searched(dual, "image", device, Path(folder), sample=None)
        task = SearchTask(
            student=dual,
            graph=exported.graph,
            device=device,
            ranges=ranges,
            steering=JudgedPairs(pairs=steering),
            test=JudgedPairs(pairs=EmojiSource("test", pairs, size=size, distinct=True)),
            bounds=bounds,
            workload=SEARCH_WORKLOAD,
        )
        space = search_space(device, "image", here=True)
        assert space.recipe is not None
        with open_evaluator(task, Path(folder) / "search") as trial:
            log = TrialLog(trial, progress=_say)
            for change in (trial.with_smoothing, *space.remedies, *space.cheaper):
                log.evaluate(change(space.recipe))
            result = search(trial, space, minutes=minutes, progress=_say)
    print(f"\n{name}\n{search_table(result)}", flush=True)
    config = result.chosen.config
    found = remedies_of(config, space.recipe) if isinstance(config, StaticInt8) else ()
    return Searched(
        model=name,
        alone=tuple(map(_candidate, log.candidates.values())),
        tried=tuple(map(_candidate, result.candidates)),
        chosen=result.chosen.name,
        why=result.why,
        remedies=found,
    )


def main() -> int:
    """Search the towers, print what won, write the figures."""
    args = options(__doc__ or "").parse_args()
    pairs, minutes = (32, 0.5) if args.quick else (128, 2.0)
    planted = plant_outliers(DualEncoder.load(BUILT_IN_TEACHER))
    cosines = {
        name: replace(bounds, r1_loss=100.0, zero_shot_loss=100.0)
        for name, bounds in DEFAULT_BOUNDS.items()
    }
    found = [
        searched("teacher, norms planted", planted, DEFAULT_BOUNDS, minutes=minutes, pairs=pairs),
        searched(
            "teacher, norms and values planted",
            plant_values(planted),
            DEFAULT_BOUNDS,
            minutes=minutes,
            pairs=pairs,
        ),
        searched(
            "random ViT-B/32", random_vit_b32(), cosines, minutes=minutes + 1, pairs=pairs // 2
        ),
    ]
    for item in found:
        print(f"{item.model}: {', '.join(item.remedies) or 'no remedy'} ({item.chosen})")
    bars = [
        Bar(name="searches_that_found_int8", value=_int8(found), direction=">=", bound=len(found))
    ]
    return finish(bars, args.out, searched=[asdict(item) for item in found])


def _int8(found: list[Searched]) -> int:
    return sum("int8" in item.chosen for item in found)


def _candidate(point: Any) -> Candidate:
    return Candidate(
        name=point.name,
        mean_cosine=None if point.cosine is None else point.cosine.value,
        time_ratio=point.ratio,
        passed=point.passed,
    )


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
