"""Pairs that graphs are held against fp32 on: their inputs and references, prepared once."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeclip.compress.sources import Source
from edgeclip.export.embed_pairs import (
    Embedder,
    FloatArray,
    embed_all,
    graph_embedder,
    torch_embedder,
    tower_inputs,
)
from edgeclip.export.gates import data_record
from edgeclip.export.judge_precisions import JudgedOn, judge_alone
from edgeclip.export.quantizing.emulate_half import stored_in_half
from edgeclip.export.quantizing.held_inputs import hold_inputs
from edgeclip.export.quantizing.search_task import JudgedPairs, SearchTask
from edgeclip.export.tower_graph import TOWERS, TowerGraph
from edgeclip.runtime.manifest import GateRecord
from edgeclip.runtime.spec import Precision, Tower


class PreparedPairs:
    """Pairs with their prepared inputs and what fp32 makes of them, each when it is needed."""

    def __init__(self, task: SearchTask, judged: JudgedPairs, path: Path) -> None:
        self._task, self._judged, self._path = task, judged, path

    @cached_property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        """Batches of the searched tower's inputs."""
        return hold_inputs(self._batches(self._judged.pairs, self._task.tower), self._path)

    @cached_property
    def others(self) -> FloatArray:
        """The other tower's embeddings, as torch computes them: float32 [N, dim]."""
        (other,) = (tower for tower in TOWERS if tower != self._task.tower)
        batches = self._batches(self._judged.pairs, other)
        (found,) = embed_all(batches, [torch_embedder(self._task.student, other)])
        return found

    @cached_property
    def labelled(self) -> tuple[NDArray[Any], ...]:
        """Batches of the labelled pictures that are not among the pairs."""
        zero = self._judged.zero_shot
        if zero is None or self._task.tower != "image" or self._rows is not None:
            return ()
        path = self._path.with_name(f"{self._path.name}-labelled")
        return hold_inputs(self._batches(zero.source, "image"), path)

    @cached_property
    def _reference(self) -> tuple[FloatArray, FloatArray | None]:
        return self._embed(self._task.graph)

    @property
    def _rows(self) -> tuple[int, ...] | None:
        zero = self._judged.zero_shot
        return None if zero is None else zero.rows_of(self._judged.pairs)

    def judge(self, graph: TowerGraph) -> tuple[GateRecord, ...]:
        """Hold a graph against the tower in fp32.

        Raises:
            EngineError: it cannot be run.
        """
        task, precision = self._task, graph.precision
        right, right_labelled = self._reference
        found, labelled = (right, right_labelled) if precision == "fp32" else self._embed(graph)
        (other,) = (tower for tower in TOWERS if tower != task.tower)
        by_precision: dict[Precision, FloatArray] = {}
        if right_labelled is not None and labelled is not None:
            by_precision = {"fp32": right_labelled, precision: labelled}
        judged = judge_alone(
            task.tower,
            precision,
            {
                (task.tower, "fp32"): right,
                (task.tower, precision): found,
                (other, "fp32"): self.others,
            },
            task.bounds[precision],
            JudgedOn(
                data=data_record(self._judged.pairs),
                zero_shot=self._judged.zero_shot,
                labelled=by_precision or None,
            ),
        )
        return tuple(item.record for item in judged)

    def _embed(self, graph: TowerGraph) -> tuple[FloatArray, FloatArray | None]:
        """Embeddings of the pairs and of the labelled pictures, if there are any."""
        with stored_in_half([graph], self._task.device) as (shown,):
            embed = open_embedder(self._task, shown)
            (found,) = embed_all(iter(self.inputs), [embed])
            if self._task.tower != "image" or self._judged.zero_shot is None:
                return found, None
            if self._rows is not None:
                return found, found[list(self._rows)]
            (labelled,) = embed_all(iter(self.labelled), [embed])
            return found, labelled

    def _batches(self, source: Source, tower: Tower) -> Iterator[NDArray[Any]]:
        student = self._task.student
        return tower_inputs(source, tower, student.spec, student.text_tokenizer)


def open_embedder(task: SearchTask, graph: TowerGraph) -> Embedder:
    """Open a graph with what runs graphs while they are judged.

    Raises:
        EngineError: it cannot be loaded.
    """
    return graph_embedder(graph, task.student.spec.image, task.runner)
