"""fp16 towers with islands of fp32: the fewest nodes without which the tower misses its gates.

Ranges alone do not tell which nodes those are: a value can fit into fp16 and still lose the
digits that a difference behind it needs. So the tower is measured: converted with some nodes
in fp32, run with every fp16 value rounded, and held against fp32.
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
from edgeclip.export.quantizing.config import Kept
from edgeclip.export.quantizing.fp16 import emulate_half, half_values, to_fp16, too_large
from edgeclip.runtime.arrays import FloatArray


def hold_inputs(batches: Iterator[NDArray[Any]], path: Path) -> tuple[NDArray[Any], ...]:
    """Write batches to a file, one behind the other, and return them mapped into memory.

    Pictures are decoded and cut only once, and memory holds one batch at a time, whatever
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


Passes = Callable[[Collection[str]], bool]

_TRIALS = 200  # conversions and runs after which the best set so far is returned


def find_islands(
    source: Path,
    data: CalibrationData,
    *,
    bounds: Bounds = DEFAULT_BOUNDS["fp16"],
    cache: Path | None = None,
) -> Kept:
    """Return nodes to keep in fp32, so that a tower in fp16 loses at most half of what it may.

    None of them can be left out, unless trials ran out, or one more made it worse (see
    `fewest`). What is too large for fp16 stays in fp32 anyhow and is not among them.

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
        held = hold_inputs(map(data.batch, range(data.count)), Path(folder) / "inputs")
        return _islands(_Tower(source, CalibrationData(len(held), held.__getitem__), bounds, cache))


def _islands(tower: "_Tower") -> Kept:
    if tower.passes(()):
        return ()
    nodes = tower.nodes()
    if not tower.passes(nodes):
        raise ExportError(
            f"{tower.name} misses its gates with every node in fp32: its embeddings of the "
            "calibration data are not finite or not of length 1, export it again"
        )
    # fp16 has the fewest digits behind the point where values are large.
    likely = sorted(nodes, key=tower.bound, reverse=True)
    found = set(fewest(likely, tower.passes))
    return tuple(name for name in nodes if name in found)


def fewest(items: Sequence[str], passes: Passes, trials: int = _TRIALS) -> tuple[str, ...]:
    """Return a part of `items`, all of which pass, that passes with none of it left out.

    QuickXplain (Junker 2004, AAAI): for k of n items about 2k log2(n/k) + 2k trials. Where
    several parts would do, it prefers what comes first. After so many trials, what is not
    decided stays in. It takes for granted that more items never make a part fail; where they
    do, all are returned.
    """
    left = trials

    def needed(given: Sequence[str], added: bool, among: Sequence[str]) -> Sequence[str]:
        """The part of `among` that is needed beside `given`, to which some were just added."""
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


class _Tower:
    """A tower in fp32, converted and run again and again."""

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
        self._large = too_large(self.model, self._ranges)
        self._reference = embed(self.model, data)
        self._outputs = {node.name: tuple(node.output) for node in self.model.graph.node}
        self._seen: dict[frozenset[str], bool] = {}

    def nodes(self) -> list[str]:
        """Names of the nodes that may stay in fp32, in the graph's order."""
        half = self._converted(())
        values = half_values(half)
        made = {node.name for node in half.graph.node if values & set(node.output)}
        return [node.name for node in self.model.graph.node if node.name in made]

    def bound(self, node: str) -> float:
        """Return the largest absolute value that a node gives."""
        return max(self._ranges.get(name, 0.0) for name in self._outputs[node])

    def passes(self, kept: Collection[str]) -> bool:
        """Tell whether the tower stays close enough to fp32 with these nodes in fp32."""
        key = frozenset(kept)
        if key not in self._seen:
            found = embed(emulate_half(self._converted(kept)), self._data)
            records = judge_tower(found, self._reference, self._bounds)
            self._seen[key] = all(record.passed for record in records)
        return self._seen[key]

    def _converted(self, kept: Collection[str]) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        return to_fp16(copy, self._large | set(kept))


def embed(model: onnx.ModelProto, data: CalibrationData) -> FloatArray:
    """Run a graph on all batches on this machine's CPU; return its first output, [N, dim].

    Raises:
        EngineError: the graph cannot be run here.
    """
    given, wanted = model.graph.input[0].name, model.graph.output[0].name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trial.onnx"
        write_unchecked(model, path)
        engine = open_engine_here(path)
        return np.concatenate(
            [engine.run({given: data.batch(index)})[wanted] for index in range(data.count)]
        )
