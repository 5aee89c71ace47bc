"""Latency of a tower on an NVIDIA GPU: torch in several ways, and the runtime's engines.

CLIP ViT-B/32 with random weights and the built-in teacher, image and text, batches of 1, 8
and 32. For each the candidates take turns in one process; a ratio is the median over the
rounds of a candidate's time divided by that of torch eager in fp32. There are two columns, not to
be compared with each other: host to host, as `edgeclip` runs a batch, and on the device, where
batch and embeddings stay in the GPU's memory.

All get the same normalised fp32 pixels or token ids, and fp32 is without TF32. Whatever
differs from what torch computes on the CPU is refused, and what cannot run here says why.

`--out FILE.json` also appends each row, as soon as its case is measured, to FILE.rows.jsonl; when
`--minutes` are over, no other case is begun, and those that are left out are named.
"""

import gc
import importlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from _bars import Bar, Rule, finish, hold, options, plain, say, span
from _gpu_candidates import REFERENCE, Case, Runner, Variant, cases, engine_variants, torch_variants
from graph_work import random_vit_b32
from numpy.typing import NDArray

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import TOWERS
from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    repeat_rows,
    run_first,
)
from edgeclip.profiles.workload import Workload
from edgeclip.runtime.console import columns
from edgeclip.runtime.errors import first_line
from edgeclip.runtime.spec import Tower
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "wrong_outputs": ("<=", 0, ""),
    "engines_timed": (">=", 1, ""),
    "*_best_engine_over_*": ("<=", 1.0, ""),
}
KEPT_MODELS = ("compress/emoji_teacher",)

Column = Literal["host", "device"]
COLUMNS: tuple[Column, ...] = get_args(Column)
Run = Callable[[NDArray[Any]], object]

MODELS: dict[str, Callable[[], DualEncoder]] = {
    "teacher": lambda: DualEncoder.load(BUILT_IN_TEACHER),
    "vit_b32": random_vit_b32,
}
_BATCHES = (1, 8, 32)
_CHECKED_RUN = 3  # what torch compiles runs plainly first, is recorded next, then replayed
# Versions beside those of `edgeclip.runtime.device.machine` that can change what a GPU does.
_PACKAGES = ("cuda-bindings", "onnxruntime-ep-nv-tensorrt-rtx", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMachine:
    """The GPU, its compute capability, and the versions of what runs on it, None if unknown."""

    name: str
    capability: str
    memory_mb: int
    versions: dict[str, str | None]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {it or 'unknown'}" for name, it in self.versions.items())
        return f"{self.name} (compute capability {self.capability}), {versions}"

    def variants(self, folder: Path) -> Iterator[Variant]:
        """The runtime's engines on it; TensorRT's are kept in `folder`."""
        version = self.versions.get("TensorRT")
        major = None if version is None else int(version.split(".")[0])
        return engine_variants(self.capability, major, folder)


def detect_gpu() -> GpuMachine:
    """Look at the GPU that CUDA calls the first; call it only if `why_no_gpu` is None."""
    facts = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version()
    versions = {"driver": _driver(), "CUDA": torch.version.cuda}
    versions |= {"cuDNN": cudnn and str(cudnn), "TensorRT": None}
    # Whoever installed it, it can be imported: on a Jetson no package says it.
    with suppress(Exception):  # each release fails in its own way where a library is missing
        versions["TensorRT"] = str(importlib.import_module("tensorrt").__version__)
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return GpuMachine(
        name=facts.name,
        capability=f"{facts.major}.{facts.minor}",
        memory_mb=facts.total_memory // 10**6,
        versions=versions,
    )


def why_no_gpu() -> str | None:
    """Why torch cannot use an NVIDIA GPU here, in one line; None if it can."""
    if torch.version.cuda is not None and torch.cuda.is_available():
        return None
    driver = _driver()
    found = "no NVIDIA driver answers" if driver is None else f"NVIDIA driver {driver} is here"
    lack = "is built without CUDA" if torch.version.cuda is None else "finds no NVIDIA GPU"
    return f"torch {torch.__version__} {lack}, and {found}"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        quiet = subprocess.DEVNULL
        said = subprocess.check_output(command, stderr=quiet, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)


@dataclass(slots=True)
class Attempt:
    """What became of a candidate: how it is run in the columns in which it is right."""

    variant: Variant
    runs: dict[Column, Run] = field(default_factory=dict)
    cosine: float | None = None
    wrong: bool = False
    reasons: list[str] = field(default_factory=list)

    def try_column(self, column: Column, case: Case, runner: Runner) -> None:
        """Compare what a loaded candidate gives in a column with torch in fp32."""
        run: Run = runner.host
        try:
            if column == "host":
                found = [runner.host(case.values) for _ in range(_CHECKED_RUN)][-1]
            else:
                resident = runner.place(case.values)
                for _ in range(_CHECKED_RUN):
                    resident.run()
                found, run = resident.fetch(), lambda _: resident.run()
        except Exception as error:  # each library fails in its own way
            self.reasons.append(f"{column}: {first_line(error)}")
            return
        cosine, fault = case.judge(found, self.variant.precision)
        known = [value for value in (self.cosine, cosine) if value is not None]
        self.cosine = min(known, default=None)
        if fault:
            self.wrong = True
            self.reasons.append(f"{column}: wrong, {fault}")
        else:
            self.runs[column] = run


def attempt(case: Case, variant: Variant, *, quick: bool = False) -> Attempt:
    """Load a candidate and compare what it gives, in both columns, with torch in fp32."""
    if quick and variant.slow:
        return Attempt(variant, reasons=["left out by --quick"])
    say(f"{case.model} {case.tower} {len(case.values)}: {variant.name}")
    try:
        runner = variant.open(case)
    except Exception as error:  # each library fails in its own way
        return Attempt(variant, reasons=[first_line(error)])
    tried = Attempt(variant)
    for column in COLUMNS:
        tried.try_column(column, case, runner)
    return tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median time of a batch in ms, and of the paired ratios to the reference."""

    ms: Interval
    ratio: Interval | None
    settled: bool
    contended: bool | None

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"  {span(self.ratio)}"
        marks = "" if self.settled else " unsettled"
        return f"{span(self.ms)}{ratio}{marks}{' contended' if self.contended else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One candidate in one case; `why` it was not timed, or not in both columns."""

    model: str
    tower: Tower
    batch: int
    input_shape: tuple[int, ...]
    candidate: str
    ours: bool
    host: Timing | None
    device: Timing | None
    cosine: float | None
    wrong: bool
    why: str


def measure_case(
    case: Case, variants: Sequence[Variant], workload: Workload, *, quick: bool
) -> list[Row]:
    attempts = [attempt(case, variant, quick=quick) for variant in variants]
    timings = {column: take_turns(case, attempts, column, workload) for column in COLUMNS}
    return [
        Row(
            model=case.model,
            tower=case.tower,
            batch=len(case.values),
            input_shape=case.values.shape,
            candidate=item.variant.name,
            ours=item.variant.ours,
            **{column: timings[column].get(item.variant.name) for column in COLUMNS},
            cosine=item.cosine,
            wrong=item.wrong,
            why="; ".join(item.reasons),
        )
        for item in attempts
    ]


def take_turns(
    case: Case, attempts: Sequence[Attempt], column: Column, workload: Workload
) -> dict[str, Timing]:
    """Time a column; a whole batch is one item of `measure_interleaved`."""

    make_batch = repeat_rows(case.values[None])
    targets = [
        BenchmarkTarget(item.variant.name, partial(run_first, item.runs[column]), make_batch)
        for item in attempts
        if column in item.runs
    ]
    if not targets:
        return {}
    reference = REFERENCE if REFERENCE in [item.name for item in targets] else None
    found = measure_interleaved(targets, workload, part=case.tower, reference=reference)
    return {
        item.name: Timing(
            ms=item.latency.p50_ms,
            ratio=None if item.ratio is None else item.ratio.ratio,
            settled=item.warm_up.settled,
            contended=item.contended,
        )
        for item in found
    }


def table(rows: Sequence[Row]) -> str:
    """The rows of one case; candidates that were not timed say why."""
    cells = [("candidate", "host to host: ms, ratio", "on the device: ms, ratio", "cosine")]
    for row in rows:
        if row.host or row.device:
            cosine = "" if row.cosine is None else f"{row.cosine:.6f}"
            cells.append((row.candidate, str(row.host or ""), str(row.device or ""), cosine))
    first = rows[0]
    title = f"{first.model}, {first.tower} tower, input {' x '.join(map(str, first.input_shape))}"
    lines = [title, columns(cells, left=4)]
    for why in dict.fromkeys(row.why for row in rows if row.why):
        names = ", ".join(row.candidate for row in rows if row.why == why)
        lines.append(f"{names}  not timed: {why}")
    return "\n".join(lines)


def append_rows(rows: Sequence[Row], path: Path) -> None:
    """Add lines of JSON to a file, so that a run that is stopped has lost one case at most."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(asdict(row))) + "\n" for row in rows)


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Nothing is wrong; the runtime's engines run, and beat eager torch at batch 1.

    The ratio is that of the engine with the best median, host to host, in the same turns.
    """
    ran = {row.candidate for row in rows if row.ours and row.host}
    wrong, ratios = sum(row.wrong for row in rows), dict[str, list[Interval]]()
    for row in rows:
        if row.batch == 1 and row.ours and row.host is not None and row.host.ratio is not None:
            ratios.setdefault(f"{row.model}_{row.tower}", []).append(row.host.ratio)
    over = f"best_engine_over_{REFERENCE.replace(' ', '_')}"
    return [
        hold(BARS, "wrong_outputs", wrong),
        hold(BARS, "engines_timed", len(ran)),
        *(
            hold(BARS, f"{name}_{over}", min(several, key=lambda ratio: ratio.value))
            for name, several in ratios.items()
        ),
    ]


def main() -> int:
    """Measure, print tables, write the figures; where there is no GPU, only say so."""
    parser = options(__doc__)
    parser.add_argument("--model", choices=MODELS, help="only this model")
    parser.add_argument("--tower", choices=TOWERS, help="only this tower")
    parser.add_argument("--minutes", type=float, default=10, help="begin no case after them: 10")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    obstacle = why_no_gpu()
    if obstacle is not None:
        print(f"gpu_latency was not run: {obstacle}")
        return 0
    # Let fp32 mean fp32 for every candidate: no TF32, whose mantissa has 10 bits. The variable is
    # read by cuBLAS, cuDNN and TensorRT when they start, the flag is for what torch compiles.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cudnn.allow_tf32 = False
    gpu = detect_gpu()
    print(gpu)
    amount = replace(
        TUNING_WORKLOAD,
        name="gpu",
        description="latency of one batch",
        min_warmup_runs=10,
        max_warmup_seconds=2,
        repeats=30 if args.quick else 200,
    )
    rows: list[Row] = []
    left_out: list[str] = []
    torch.manual_seed(0)
    models = {args.model: MODELS[args.model]} if args.model else MODELS
    towers = [args.tower] if args.tower else TOWERS
    batches = _BATCHES[:1] if args.quick else _BATCHES
    with tempfile.TemporaryDirectory() as name:
        variants = [*torch_variants("cuda"), *gpu.variants(Path(name))]
        for (model, make), tower in itertools.product(models.items(), towers):
            for case in cases(model, make(), tower, batches, Path(name, f"{model}_{tower}")):
                if time.monotonic() > end:
                    left_out.append(f"{model} {tower} {len(case.values)}")
                    continue
                found = measure_case(case, variants, amount, quick=args.quick)
                print(f"\n{table(found)}", flush=True)
                rows += found
                if args.out is not None:
                    append_rows(found, args.out.with_suffix(".rows.jsonl"))
                torch.compiler.reset()  # and give back what the candidates held
                gc.collect()
                torch.cuda.empty_cache()
    if left_out:
        print(f"not measured within {args.minutes:g} minutes: {', '.join(left_out)}")
    return finish(bars(rows), args.out, gpu=gpu, workload=amount, rows=rows, not_measured=left_out)


if __name__ == "__main__":
    sys.exit(main())
