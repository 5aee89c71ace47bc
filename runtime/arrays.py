"""Array types that every room uses in its signatures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]  # embeddings, pixels after normalisation
Values = NDArray[np.float64]  # measurements and statistics
Tensors = Mapping[str, NDArray[Any]]  # named inputs of a graph or a request
Outputs = dict[str, NDArray[Any]]  # named outputs of a graph
