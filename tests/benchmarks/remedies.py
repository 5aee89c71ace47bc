"""Which remedies the quantization search chooses where plain int8 fails its gates.

Three image towers are searched for this machine, as `edgeclip quantize` does: the built-in teacher
with outlier channels planted behind every LayerNorm; the same with some in the values of every
attention too; and a CLIP ViT-B/32 with random weights, whose retrieval is not judged. Each remedy
is also measured alone on the plain recipe. Planting changes no embedding in fp32. A remedy wins if
it is part of the configuration that is shipped. Takes some twenty minutes.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bars import Rule, finish, hold, options, say
from _quantizer_models import plant_outliers, plant_values
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

BARS: dict[str, Rule] = {"searches_that_found_int8": (">=", 3, "")}
KEPT_MODELS = ("compress/emoji_teacher",)


def searched(
    name: str, dual: DualEncoder, bounds: Mapping[Precision, Bounds], minutes: float, pairs: int
) -> dict[str, Any]:
    """Search one image tower, and measure each remedy alone."""
    device, size = load_device(THIS_MACHINE), dual.image_spec.size
    calibration = EmojiSource("calibration", 2 * pairs, size=size, distinct=True)
    ranges, steering = split_calibration(calibration, pairs)
    with tempfile.TemporaryDirectory() as folder:
        task = SearchTask(
            student=dual,
            graph=export_searched(dual, "image", device, Path(folder), sample=None).graph,
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
            log = TrialLog(trial, progress=say)
            for change in (trial.with_smoothing, *space.remedies, *space.cheaper):
                log.evaluate(change(space.recipe))
            result = search(trial, space, minutes=minutes, progress=say)
    config, plain = result.chosen.config, describe(space.recipe).split(", ")
    words = describe(config).split(", ") if isinstance(config, StaticInt8) else ()
    remedies = tuple(word for word in words if word not in plain)
    print(f"\n{name}\n{search_table(result)}\n{', '.join(remedies) or 'no remedy'}", flush=True)
    return {
        "model": name,
        "alone": [candidate(point) for point in log.candidates.values()],
        "tried": [candidate(point) for point in result.candidates],
        "chosen": result.chosen.name,
        "why": result.why,
        "remedies": remedies,
    }


def candidate(point: Any) -> dict[str, Any]:
    """A configuration, and what was measured of it on held-out calibration pairs."""
    cosine = None if point.cosine is None else point.cosine.value
    about = {"name": point.name, "mean_cosine": cosine, "time_ratio": point.ratio}
    return about | {"passed": point.passed}


def main() -> int:
    args = options(__doc__).parse_args()
    pairs, minutes = (32, 0.5) if args.quick else (128, 2.0)
    norms = plant_outliers(DualEncoder.load(BUILT_IN_TEACHER))
    both, vit = plant_values(norms), random_vit_b32()
    unjudged = {
        name: replace(bounds, r1_loss=100.0, zero_shot_loss=100.0)
        for name, bounds in DEFAULT_BOUNDS.items()
    }
    found = [
        searched("teacher, norms planted", norms, DEFAULT_BOUNDS, minutes, pairs),
        searched("teacher, norms and values planted", both, DEFAULT_BOUNDS, minutes, pairs),
        searched("random ViT-B/32", vit, unjudged, minutes + 1, pairs // 2),
    ]
    int8 = sum("int8" in item["chosen"] for item in found)
    bars = [hold(BARS, "searches_that_found_int8", int8)]
    return finish(bars, args.out, searched=found)


if __name__ == "__main__":
    sys.exit(main())
