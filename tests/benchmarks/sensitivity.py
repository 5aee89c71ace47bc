"""A planted fragile layer is found and kept in float, and the search ships what is faster.

One channel of the LayerNorm before the first MLP of the built-in teacher's image tower is made 300
times as large; what the tower computes stays the same, but all in int8 it collapses. (Trained
transformers have activations up to 100,000 times larger than others: Sun et al. 2024,
arXiv:2402.17762.) The sensitivity pass must name the layer behind it, and the search, which may not
smooth it here, must keep that layer in float and still be faster than fp32. Some minutes.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from _bars import Bar, Rule, finish, hold, options, say

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.open_source import open_source
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.embedders import TowerGraph
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import GraphForm, export_tower
from edgeclip.export.quantizing.candidate_evaluator import SEARCH_WORKLOAD, open_evaluator
from edgeclip.export.quantizing.config import StaticInt8
from edgeclip.export.quantizing.search import SearchResult, search
from edgeclip.export.quantizing.search_table import search_table
from edgeclip.export.quantizing.search_task import (
    JudgedPairs,
    SearchTask,
    search_space,
    split_calibration,
)
from edgeclip.export.quantizing.smoothquant import rescale, smoothable
from edgeclip.runtime.device.device_profile import THIS_MACHINE, load_device

BARS: dict[str, Rule] = {
    "planted_found_first": (">=", 1, ""),
    "planted_stands_out": (">=", 10, "times"),
    "planted_kept": (">=", 1, ""),
    "naive_collapses": ("<=", 0.9, ""),
    "searched_gates_held_on_test": (">=", 1, ""),
    "searched_time_to_fp32": ("<=", 1.0, ""),
}
KEPT_MODELS = ("compress/emoji_teacher",)

_FACTOR = 300.0


def main() -> int:
    """Plant, rank, search; with --quick on fewer pairs."""
    args = options(__doc__).parse_args()
    device, dual = load_device(THIS_MACHINE), DualEncoder.load(BUILT_IN_TEACHER)
    size, count = dual.image_spec.size, 128 if args.quick else 768
    pairs = open_source("emoji", split="calibration", count=count, size=size)
    ranges, steering = split_calibration(pairs, count // 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.onnx"
        export_tower(dual, "image", path, GraphForm.for_device(device))
        behind = plant(path)
        task = SearchTask(
            student=dual,
            graph=TowerGraph("image", "fp32", path, device.pixels),
            device=device,
            ranges=ranges,
            steering=JudgedPairs(pairs=steering),
            test=JudgedPairs(pairs=open_source("emoji", split="test", count=count, size=size)),
            workload=SEARCH_WORKLOAD,
        )
        space = replace(search_space(device, "image", here=True), smoothing=False)
        with open_evaluator(task, Path(folder) / "points") as trial:
            result = search(trial, space, rank=True, progress=say)
    print(search_table(result))
    return finish([*bars(result, behind)], args.out)


def plant(path: Path) -> set[str]:
    """Enlarge a channel of a LayerNorm; return the names of the products that read it."""
    model = load_graph(path)
    _, norm, *_ = smoothable(model)
    node = next(item for item in model.graph.node if item.name == norm)
    (scale,) = (item for item in model.graph.initializer if item.name == node.input[1])
    divisors = np.ones(scale.dims[0])
    divisors[int(np.argmax(np.abs(onnx.numpy_helper.to_array(scale))))] = 1 / _FACTOR
    rescale(model, norm, divisors)
    save_graph(model, path)
    return {item.name for item in model.graph.node if node.output[0] in item.input}


def bars(result: SearchResult, behind: set[str]) -> Iterator[Bar]:
    naive, chosen = result.candidates[1], result.chosen
    assert result.damage is not None
    assert naive.cosine is not None
    first, second = result.damage.groups[:2]
    kept = set(chosen.config.kept) if isinstance(chosen.config, StaticInt8) else set()
    last = result.judged[-1].records if result.judged else ()
    gap = first.divergence.value / second.divergence.value
    held = bool(last) and all(record.passed for record in last)
    yield hold(BARS, "planted_found_first", float(set(first.nodes) <= behind))
    yield hold(BARS, "planted_stands_out", gap)
    yield hold(BARS, "planted_kept", len(behind & kept) / len(behind))
    yield hold(BARS, "naive_collapses", naive.cosine)
    yield hold(BARS, "searched_gates_held_on_test", float(held))
    if chosen.latency is not None:
        yield hold(BARS, "searched_time_to_fp32", chosen.latency.ratio)


if __name__ == "__main__":
    sys.exit(main())
