"""The yardstick: a small fixed graph whose time says what a machine was worth just then.

A machine is faster in one hour than in another, by its clock, its heat and its neighbours. What
is measured in turns with the yardstick, and divided by it round by round, can be compared with a
run of another hour. It is one layer of a transformer in fp32 on ONNX Runtime's CPU provider, at
about a millisecond. `edgeclip.export.write_yardstick` made its file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.engine_ort import OrtEngine
from edgeclip.runtime.measuring.interleave import Candidate
from edgeclip.runtime.providers import CPU

NAME = "transformer-layer-1"  # another graph has another name: their times do not compare
TOKENS, WIDTH = 64, 256
_GRAPH = Path(__file__).with_name("graphs") / "yardstick.onnx"


def yardstick_candidate(threads: int) -> Candidate:
    """The yardstick as something to measure, on so many threads.

    Raises:
        EngineError: onnxruntime cannot load the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    engine = OrtEngine(_GRAPH, providers=(CPU,), threads=threads)

    def run(values: NDArray[Any]) -> object:
        return engine.run({"values": values})["result"]

    return Candidate(NAME, run, _values, threads)


def _values(size: int) -> NDArray[np.float32]:
    """float32 [size, TOKENS, WIDTH] between -1 and 1, always the same."""
    count = size * TOKENS * WIDTH
    return np.sin(np.arange(count)).astype(np.float32).reshape(size, TOKENS, WIDTH)
