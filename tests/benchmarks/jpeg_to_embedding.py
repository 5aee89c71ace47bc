"""From the bytes of a JPEG to its embedding, one at a time: ours, and what others would write.

A CLIP ViT-B/32 of random weights on all cores. The reference is transformers' image processor
and the plain fp32 graph in ONNX Runtime; beside it the same processor with torch and with OpenVINO.
Ours is `Encoder.encode_image` on the bundle exported here, in each engine and precision that is
there. All take turns in one process. What the encoder adds to a bare `session.run` is measured on
the same graph, and memory over many calls on the kept student.
"""

import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import psutil
import torch
from _bars import Bar, Rule, finish, hold, options, say, span
from graph_work import plain_graph, random_vit_b32
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions  # after edgeclip, by way of _bars
from PIL import Image
from transformers import CLIPImageProcessorPil
from tune import vit_b32_bundle

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.tune_passes import TUNING_WORKLOAD
from edgeclip.profiles.measure.interleaved_runs import (
    BenchmarkTarget,
    measure_interleaved,
    repeat_rows,
)
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.console import columns
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.spec import ImageSpec
from edgeclip.runtime.stats.interval import Interval

BARS: dict[str, Rule] = {
    "640x480_over_plain": ("<=", 0.40, ""),
    "4000x3000_over_plain": ("<=", 0.12, ""),
    "over_bare_session": ("<=", 1.03, ""),
    "growth": ("<=", 1.0, "MB"),
}
KEPT_MODELS = ("export/emoji_bundle",)

ROOT = Path(__file__).parents[2]
PLAIN = "transformers' processor, ONNX Runtime fp32"
SIZES = ((640, 480), (4000, 3000))
Embed = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way at one size; the ratio is its time over that of `PLAIN`."""

    picture: str
    way: str
    ms: Interval
    ratio: Interval | None


def jpeg(width: int, height: int) -> bytes:
    """A picture with structure of all sizes, so that it is neither flat nor noise to a decoder."""
    rng = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for step in (8, 32, 128):
        small = rng.integers(0, 256, (-(-height // step), -(-width // step), 3), dtype=np.uint8)
        resized = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(resized, np.float32) / 3
    file = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def processor_of(spec: ImageSpec) -> Callable[[bytes], NDArray[np.float32]]:
    """transformers' own, as its documentation calls it."""
    processor: Any = CLIPImageProcessorPil(
        size={"shortest_edge": spec.resize},
        crop_size={"height": spec.size, "width": spec.size},
        image_mean=spec.mean,
        image_std=spec.std,
    )

    def process(content: bytes) -> NDArray[np.float32]:
        with Image.open(io.BytesIO(content)) as image:
            found: NDArray[np.float32] = processor(image, return_tensors="np")["pixel_values"]
        return found

    return process


def others(dual: DualEncoder, graph: Path, threads: int) -> dict[str, Embed]:
    """What a person would write without EdgeCLIP."""
    process = processor_of(dual.image_spec)
    in_threads = SessionOptions()
    in_threads.intra_op_num_threads = threads
    session = InferenceSession(str(graph), in_threads, providers=["CPUExecutionProvider"])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)

    def with_torch(content: bytes) -> object:
        with torch.inference_mode():
            return dual.embed_image(torch.from_numpy(process(content)))

    return {
        PLAIN: lambda content: session.run(None, {"pixel_values": process(content)}),
        "transformers' processor, torch eager": with_torch,
        "transformers' processor, OpenVINO fp32": lambda content: compiled(
            {"pixel_values": process(content)}
        ),
    }


def ours(bundle: Bundle) -> dict[str, Embed]:
    """Each precision on each engine that is installed; what cannot run is named on stderr."""
    device, found = load_device("this-machine"), dict[str, Embed]()
    bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    devices = [device, *(replace(device, engine="openvino", bfloat16=half)
                         for half in ((False, True) if bfloat16 else (False,)))]  # fmt: skip
    for item in devices:
        for precision in bundle.manifest.tower("image").precisions:
            encoder = Encoder(bundle, item, precision)
            name = f"EdgeCLIP, {item.engine} {precision}{' in bfloat16' * item.bfloat16}"
            try:
                encoder.encode_image(np.zeros((8, 8, 3), np.uint8))
            except Exception as error:
                say(f"{name} cannot run: {error}")
                continue
            found[name] = encoder.encode_image
    return found


def race(ways: dict[str, Embed], repeats: int) -> Iterator[Row]:
    """All ways in turns, at each size."""
    amount = replace(TUNING_WORKLOAD, repeats=repeats, min_warmup_runs=3, max_warmup_seconds=2)
    for width, height in SIZES:
        content = jpeg(width, height)
        say(f"{width}x{height}, {len(content):,} bytes")
        contents = np.array([content], object)
        targets = [
            BenchmarkTarget(name, partial(_first, way), repeat_rows(contents))
            for name, way in ways.items()
        ]
        for item in measure_interleaved(targets, amount, part="image", reference=PLAIN):
            yield Row(
                picture=f"{width}x{height}",
                way=item.name,
                ms=item.latency.p50_ms,
                ratio=None if item.ratio is None else item.ratio.ratio,
            )


def _first(way: Embed, batch: NDArray[Any]) -> object:
    return way(batch[0])


def over_bare_session(bundle: Bundle, repeats: int) -> Interval:
    """`encode_pixels` over `session.run` of the same graph, pixels and engine."""
    device = load_device("this-machine")
    encoder = Encoder(bundle, device, "fp32")
    path = bundle.tower_path("image", "fp32")
    engine = OrtEngine(path, providers=("CPUExecutionProvider",), threads=device.threads)
    pixels = crop_batch([jpeg(640, 480)], bundle.manifest.spec.image)
    (name,) = (item.name for item in engine._session.get_inputs())

    def bare(batch: NDArray[Any]) -> object:
        return engine._session.run(None, {name: batch})

    targets = [
        BenchmarkTarget("session.run", bare, repeat_rows(pixels)),
        BenchmarkTarget("encode_pixels", encoder.encode_pixels, repeat_rows(pixels)),
    ]
    amount = replace(TUNING_WORKLOAD, repeats=repeats, min_warmup_runs=5)
    _, own = measure_interleaved(targets, amount, part="image", reference="session.run")
    assert own.ratio is not None
    return own.ratio.ratio


def growth(bundle: Bundle, calls: int) -> float:
    """MB that the process holds more after `calls` pictures than after a hundredth of them."""
    encoder, content = Encoder(bundle, load_device("this-machine")), jpeg(64, 48)
    process, early = psutil.Process(), 0
    for number in range(calls):
        encoder.encode_image(content)
        if number == calls // 100:
            early = process.memory_info().rss
    grown: float = (process.memory_info().rss - early) / 1e6
    return grown


def table(rows: Sequence[Row]) -> str:
    cells = [("picture", "way", "ms", "of the reference")]
    cells += [
        (row.picture, row.way, span(row.ms, 2), "" if row.ratio is None else span(row.ratio))
        for row in rows
    ]
    return columns(cells, left=2)


def bars(rows: Sequence[Row], over: Interval, grown: float) -> Iterator[Bar]:
    """The best of ours at each size, whatever its engine; all ways are in the table."""
    for width, height in SIZES:
        own = [row.ratio for row in rows if row.picture == f"{width}x{height}"
               and row.way.startswith("EdgeCLIP") and row.ratio is not None]  # fmt: skip
        best = min(own, key=lambda ratio: ratio.value)
        yield hold(BARS, f"{width}x{height}_over_plain", best)
    yield hold(BARS, "over_bare_session", over)
    yield hold(BARS, "growth", grown)


def main() -> int:
    """Export, race, count, print."""
    args = options(__doc__).parse_args()
    device = load_device("this-machine")
    torch.set_num_threads(device.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = vit_b32_bundle(folder, quick=args.quick)
        torch.manual_seed(0)
        dual = random_vit_b32()
        dual.eval()
        plain_graph(dual, "image", folder / "plain.onnx", one_token=False)
        ways = {**others(dual, folder / "plain.onnx", device.threads), **ours(bundle)}
        rows = list(race(ways, 10 if args.quick else 40))
        print(table(rows))
        over = over_bare_session(bundle, 20 if args.quick else 200)
    print(f"\nencode_pixels over session.run {span(over)}")
    calls = 1_000 if args.quick else 100_000
    grown = growth(Bundle.open(ROOT / KEPT_MODELS[0]), calls)
    print(f"{grown:.2f} MB more after {calls:,} pictures")
    return finish(list(bars(rows, over, grown)), args.out, rows=rows, calls=calls)


if __name__ == "__main__":
    sys.exit(main())
