"""Find the smallest set of nodes that must stay in fp32 for an fp16 tower to pass its gates.

Ranges alone do not tell which nodes those are: a value can fit into fp16 and still lose the
digits that a subtraction behind it needs. So the tower is measured: converted with some nodes
in fp32, run with every fp16 value rounded, and compared with fp32.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import DEFAULT_BOUNDS, Bounds, judge_tower
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import limit_masks, load_graph, write_unchecked
from edgeclip.export.quantizing.activation_ranges import cached_bounds, open_engine_here
from edgeclip.export.quantizing.config import NodeNames
from edgeclip.export.quantizing.fp16 import emulate_fp16, fp16_values, nodes_beyond_fp16, to_fp16
from edgeclip.runtime.arrays import FloatArray


def cache_inputs(batches: Iterator[NDArray[Any]], path: Path) -> tuple[NDArray[Any], ...]:
    """Write batches to one file, and return them as memory-mapped arrays.

    Pictures are decoded and cropped only once, and memory holds one batch at a time, whatever
    their number. The file must stay until the arrays are gone.
    """
    shapes: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
    with path.open("wb") as file:
        for batch in batches:
            shapes.append((batch.dtype, batch.shape))
            file.write(np.ascontiguousarray(batch).data)
    held: list[NDArray[Any]] = []
    offset = 0
    for kind, shape in shapes:
        array = np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape)
        held.append(array)
        offset += array.nbytes
    return tuple(held)


_MAX_TRIALS = 200  # conversions and runs after which the best set so far is returned


def find_islands(
    source: Path,
    data: CalibrationData,
    *,
    bounds: Bounds = DEFAULT_BOUNDS["fp16"],
    cache: Path | None = None,
) -> NodeNames:
    """Return a minimal set of nodes to keep in fp32, with which the tower passes its gates.

    The allowed loss of cosine is halved, because other inputs lose more than those of
    calibration. What exceeds the range of fp16 stays in fp32 anyhow and is not in the set.
    For its minimality see `minimal_subset`.

    Args:
        source: the tower in fp32.
        data: what it is run on.
        bounds: the cosines that it must keep.
        cache: a folder for ranges that were found, which belongs to this data alone.

    Raises:
        ExportError: the tower misses its gates with every node in fp32, or cannot be read.
        EngineError: it cannot be run here.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Pictures are decoded once, and not for each trial.
        batches = cache_inputs(map(data.batch, range(data.count)), Path(folder) / "inputs")
        cached = CalibrationData(len(batches), batches.__getitem__)
        tower = _MixedTower(source, cached, bounds, cache)
        if tower.passes(()):
            return ()
        nodes = tower.nodes()
        if not tower.passes(nodes):
            raise ExportError(
                f"{tower.name} misses its gates with every node in fp32: its embeddings of the "
                "calibration data are not finite or not of length 1, export it again"
            )
        # Large values have the fewest digits behind the point in fp16.
        likely = sorted(nodes, key=tower.largest, reverse=True)
        found = set(minimal_subset(likely, tower.passes))
        return tuple(name for name in nodes if name in found)


def minimal_subset(
    items: Sequence[str], passes: Callable[[Collection[str]], bool], trials: int = _MAX_TRIALS
) -> tuple[str, ...]:
    """Return a subset of `items` that passes, and no smaller subset of which passes.

    QuickXplain (Junker 2004, AAAI): about 2k log2(n/k) + 2k trials for k of n items. Items
    that come first are preferred. Once `trials` are used up, undecided items stay in the subset.
    All `items` together must pass. Adding items is assumed never to make a passing set fail;
    where it does, all items are returned.
    """
    left = trials

    def needed(given: Sequence[str], added: bool, among: Sequence[str]) -> Sequence[str]:
        """Return the part of `among` needed beside `given`; `added`: `given` has just grown."""
        nonlocal left
        if added and left > 0:
            left -= 1
            if passes(given):
                return ()
        if len(among) == 1 or left <= 0:
            return among
        first, second = among[: len(among) // 2], among[len(among) // 2 :]
        late = needed([*given, *first], True, second)
        early = needed([*given, *late], bool(late), first)
        return [*early, *late]

    found = needed((), False, items)
    return tuple(found) if passes(found) else tuple(items)


class _MixedTower:
    """A tower converted to fp16 with changing sets of nodes in fp32, and run on cached inputs."""

    def __init__(
        self, source: Path, data: CalibrationData, bounds: Bounds, cache: Path | None
    ) -> None:
        self.name, self.model = source.name, load_graph(source)
        limit_masks(self.model)
        self._data = data
        # Other inputs lose more than those of calibration: half of what may be lost is theirs.
        self._bounds = Bounds(
            mean_cosine=(1 + bounds.mean_cosine) / 2, p1_cosine=(1 + bounds.p1_cosine) / 2
        )
        self._ranges = cached_bounds(source, data, cache=cache)
        self._large = nodes_beyond_fp16(self.model, self._ranges)
        self._reference = embed_graph(self.model, data)
        self._outputs = {node.name: tuple(node.output) for node in self.model.graph.node}
        self._seen: dict[frozenset[str], bool] = {}

    def nodes(self) -> list[str]:
        """Return the names of the nodes with fp16 outputs, in the graph's order."""
        half = self._converted(())
        values = fp16_values(half)
        made = {node.name for node in half.graph.node if values & set(node.output)}
        return [node.name for node in self.model.graph.node if node.name in made]

    def largest(self, node: str) -> float:
        """Return the largest absolute value of a node's outputs."""
        return max(self._ranges.get(name, 0.0) for name in self._outputs[node])

    def passes(self, kept: Collection[str]) -> bool:
        """Return whether the tower is inside its gates with these nodes in fp32."""
        key = frozenset(kept)
        if key not in self._seen:
            found = embed_graph(emulate_fp16(self._converted(kept)), self._data)
            records = judge_tower(found, self._reference, self._bounds)
            self._seen[key] = all(record.is_inside for record in records)
        return self._seen[key]

    def _converted(self, kept: Collection[str]) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        return to_fp16(copy, self._large | set(kept))


def embed_graph(model: onnx.ModelProto, data: CalibrationData) -> FloatArray:
    """Run a graph on all batches on this machine's CPU; return its first output, [N, dim]."""
    given, wanted = model.graph.input[0].name, model.graph.output[0].name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        write_unchecked(model, path)
        engine = open_engine_here(path)
        return np.concatenate(
            [engine.run({given: data.batch(index)})[wanted] for index in range(data.count)]
        )
