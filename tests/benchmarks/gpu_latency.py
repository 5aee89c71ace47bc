"""Latency of a tower on an NVIDIA GPU: torch in several ways, and the runtime's engines.

CLIP ViT-B/32 with random weights and the built-in teacher, image and text, batches of 1, 8
and 32. For each the candidates take turns in one process; a ratio is the median over the
rounds of a candidate's time divided by that of torch eager in fp32.

There are two columns, not to be compared with each other. Host to host: a batch in host
memory becomes embeddings in host memory, as `edgeclip` runs it. On the device: the batch lies
in the GPU's memory, the embeddings stay there, and the call returns when the stream is done.

All get the same normalised fp32 pixels or token ids, and fp32 is without TF32. Whatever
differs from what torch computes on the CPU is refused, and what cannot run here says why.
`torch.compile` is tried as "reduce-overhead" and, without `--quick`, as "max-autotune".
"""

import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from _bars import finish, options
from _gpu_case import Variant, cases
from _gpu_engines import engine_variants
from _gpu_machine import detect_gpu, full_precision, why_no_gpu
from _gpu_measure import measure_case
from _gpu_rows import Row, bars, table
from _gpu_torch import torch_variants
from graph_work import random_vit_b32

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.spec import Tower

_BATCHES = (1, 8, 32)
_TOWERS: tuple[Tower, ...] = get_args(Tower)


def workload(*, quick: bool) -> Workload:
    """How often each candidate runs."""
    return Workload(
        name="gpu",
        description="latency of one batch",
        batch_sizes=(1,),
        min_warmup_runs=10,
        max_warmup_seconds=2,
        repeats=30 if quick else 200,
        seconds_per_batch=1,
        cold_starts=0,
    )


def measure(variants: Sequence[Variant], *, quick: bool) -> Iterator[list[Row]]:
    """The rows of each case."""
    torch.manual_seed(0)
    models = {"teacher": DualEncoder.load(BUILT_IN_TEACHER), "vit_b32": random_vit_b32()}
    for model, dual in models.items():
        for tower in _TOWERS:
            with tempfile.TemporaryDirectory() as folder:
                batches = _BATCHES[:1] if quick else _BATCHES
                for case in cases(model, dual, tower, batches, Path(folder)):
                    yield measure_case(case, variants, workload(quick=quick), quick=quick)
                    clear()


def clear() -> None:
    """Give back what the candidates of a case held."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> int:
    """Measure, print tables, write the figures; where there is no GPU, only say so."""
    args = options(__doc__ or "").parse_args()
    obstacle = why_no_gpu()
    if obstacle is not None:
        print(f"gpu_latency was not run: {obstacle}")
        return 0
    full_precision()
    gpu = detect_gpu()
    print(gpu)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        variants = [*torch_variants("cuda"), *engine_variants(gpu, Path(folder))]
        for found in measure(variants, quick=args.quick):
            print(f"\n{table(found)}", flush=True)
            rows += found
    return finish(
        bars(rows),
        args.out,
        gpu=asdict(gpu),
        workload=asdict(workload(quick=args.quick)),
        rows=[asdict(row) for row in rows],
    )


if __name__ == "__main__":
    sys.exit(main())
