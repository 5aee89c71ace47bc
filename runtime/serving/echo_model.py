"""A model that computes nothing, to measure the server around it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.serving.models import TensorSpec
from edgeclip.runtime.wire.messages import Parameter


class EchoModel:
    """Says how many bytes each row of `data` (UINT8 [N, bytes]) has: `size`, INT64 [N]."""

    name = "echo"
    inputs = (TensorSpec(name="data", datatype="UINT8", shape=(-1, -1)),)
    outputs = (TensorSpec(name="size", datatype="INT64", shape=(-1,)),)
    space: str | None = None

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Answer a request."""
        rows, size = inputs["data"].shape
        return {"size": np.full(rows, size, np.int64)}
