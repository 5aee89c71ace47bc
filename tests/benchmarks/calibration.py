"""Which ranges of activations, and which changes before and after rounding, are the most exact.

Cosines to fp32 of held-out scenes on the built-in teacher, for int8 as CPUs take it (unsigned,
with zero points) and as TensorRT takes it (symmetric, between fp16), both run by ONNX
Runtime's CPU provider. All ways of finding ranges are tried; then, with the extremes,
smoothing with searched alphas, cross-layer equalisation and bias correction.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _bars import Bar, finish, options
from numpy.typing import NDArray

from edgeclip.compress.cli.options import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import Source, open_source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.calibration import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.graph.embed_pairs import (
    TOWERS,
    TowerGraph,
    embed_all,
    graph_embedder,
    tower_inputs,
)
from edgeclip.export.graph.graph import load_graph, save_graph
from edgeclip.export.graph.to_onnx import GraphForm, export_towers
from edgeclip.export.quantizing.activation_ranges import EXTREMES, Ranging
from edgeclip.export.quantizing.config import StaticInt8, default_config
from edgeclip.export.quantizing.correct_bias import correct_biases
from edgeclip.export.quantizing.smooth import search_alphas
from edgeclip.export.quantizing.static_int8 import write_int8
from edgeclip.export.quantizing.write_config import apply_transforms, write_fp8
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device
from edgeclip.runtime.quality.retrieval import cosines

_GAP = 1e-4  # in the mean cosine; less is not worth a slower method


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to quantize, beside what the device asks for."""

    ranging: Ranging = EXTREMES
    smoothed: bool = False
    equalised: bool = False
    corrected: bool = False


_RANGINGS = {
    "extremes": Way(),
    "99.9%": Way(ranging=Ranging(method="percentile", percentile=99.9)),
    "99.99%": Way(ranging=Ranging(method="percentile", percentile=99.99)),
    "99.999%": Way(ranging=Ranging(method="percentile", percentile=99.999)),
    "entropy": Way(ranging=Ranging(method="entropy")),
    "mse": Way(ranging=Ranging(method="mse")),
}
_CHANGES = {
    "smoothed": Way(smoothed=True),
    "equalised": Way(equalised=True),
    "corrected": Way(corrected=True),
    "smoothed, corrected": Way(smoothed=True, corrected=True),
    "all three": Way(smoothed=True, equalised=True, corrected=True),
    "mse, all three": Way(
        ranging=Ranging(method="mse"), smoothed=True, equalised=True, corrected=True
    ),
}


def main() -> int:
    """Quantize both towers in every way; the default must be close to the best of the ranges."""
    args = options(__doc__ or "").parse_args()
    seen = open_source("emoji", split="calibration", count=32 if args.quick else 256, size=64)
    unseen = open_source("emoji", split="test", count=50 if args.quick else 200, size=64)
    dual = DualEncoder.load(BUILT_IN_TEACHER)
    print(
        f"{'tower':<6} {'int8':<10} {'way':<20} mean cosine  1st percentile   lowest  mean error"
        "  seconds"
    )
    bars: list[Bar] = []
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory() as folder:
        towers = export_towers(dual, Path(folder), GraphForm(opset=19, pixels="uint8-nhwc"))
        for tower in TOWERS:
            graph = towers.graph(tower)
            trial = Trial(dual, graph, _data(dual, graph, seen), unseen)
            trial.try_fp8()
            for name, device in (("cpu", THIS_MACHINE), ("symmetric", "rtx-4000-ada")):
                settings = default_config("int8", load_device(device))
                ways = {**_RANGINGS, **_CHANGES}
                means = {key: trial.try_int8(name, key, way, settings) for key, way in ways.items()}
                bars += _bars(f"{tower}_{name}", means)
            rows += trial.rows
    return finish(bars, args.out, rows=rows)


def _bars(title: str, means: dict[str, float]) -> list[Bar]:
    """The extremes are nearly as good as any other range, and no change makes them worse."""
    lost = max(means[key] for key in _RANGINGS) - means["extremes"]
    worse = max(means["extremes"] - means[key] for key in _CHANGES)
    return [
        Bar(name=f"calibration_gap_{title}", value=lost, direction="<=", bound=_GAP),
        Bar(name=f"calibration_loss_{title}", value=worse, direction="<=", bound=_GAP),
    ]


class Trial:
    """One tower, quantized again and again.

    Attributes:
        rows: what was printed, one for each way.
    """

    def __init__(
        self, dual: DualEncoder, graph: TowerGraph, data: CalibrationData, unseen: Source
    ) -> None:
        self._dual, self._graph, self._data, self._unseen = dual, graph, data, unseen
        self.rows: list[dict[str, str | float]] = []
        self._reference = self._embed(graph)

    def try_int8(self, name: str, key: str, way: Way, settings: StaticInt8) -> float:
        """Print a row of the table; return the mean cosine."""
        changed, target = (
            self._graph.path.with_name(f"trial_{what}.onnx") for what in ("fp32", "int8")
        )
        start = time.perf_counter()
        config = StaticInt8(
            symmetric=settings.symmetric,
            reduce_range=settings.reduce_range,
            ranging=way.ranging,
            equalised=way.equalised,
        )
        model = apply_transforms(load_graph(self._graph.path), config, self._data)
        if way.smoothed:
            alphas = search_alphas(model, self._data, config)
            model = apply_transforms(model, replace(config, smoothing=alphas), self._data)
        save_graph(model, changed)
        write_int8(changed, target, self._data, replace(settings, ranging=way.ranging))
        if way.corrected:
            save_graph(correct_biases(load_graph(target), model, self._data), target)
        return self._row(name, key, target, time.perf_counter() - start)

    def try_fp8(self) -> None:
        """Print the row of fp8, for comparison."""
        target = self._graph.path.with_name("trial_fp8.onnx")
        start = time.perf_counter()
        write_fp8(self._graph.path, target, self._data)
        self._row("(fp8)", "extremes", target, time.perf_counter() - start)

    def _row(self, name: str, key: str, path: Path, seconds: float) -> float:
        embedded = self._embed(replace(self._graph, path=path))
        found = cosines(embedded, self._reference)
        low, first, mean = (float(v) for v in (found.min(), np.percentile(found, 1), found.mean()))
        error = float(np.linalg.norm((embedded - self._reference).mean(axis=0)))
        tower = self._graph.tower
        print(
            f"{tower:<6} {name:<10} {key:<20} {mean:.6f} {first:15.5f} {low:8.5f}"
            f"  {error:.6f} {seconds:10.1f}",
            flush=True,
        )
        figures = {"mean": mean, "p1": first, "lowest": low, "mean_error": error}
        self.rows.append({"tower": tower, "int8": name, "way": key, "seconds": seconds, **figures})
        return mean

    def _embed(self, graph: TowerGraph) -> NDArray[np.float32]:
        spec = self._dual.spec
        embed = graph_embedder(graph, spec.image, load_device(THIS_MACHINE))
        inputs = tower_inputs(self._unseen, graph.tower, spec, self._dual.text_tokenizer)
        (found,) = embed_all(inputs, [embed])
        return found


def _data(dual: DualEncoder, graph: TowerGraph, source: Source) -> CalibrationData:
    if graph.pixels is not None:
        return calibration_images(source, dual.spec.image, graph.pixels)
    return calibration_texts(source, dual.text_tokenizer)


if __name__ == "__main__":
    sys.exit(main())
