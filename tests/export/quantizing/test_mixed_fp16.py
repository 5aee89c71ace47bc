"""Islands of fp32: only where they are needed, and as few as are."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.errors import ExportError
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.export.graph.calibration import CalibrationData
from edgeclip.export.graph.graph_io import load_graph, save_graph
from edgeclip.export.graph.to_onnx import TowerPaths
from edgeclip.export.quantizing.fp16 import emulate_fp16, write_fp16
from edgeclip.export.quantizing.mixed_fp16 import embed_graph, find_islands, minimal_subset
from tests.export.quantizing.collapse_models import with_offset, within
from tests.export.quantizing.small_graphs import batches, graph_of

pytestmark = pytest.mark.slow

BOUNDS = DEFAULT_BOUNDS["fp16"]


@given(
    count=st.integers(1, 60),
    needed=st.sets(st.integers(0, 59), min_size=1, max_size=6),
)
def test_the_fewest_are_found_in_few_trials(count: int, needed: set[int]) -> None:
    wanted = {str(item % count) for item in needed}
    tried = []

    def passes(kept: Collection[str]) -> bool:
        tried.append(kept)
        return wanted <= set(kept)

    found = minimal_subset([str(item) for item in range(count)], passes)
    assert set(found) == wanted
    assert len(tried) <= 2 * len(wanted) * (np.log2(count) + 1) + 2


def test_where_several_would_do_the_first_are_taken() -> None:
    def passes(kept: Collection[str]) -> bool:
        return len(kept) >= 3

    assert minimal_subset("abcdefgh", passes) == ("a", "b", "c")


def test_what_is_not_decided_when_trials_run_out_stays_in() -> None:
    def passes(kept: Collection[str]) -> bool:
        return "b" in kept and "g" in kept

    found = minimal_subset("abcdefgh", passes, trials=2)
    assert passes(found)
    assert len(found) > 2


def test_all_stay_where_more_is_sometimes_worse() -> None:
    def passes(kept: Collection[str]) -> bool:
        return set(kept) in ({"a", "b", "c", "d"}, {"a", "b", "c"}, {"c"})

    assert passes(minimal_subset("abcd", passes))


def text_data(clip: DualEncoder) -> CalibrationData:
    words = ["red", "green and blue", "picture 3: a white blob", "picture 12: teal pink brown"]
    ids = clip.text_tokenizer.encode(words)
    return CalibrationData(1, lambda _: ids)


def test_a_sound_tower_needs_none(clip: DualEncoder, clip_towers: TowerPaths) -> None:
    assert find_islands(clip_towers.text, text_data(clip)) == ()


def test_digits_lost_in_a_large_offset_are_found_where_ranges_say_nothing(
    clip: DualEncoder, clip_towers: TowerPaths, tmp_path: Path
) -> None:
    source, half, data = tmp_path / "f.onnx", tmp_path / "half.onnx", text_data(clip)
    model = load_graph(clip_towers.text)
    with_offset(model, 2000)
    save_graph(model, source)
    right = embed_graph(load_graph(source), data)

    write_fp16(source, half, data)
    assert not within(embed_graph(emulate_fp16(load_graph(half)), data), right, BOUNDS)

    asked = []

    def batch(index: int) -> NDArray[Any]:
        asked.append(index)
        return data.batch(index)

    islands = find_islands(source, CalibrationData(data.count, batch))
    assert asked == list(range(data.count))  # pictures are slow to prepare
    write_fp16(source, half, data, islands=islands)
    assert within(embed_graph(emulate_fp16(load_graph(half)), data), right, BOUNDS)
    nodes = {node.name: node.op_type for node in model.graph.node}
    assert 0 < len(islands) < len(nodes) / 4
    assert "Softmax" not in {nodes[name] for name in islands}
    # None of them is there for nothing.
    write_fp16(source, half, data, islands=islands[1:])
    assert not within(embed_graph(emulate_fp16(load_graph(half)), data), right, BOUNDS)


def test_a_tower_without_usable_embeddings_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    model = graph_of([node], {"w": np.eye(4)}, given=["b", 4], outputs={"y": ["b", 4]})
    save_graph(model, tmp_path / "f.onnx")
    with pytest.raises(ExportError, match=r"every node in fp32.*not of length 1"):
        find_islands(tmp_path / "f.onnx", batches(np.full((4, 4), 9, np.float32)))
