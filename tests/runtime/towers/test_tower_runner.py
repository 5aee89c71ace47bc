from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.spec import Precision, Tower
from edgeclip.runtime.towers.tower_runner import golden_check, graph_source, in_batches, open_tower


class Changed:
    """A real engine whose embeddings are altered on their way out."""

    name = "changed"

    def __init__(self, engine: Engine, change: Any) -> None:
        self.engine, self.change = engine, change

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {name: self.change(value) for name, value in self.engine.run(feeds).items()}


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_must_agree_with_the_golden_embeddings(
    tower: Tower, precision: Precision, tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    bundle = Bundle.open(tiny_bundle)
    check = golden_check(bundle, bundle.golden(), tower, precision, batches=(1, 4, 32))
    engine = open_tower(bundle, tower, precision, cpu_device)
    (record,) = check(engine)
    assert record.passed
    assert record.value == pytest.approx(1, abs=1e-6)
    (wrong,) = check(Changed(engine, lambda value: value[:, ::-1]))
    assert not wrong.passed
    (overflown,) = check(Changed(engine, lambda value: np.full_like(value, np.nan)))
    assert (overflown.passed, overflown.value) == (False, -1.0)


def test_an_engine_that_is_wrong_at_one_size_of_batch(
    tiny_bundle: Path, cpu_device: DeviceProfile
) -> None:
    bundle = Bundle.open(tiny_bundle)
    engine = open_tower(bundle, "text", "fp32", cpu_device)
    seen = []

    def change(value: NDArray[Any]) -> NDArray[Any]:
        seen.append(len(value))
        return value[:, ::-1] if len(value) == 32 else value

    for batches, passes in (((1, 4), True), ((1, 4, 32), False)):
        check = golden_check(bundle, bundle.golden(), "text", "fp32", batches=batches)
        (record,) = check(Changed(engine, change))
        assert record.passed is passes
    assert set(seen) == {1, 4, 32}


def test_a_graph_is_known_by_its_declared_hash(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    source = graph_source(bundle, "text", "int8")
    declared = {file.path: file.sha256 for file in bundle.manifest.files}
    assert source.sha256 == declared["onnx/text_model_int8.onnx"]
    assert (source.name, source.text_length) == ("text_model_int8", 16)
    assert graph_source(bundle, "image", "int8").text_length is None


@given(
    rows=st.integers(1, 20),
    fixed_batch=st.one_of(st.none(), st.integers(1, 8)),
    max_batch=st.one_of(st.none(), st.integers(1, 8)),
)
def test_batches_join_to_what_was_asked(
    rows: int, fixed_batch: int | None, max_batch: int | None
) -> None:
    seen: list[int] = []

    def run(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        seen.append(len(values))
        return {"double": 2 * values}

    values = np.arange(3 * rows).reshape(rows, 3)
    found = in_batches(run, values, fixed_batch=fixed_batch, max_batch=max_batch)["double"]
    np.testing.assert_array_equal(found, 2 * values)
    if fixed_batch is not None:
        assert set(seen) == {fixed_batch}
    elif max_batch is not None:
        assert max(seen) <= max_batch
