"""Which way to find the ranges of activations is the most exact, on the built-in teacher.

Cosines to fp32 of held-out scenes, for int8 as CPUs take it (unsigned, with zero points) and
as TensorRT takes it (symmetric, between fp16), both run by ONNX Runtime's CPU provider.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from _bars import Bar, finish, options
from numpy.typing import NDArray

from edgeclip.compress.dual_encoder import DualEncoder
from edgeclip.compress.sources import Source, open_source
from edgeclip.compress.verb_options import BUILT_IN_TEACHER
from edgeclip.export.activation_bounds import EXTREMES, Ranging
from edgeclip.export.calibrate import CalibrationData, calibration_images, calibration_texts
from edgeclip.export.embed_pairs import embed_all, graph_embedder, tower_inputs
from edgeclip.export.fp8 import write_fp8
from edgeclip.export.graph_form import GraphForm
from edgeclip.export.quantize import Int8Settings, write_int8
from edgeclip.export.to_onnx import export_towers
from edgeclip.export.tower_graph import TOWERS, TowerGraph
from edgeclip.profiles.device import THIS_MACHINE, load_device
from edgeclip.runtime.quality import cosines

_GAP = 1e-4  # in the mean cosine; less is not worth a slower method
_RANGINGS = {
    "extremes": EXTREMES,
    "99.9%": Ranging(method="percentile", percentile=99.9),
    "99.99%": Ranging(method="percentile", percentile=99.99),
    "99.999%": Ranging(method="percentile", percentile=99.999),
    "entropy": Ranging(method="entropy"),
    "mse": Ranging(method="mse"),
}


def main() -> int:
    """Quantize both towers in every way; the default must be close to the best."""
    args = options(__doc__ or "").parse_args()
    seen = open_source("emoji", split="calibration", count=32 if args.quick else 256, size=64)
    unseen = open_source("emoji", split="test", count=50 if args.quick else 200, size=64)
    dual = DualEncoder.load(BUILT_IN_TEACHER)
    print("tower  int8       ranges    mean cosine   1st percentile  lowest     seconds")
    bars = []
    with tempfile.TemporaryDirectory() as folder:
        towers = export_towers(dual, Path(folder), GraphForm(opset=19, pixels="uint8-nhwc"))
        for tower in TOWERS:
            graph = towers.graph(tower)
            trial = Trial(dual, graph, _data(dual, graph, seen), unseen)
            trial.try_fp8()
            for name, device in (("cpu", THIS_MACHINE), ("symmetric", "rtx-4000-ada")):
                settings = Int8Settings.for_device(load_device(device))
                means = {key: trial.try_int8(name, key, settings) for key in _RANGINGS}
                gap = max(means.values()) - means["extremes"]
                title = f"calibration_gap_{tower}_{name}"
                bars.append(Bar(name=title, value=gap, direction="<=", bound=_GAP))
    return finish(bars, args.out)


class Trial:
    """One tower, quantized again and again."""

    def __init__(
        self, dual: DualEncoder, graph: TowerGraph, data: CalibrationData, unseen: Source
    ) -> None:
        self._dual, self._graph, self._data, self._unseen = dual, graph, data, unseen
        self._reference = self._embed(graph)

    def try_int8(self, name: str, key: str, settings: Int8Settings) -> float:
        """Print a row of the table; return the mean cosine."""
        chosen = replace(settings, ranging=_RANGINGS[key])
        target = self._graph.path.with_name("trial_int8.onnx")
        start = time.perf_counter()
        write_int8(self._graph.path, target, self._data, chosen)
        return self._row(name, key, target, time.perf_counter() - start)

    def try_fp8(self) -> None:
        """Print the row of fp8, for comparison."""
        target = self._graph.path.with_name("trial_fp8.onnx")
        start = time.perf_counter()
        write_fp8(self._graph.path, target, self._data)
        self._row("(fp8)", "extremes", target, time.perf_counter() - start)

    def _row(self, name: str, key: str, path: Path, seconds: float) -> float:
        found = cosines(self._embed(replace(self._graph, path=path)), self._reference)
        low, first, mean = found.min(), np.percentile(found, 1), float(found.mean())
        print(
            f"{self._graph.tower:<6} {name:<10} {key:<9} {mean:.6f}      {first:.5f}"
            f"         {low:.5f} {seconds:10.1f}",
            flush=True,
        )
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
