"""What work on the graph is worth on ONNX Runtime's CPU: each change against the plain graph.

All versions of a tower take turns in one process; a ratio is the median over the rounds of a
version's time divided by that of the first. Towers are the built-in teacher's, with --large
also a CLIP ViT-B/32 with random weights.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from _bars import Rule, finish, hold, options, span
from numpy.typing import NDArray
from onnxruntime.transformers import optimizer
from transformers import CLIPConfig, CLIPModel

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import TOWERS, tower_inputs
from edgeclip.export.graph.export_modules import PlainImageTower, PlainTextTower
from edgeclip.export.graph.graph_io import limit_masks, load_graph, save_graph
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.export.graph.graph_values import relative_error
from edgeclip.export.graph.to_onnx import GraphForm, capture
from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    repeat_rows,
)
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.spec import ImageSpec, Tower
from edgeclip.runtime.stats.interval import Interval
from edgeclip.runtime.towers.tower_runner import tower_feed

BARS: dict[str, Rule] = {
    "*_last_layer_for_one_token": ("<=", 1.0, ""),
    "*_text_cut_at_its_end": ("<=", 1.0, ""),
}
KEPT_MODELS = ("compress/emoji_teacher",)

FIRST, ONE_TOKEN, CUT = "whole last layer", "last layer for one token", "text cut at its end"


class Version(NamedTuple):
    """One graph and the input that it gets; `base` is the version it is compared with."""

    name: str
    path: Path
    values: NDArray[Any]
    base: str


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    tower: Tower
    version: str
    base: str
    median_ms: float
    ratio: Interval | None
    error: float
    contended: bool | None


def plain_graph(dual: DualEncoder, tower: Tower, path: Path, *, one_token: bool) -> None:
    """Export a tower, its last layer for all tokens or for the one that is used."""
    whole = PlainImageTower(dual) if tower == "image" else PlainTextTower(dual)
    model = capture(dual, tower, GraphForm(), None if one_token else whole.eval()).model_proto
    limit_masks(model)
    save_graph(model, path)


def versions(
    dual: DualEncoder, tower: Tower, values: NDArray[Any], folder: Path
) -> Iterator[Version]:
    """The plain graph, the exact wins one upon the other, and each pass on top of these."""
    plain, exact = folder / "plain.onnx", folder / "exact.onnx"
    plain_graph(dual, tower, plain, one_token=False)
    plain_graph(dual, tower, exact, one_token=True)
    padded, base = values, ONE_TOKEN
    if tower == "text":
        missing = dual.spec.text.context_length - values.shape[1]
        padded = np.pad(values, ((0, 0), (0, missing)), constant_values=dual.spec.text.pad_id)
    yield Version(FIRST, plain, padded, FIRST)
    yield Version(ONE_TOKEN, exact, padded, FIRST)
    if tower == "text":
        yield Version(CUT, exact, values, ONE_TOKEN)
        base = CUT
    yield Version("the same graph again", exact, values, base)
    everything = load_graph(exact)
    for item in PASSES:
        changed, places = item.apply(load_graph(exact))
        everything, _ = item.apply(everything)
        if places:
            path = folder / f"{item.name}.onnx"
            save_graph(changed, path)
            yield Version(item.name, path, values, base)
    save_graph(everything, folder / "all.onnx")
    yield Version("all of these", folder / "all.onnx", values, base)
    tool = optimizer.optimize_model(str(exact), model_type="clip", opt_level=0)
    onnx.save(tool.model, folder / "tool.onnx")
    yield Version("onnxruntime.transformers", folder / "tool.onnx", values, base)


def measure_tower(model: str, dual: DualEncoder, tower: Tower, repeats: int) -> Iterator[Row]:
    """Measure all versions of a tower, each against its base."""
    device, spec = replace(load_device("this-machine"), threads=1), dual.spec.image
    crops = next(tower_inputs(dual, tower, EmojiSource("test", 1, size=spec.size)))
    ((name, values),) = tower_feed(crops, tower, "float32-nchw", spec).items()

    def opened(path: Path) -> Callable[[NDArray[Any]], NDArray[Any]]:
        run = open_engine(path, device=device).run
        return lambda batch: next(iter(run({name: batch}).values()))

    with tempfile.TemporaryDirectory() as folder:
        made = list(versions(dual, tower, values, Path(folder)))
        runs = {item.name: opened(item.path) for item in made}
        outputs = {item.name: runs[item.name](item.values) for item in made}
        targets = {
            item.name: BenchmarkTarget(item.name, runs[item.name], repeat_rows(item.values))
            for item in made
        }
        amount = replace(TUNING_WORKLOAD, repeats=repeats)
        for base in dict.fromkeys(item.base for item in made):
            group = [item for item in made if base in (item.name, item.base)]
            several = [targets[item.name] for item in group]
            measured = measure_interleaved(several, amount, part=tower, reference=base)
            for item, found in zip(group, measured, strict=True):
                if item.name != base or base == FIRST:
                    yield Row(
                        model=model,
                        tower=tower,
                        version=item.name,
                        base=item.base,
                        median_ms=found.latency.p50_ms.value,
                        ratio=None if found.ratio is None else found.ratio.ratio,
                        error=relative_error(outputs[FIRST], outputs[item.name]),
                        contended=found.contended,
                    )


def random_vit_b32(**sizes: int) -> DualEncoder:
    """CLIP ViT-B/32 (or other sizes) with random weights, and the built-in teacher's tokenizer."""
    teacher = DualEncoder.load(BUILT_IN_TEACHER)
    tokenizer = teacher.tokenizer
    config = CLIPConfig(vision_config={**sizes}, text_config={**sizes})
    text: Any = config.text_config
    text.bos_token_id, text.eos_token_id = teacher.spec.text.bos_id, teacher.spec.text.eos_id
    text.pad_token_id = teacher.spec.text.pad_id
    tokenizer.model_max_length = text.max_position_embeddings
    half = (0.5, 0.5, 0.5)
    spec = ImageSpec(size=224, resize=224, mean=half, std=half)
    return DualEncoder(CLIPModel(config).eval(), spec, tokenizer)


def table(rows: Sequence[Row]) -> str:
    cells = [("version", "compared with", "ms", "ratio", "error", "")]
    for item in rows:
        base, ratio = ("", "") if item.ratio is None else (item.base, span(item.ratio))
        found = (f"{item.median_ms:.2f}", ratio, f"{item.error:.0e}")
        cells.append((item.version, base, *found, "contended" if item.contended else ""))
    return columns(cells, left=2)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--large", action="store_true", help="also a random CLIP ViT-B/32")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # onnxruntime.transformers tells what it could not do
    models = {"teacher": DualEncoder.load(BUILT_IN_TEACHER)}
    if args.large:
        models["vit_b32"] = random_vit_b32()
    rows: list[Row] = []
    for name, dual in models.items():
        for tower in TOWERS:
            repeats = 20 if args.quick else 60 if name == "vit_b32" else 200
            found = list(measure_tower(name, dual, tower, repeats))
            print(f"\n{name}, {tower} tower, one thread, batch 1\n{table(found)}", flush=True)
            rows += found
    bars = [
        hold(BARS, f"{item.model}_{item.tower}_{item.version.replace(' ', '_')}", item.ratio)
        for item in rows
        if item.version in (ONE_TOKEN, CUT) and item.ratio is not None
    ]
    return finish(bars, args.out, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
