import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.export.gates.select_precision import select_precision
from edgeclip.export.graph.embedders import Embedder
from edgeclip.profiles.measure.interleaved_loads import LOADS
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.spec import Precision
from tests.conftest import QUICK

INPUTS = np.zeros((2, 3), np.float32)


Loader = Callable[[], Embedder]


def sleeper(milliseconds: float, loads: list[float] | None = None) -> Loader:
    """An engine that takes so long; `loads` gives each load a pace of its own."""
    paces = iter(loads or [])

    def load() -> Embedder:
        wait = milliseconds / 1000 * next(paces, 1.0)

        def run(values: NDArray[Any]) -> FloatArray:
            time.sleep(wait)
            return np.zeros((len(values), 4), np.float32)

        return run

    return load


def chosen(**loaders: Loader) -> tuple[Precision, str, Callable[[Precision], float | None]]:
    named: dict[Precision, Loader] = {**loaders}  # type: ignore[dict-item]
    choice = select_precision("image", named, INPUTS, QUICK)
    return choice.precision, choice.why, choice.latency_ms


def test_the_fastest_is_chosen() -> None:
    precision, why, latency_ms = chosen(fp32=sleeper(9), fp16=sleeper(5), int8=sleeper(1))
    assert precision == "int8"
    assert "int8 takes 0." in why
    fp32, int8 = latency_ms("fp32"), latency_ms("int8")
    assert fp32 is not None
    assert int8 is not None
    assert int8 < fp32


def test_int8_is_never_chosen_where_it_is_slower() -> None:
    precision, why, _ = chosen(fp32=sleeper(1), int8=sleeper(4))
    assert precision == "fp32"
    assert "(not surely less)" in why


def test_what_is_faster_in_some_loads_only_is_not_chosen() -> None:
    """All runs of a load are alike, so that each load by itself would be sure."""
    lucky = sleeper(4, loads=[0.2, 2.5, 0.2, 2.5, 0.2, 0.2])
    precision, why, _ = chosen(fp32=sleeper(4), int8=lucky)
    assert precision == "fp32"
    assert "(not surely less)" in why


def test_fp32_alone_is_chosen_with_a_reason() -> None:
    precision, why, latency_ms = chosen(fp32=sleeper(1))
    assert (precision, why) == ("fp32", "the only precision in the bundle")
    assert latency_ms("int8") is None


def test_the_first_input_alone_is_timed() -> None:
    seen: set[tuple[int, ...]] = set()

    def record(values: NDArray[Any]) -> FloatArray:
        seen.add(values.shape)
        return np.zeros((len(values), 4), np.float32)

    select_precision("image", {"fp32": lambda: record}, INPUTS, QUICK)
    assert seen == {(1, 3)}


def test_the_ratio_is_that_of_the_rounds_of_several_loads() -> None:
    loaders: dict[Precision, Loader] = {"fp32": sleeper(8), "int8": sleeper(2)}
    choice = select_precision("image", loaders, INPUTS, QUICK)
    item = choice.measurements[1]
    assert item.ratio is not None
    assert item.ratio.reference == "fp32"
    assert 0.2 < item.ratio.ratio.value < 0.6
    assert [len(runs) for runs in item.samples_ms] == [QUICK.repeats] * LOADS
