import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeclip.export.gates.select_precision import select_precision
from edgeclip.export.graph.embedders import Embedder
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.spec import Precision
from tests.conftest import QUICK

INPUTS = np.zeros((2, 3), np.float32)


def sleeper(milliseconds: float) -> Embedder:
    def run(values: NDArray[Any]) -> FloatArray:
        time.sleep(milliseconds / 1000)
        return np.zeros((len(values), 4), np.float32)

    return run


def chosen(**milliseconds: float) -> tuple[Precision, str, Callable[[Precision], float | None]]:
    embedders: dict[Precision, Embedder] = {
        name: sleeper(value)  # type: ignore[misc]
        for name, value in milliseconds.items()
    }
    choice = select_precision("image", embedders, INPUTS, QUICK)
    return choice.precision, choice.why, choice.latency_ms


def test_the_fastest_is_chosen() -> None:
    precision, why, latency_ms = chosen(fp32=24, fp16=16, int8=4)
    assert precision == "int8"
    assert "int8 takes 0." in why
    fp32, int8 = latency_ms("fp32"), latency_ms("int8")
    assert fp32 is not None
    assert int8 is not None
    assert int8 < fp32


def test_int8_is_never_chosen_where_it_is_slower() -> None:
    assert chosen(fp32=4, int8=12)[0] == "fp32"


def test_what_is_not_surely_faster_is_not_chosen() -> None:
    pace = {"wall": 0}

    def erratic(values: NDArray[Any]) -> FloatArray:
        pace["wall"] += 1
        time.sleep(0.001 if pace["wall"] % 2 else 0.02)
        return np.zeros((len(values), 4), np.float32)

    choice = select_precision("text", {"fp32": sleeper(8), "int8": erratic}, INPUTS, QUICK)
    assert choice.precision == "fp32"


def test_fp32_alone_is_chosen_with_a_reason() -> None:
    precision, why, latency_ms = chosen(fp32=1)
    assert (precision, why) == ("fp32", "the only precision in the bundle")
    assert latency_ms("int8") is None


def test_the_first_input_alone_is_timed() -> None:
    seen: set[tuple[int, ...]] = set()

    def record(values: NDArray[Any]) -> FloatArray:
        seen.add(values.shape)
        return np.zeros((len(values), 4), np.float32)

    select_precision("image", {"fp32": record}, INPUTS, QUICK)
    assert seen == {(1, 3)}


@pytest.mark.parametrize("slow", [12.0, 20.0])
def test_the_ratio_is_that_of_the_rounds(slow: float) -> None:
    embedders: dict[Precision, Embedder] = {"fp32": sleeper(slow), "int8": sleeper(slow / 4)}
    choice = select_precision("image", embedders, INPUTS, QUICK)
    found = choice.measurements[1].ratio
    assert found is not None
    assert found.reference == "fp32"
    assert 0.2 < found.ratio.value < 0.6
