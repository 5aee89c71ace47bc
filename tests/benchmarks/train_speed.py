"""Training speed of the image tower: number format, attention, patch size, size of the student.

One forward and backward pass of a batch, all candidates in turns in one run. These figures
chose bfloat16, written-out attention and the sizes of the built-in teacher and student.
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _bars import finish, options
from numpy.typing import NDArray
from transformers import CLIPVisionConfig, CLIPVisionModel

from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, measure_interleaved
from edgeclip.runtime.console import columns

_BATCH, _SIZE = 64, 64


_CASES: tuple[dict[str, Any], ...] = tuple(
    {"width": width, "layers": layers, "patch": patch, "attention": attention, "bfloat16": bf16}
    for width, layers, patch, attention, bf16 in (
        (256, 8, 8, "eager", True),
        (256, 8, 8, "sdpa", True),
        (256, 8, 8, "eager", False),
        (256, 8, 16, "eager", True),
        (192, 6, 8, "eager", True),
        (128, 4, 8, "eager", True),
    )
)


def training_pass(case: dict[str, Any]) -> BenchmarkTarget:
    width = case["width"]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=case["layers"],
        num_attention_heads=width // 64,
        image_size=_SIZE,
        patch_size=case["patch"],
    )
    model = CLIPVisionModel(config)
    model.set_attn_implementation(case["attention"])
    pixels = torch.randn(_BATCH, 3, _SIZE, _SIZE)

    def run(_: NDArray[Any]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=case["bfloat16"]):
            pooled = model(pixel_values=pixels).pooler_output
        pooled.float().square().mean().backward()

    return BenchmarkTarget(" ".join(map(str, case.values())), run, lambda size: np.zeros((size, 1)))


def main() -> int:
    args = options(__doc__).parse_args()
    amount = replace(TUNING_WORKLOAD, min_warmup_runs=1, max_warmup_seconds=1e-3)
    amount = replace(amount, repeats=3 if args.quick else 12)
    passes = [training_pass(case) for case in _CASES]
    found = measure_interleaved(passes, amount, part="image", reference=passes[0].name)
    rows, cells = [], [(" ".join(_CASES[0]), "images/s", "of the first")]
    for case, item in zip(_CASES, found, strict=True):
        rate = 1e3 * _BATCH / item.latency.p50_ms.value
        share = 1.0 if item.ratio is None else 1 / item.ratio.ratio.value
        rows.append(case | {"images_per_s": rate, "of_the_first": share})
        cells.append((item.name, f"{rate:.0f}", f"{share:.2f}"))
    print(columns(cells))
    return finish([], args.out, threads=torch.get_num_threads(), rows=rows)


if __name__ == "__main__":
    sys.exit(main())
