"""What work on the graph is worth on ONNX Runtime's CPU: each change against the plain graph.

All versions of a tower take turns in one process; a ratio is the median over the rounds of a
version's time divided by that of the first. Towers are the built-in teacher's, with --large
also a CLIP ViT-B/32 with random weights.
"""

import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _bars import Bar, finish, options
from numpy.typing import NDArray
from onnxruntime.transformers import optimizer
from transformers import CLIPConfig, CLIPModel

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import tower_inputs
from edgeclip.export.graph.export_modules import PlainImageTower, PlainTextTower
from edgeclip.export.graph.graph_io import limit_masks, load_graph, save_graph
from edgeclip.export.graph.graph_passes import PASSES
from edgeclip.export.graph.graph_values import relative_error
from edgeclip.export.graph.to_onnx import GraphForm, capture
from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import BenchmarkTarget, measure_interleaved
from edgeclip.profiles.record.measurement import Measurement
from edgeclip.runtime.device.device_profile import DeviceProfile, load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.quality.intervals import Interval
from edgeclip.runtime.spec import ImageSpec, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

FIRST, ONE_TOKEN, CUT = "whole last layer", "last layer for one token", "text cut at its end"
FORM = GraphForm()


@dataclass(frozen=True, slots=True)
class Version:
    """One graph and the input that it gets; `base` is the version it is compared with."""

    name: str
    path: Path
    values: NDArray[Any]
    base: str


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of a version."""

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
    program = capture(dual, tower, FORM, None if one_token else whole.eval())
    model = program.model_proto
    limit_masks(model)
    save_graph(model, path)


def versions(
    dual: DualEncoder, tower: Tower, values: NDArray[Any], folder: Path
) -> Iterator[Version]:
    """The plain graph, the exact wins one upon the other, and each pass on top of these."""
    plain, exact = folder / "plain.onnx", folder / "exact.onnx"
    plain_graph(dual, tower, plain, one_token=False)
    plain_graph(dual, tower, exact, one_token=True)
    padded = values if tower == "image" else padded_ids(dual, values)
    yield Version(FIRST, plain, padded, FIRST)
    yield Version(ONE_TOKEN, exact, padded, FIRST)
    base = ONE_TOKEN
    if tower == "text":
        yield Version(CUT, exact, values, ONE_TOKEN)
        base = CUT
    yield Version("the same graph again", exact, values, base)
    for item in PASSES:
        changed, places = item.apply(load_graph(exact))
        if places:
            path = folder / f"{item.name}.onnx"
            save_graph(changed, path)
            yield Version(item.name, path, values, base)
    everything = load_graph(exact)
    for item in PASSES:
        everything, _ = item.apply(everything)
    save_graph(everything, folder / "all.onnx")
    yield Version("all of these", folder / "all.onnx", values, base)
    tool = optimizer.optimize_model(str(exact), model_type="clip", opt_level=0)
    onnx.save(tool.model, folder / "tool.onnx")
    yield Version("onnxruntime.transformers", folder / "tool.onnx", values, base)


def padded_ids(dual: DualEncoder, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fill token ids [N, length] up to the whole context."""
    missing = dual.spec.text.context_length - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=dual.spec.text.pad_id)


def measure_tower(
    model: str, dual: DualEncoder, tower: Tower, device: DeviceProfile, repeats: int, size: int
) -> list[Row]:
    """Measure all versions of a tower, each against its base."""
    crops = next(tower_inputs(dual, tower, EmojiSource("test", 1, size=size)))
    ((name, values),) = tower_feed(crops, tower, "float32-nchw", dual.spec.image).items()
    with tempfile.TemporaryDirectory() as folder:
        made = list(versions(dual, tower, values, Path(folder)))
        engines = {item.name: open_engine(item.path, device=device) for item in made}
        runs = {
            key: functools.partial(run_once, engine.run, name) for key, engine in engines.items()
        }
        outputs = {item.name: runs[item.name](item.values) for item in made}
        rows: list[Row] = []
        for base in dict.fromkeys(item.base for item in made):
            group = [item for item in made if base in (item.name, item.base)]
            measured = measure_interleaved(
                [BenchmarkTarget(item.name, runs[item.name], fixed(item.values)) for item in group],
                replace(TUNING_WORKLOAD, repeats=repeats),
                part=tower,
                reference=base,
            )
            rows += [
                row(model, item, found, relative_error(outputs[FIRST], outputs[item.name]))
                for item, found in zip(group, measured, strict=True)
                if item.name != base or base == FIRST
            ]
    return rows


def run_once(
    run: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]],
    name: str,
    values: NDArray[Any],
) -> NDArray[Any]:
    """The embedding."""
    (found,) = run({name: values}).values()
    return found


def fixed(values: NDArray[Any]) -> Callable[[int], NDArray[Any]]:
    """One row, whatever the size: only batch 1 is measured."""
    return lambda size: values[:1].repeat(size, 0)


def row(model: str, item: Version, found: Measurement, error: float) -> Row:
    """What the table says of a version."""
    return Row(
        model=model,
        tower="text" if found.part == "text" else "image",
        version=item.name,
        base=item.base,
        median_ms=found.latency.p50_ms.value,
        ratio=None if found.ratio is None else found.ratio.ratio,
        error=error,
        contended=found.contended,
    )


def random_vit_b32() -> DualEncoder:
    """CLIP ViT-B/32 with random weights, and the built-in teacher's tokenizer."""
    teacher = DualEncoder.load(BUILT_IN_TEACHER)
    tokenizer = teacher.tokenizer
    config = CLIPConfig()
    text: Any = config.text_config
    text.bos_token_id, text.eos_token_id = teacher.spec.text.bos_id, teacher.spec.text.eos_id
    text.pad_token_id = teacher.spec.text.pad_id
    tokenizer.model_max_length = text.max_position_embeddings
    half = (0.5, 0.5, 0.5)
    spec = ImageSpec(size=224, resize=224, mean=half, std=half)
    return DualEncoder(CLIPModel(config).eval(), spec, tokenizer)


def print_rows(rows: list[Row]) -> None:
    """The table."""
    print(
        f"{'version':<28}{'compared with':<28}{'ms':>8}{'ratio':>8}  {'interval':<16}{'error':>8}"
    )
    for item in rows:
        ratio, interval = "", ""
        if item.ratio is not None:
            ratio = f"{item.ratio.value:.3f}"
            interval = f"[{item.ratio.low:.3f}, {item.ratio.high:.3f}]"
        base = item.base if item.ratio else ""
        print(
            f"{item.version:<28}{base:<28}{item.median_ms:>8.2f}{ratio:>8}  {interval:<16}"
            f"{item.error:>8.0e}{'  contended' if item.contended else ''}"
        )


def bars(rows: list[Row]) -> list[Bar]:
    """The exact wins must be wins."""
    return [
        Bar(
            name=f"{item.model}_{item.tower}_{item.version.replace(' ', '_')}",
            value=item.ratio.value,
            direction="<=",
            bound=1.0,
            interval=item.ratio,
        )
        for item in rows
        if item.version in (ONE_TOKEN, CUT) and item.ratio is not None
    ]


def main() -> int:
    """Measure, print tables, write the figures."""
    parser = options(__doc__ or "")
    parser.add_argument("--large", action="store_true", help="also a random CLIP ViT-B/32")
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # onnxruntime.transformers tells what it could not do
    device = replace(load_device("this-machine"), threads=1)
    models = {"teacher": DualEncoder.load(BUILT_IN_TEACHER)}
    if args.large:
        models["vit_b32"] = random_vit_b32()
    rows: list[Row] = []
    for name, dual in models.items():
        towers: tuple[Tower, ...] = ("image", "text")
        for tower in towers:
            repeats = 20 if args.quick else 60 if name == "vit_b32" else 200
            found = measure_tower(name, dual, tower, device, repeats, dual.spec.image.size)
            print(f"\n{name}, {tower} tower, one thread, batch 1", flush=True)
            print_rows(found)
            rows += found
    return finish(bars(rows), args.out, rows=[asdict(item) for item in rows])


if __name__ == "__main__":
    sys.exit(main())
