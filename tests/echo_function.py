"""A function to serve that computes nothing: for tests and benchmarks of the server itself."""

from collections.abc import Mapping

import numpy as np

from edgeclip.runtime.arrays import Outputs, Tensors
from edgeclip.runtime.serving.models import TensorSpec
from edgeclip.runtime.wire.messages import Parameter


class _Echo:
    """Return the number of bytes of each row of `data` (UINT8 [N, bytes]): `size`, INT64 [N]."""

    inputs = (TensorSpec(name="data", datatype="UINT8", shape=(-1, -1)),)
    outputs = (TensorSpec(name="size", datatype="INT64", shape=(-1,)),)
    joins = True

    def __call__(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> Outputs:
        rows, size = inputs["data"].shape
        return {"size": np.full(rows, size, np.int64)}


echo = _Echo()
