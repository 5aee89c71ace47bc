"""Small models that misbehave when asked to, for the tests of the server."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.models import TensorSpec
from edgeclip.runtime.wire.messages import InferRequest, Parameter

SPACE = "a" * 64
ROWS = TensorSpec(name="x", datatype="FP32", shape=(-1, 2))
SUMS = TensorSpec(name="sum", datatype="FP32", shape=(-1,))
PATIENCE = 30.0  # seconds after which a test is broken, not slow


class GatedModel:
    """Sums the rows of `x`, FP32 [N, 2]; each run waits until `gate` is set.

    Rows that begin with NaN are an `InputError`, those that begin with -1 a fault of the model.

    Attributes:
        gate: closed by `gate.clear()`.
        began: set when a run begins.
        batches: rows of each run.
    """

    inputs: tuple[TensorSpec, ...] = (ROWS,)
    outputs: tuple[TensorSpec, ...] = (SUMS,)
    space: str | None = SPACE

    def __init__(self, name: str = "gated", *, is_open: bool = True) -> None:
        self.name = name
        self.gate = threading.Event()
        self.began = threading.Event()
        self.batches: list[int] = []
        if is_open:
            self.gate.set()

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Wait and sum."""
        rows = inputs["x"]
        self.batches.append(len(rows))
        self.began.set()
        assert self.gate.wait(PATIENCE)
        if np.isnan(rows[:, 0]).any():
            raise InputError("a row begins with NaN")
        if (rows[:, 0] == -1).any():
            raise ZeroDivisionError("secret detail")
        if (rows[:, 0] == -2).any():
            raise SystemExit(3)
        return {"sum": rows.sum(axis=1)}


def rows(*values: float) -> dict[str, NDArray[np.float32]]:
    """Inputs of a `GatedModel`: one row (value, 1) for each value."""
    return {"x": np.array([[value, 1] for value in values], np.float32)}


def question(*values: float, **parameters: Parameter) -> InferRequest:
    """A request to a `GatedModel`."""
    return InferRequest(model="gated", inputs=rows(*values), parameters=parameters, id="q1")
