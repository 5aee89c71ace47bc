"""One run of a model for several requests: joined, run, and cut apart again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.serving.models import Arrays, Model
from edgeclip.runtime.wire.messages import Parameter
from edgeclip.runtime.wire.tensors import WireError, datatype_of

Outputs = dict[str, NDArray[Any]]
Answer = Outputs | BaseException


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one request brings to a run: arrays whose first axis has `rows`, and parameters."""

    inputs: Arrays
    parameters: Mapping[str, Parameter]
    rows: int

    @property
    def key(self) -> object:
        """Equal for requests that may be run together.

        Names, dtypes, shapes beyond the first axis, and parameters with their types agree
        then (1, 1.0 and True are equal in Python). Where an input has another number of
        rows, nothing is equal.
        """
        if any(array.shape[:1] != (self.rows,) for array in self.inputs.values()):
            return object()
        arrays = ((name, array.dtype, array.shape[1:]) for name, array in self.inputs.items())
        values = ((key, type(value), value) for key, value in self.parameters.items())
        return frozenset(arrays), frozenset(values)


def run_joined(model: Model, shares: Sequence[Share]) -> list[Answer]:
    """Run all shares at once; the answer to each is its rows of the outputs.

    Where that fails, they are run one by one, so that the failure is that of one request.

    Args:
        model: gives one row for each that it is given.
        shares: of equal `key`; at least one.
    """
    if len(shares) > 1:
        try:
            return _run_together(model, shares)
        except BaseException:  # a fault of one of them, which the single runs will show
            pass
    return [run_single(model, share) for share in shares]


def run_single(model: Model, share: Share) -> Answer:
    """Run one share; a failure of any kind is the answer."""
    try:
        return _checked(model, model.run(share.inputs, share.parameters))
    except BaseException as error:  # SystemExit too, which a user's function may raise
        return error


def _run_together(model: Model, shares: Sequence[Share]) -> list[Answer]:
    first = shares[0]
    joined = {
        name: np.concatenate([share.inputs[name] for share in shares]) for name in first.inputs
    }
    for array in joined.values():
        array.flags.writeable = False  # as what comes off the wire is
    outputs = _checked(model, model.run(joined, first.parameters))
    rows = sum(share.rows for share in shares)
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        raise EngineError(f"{model.name} gave another number of rows than it was given")
    answers: list[Answer] = []
    start = 0
    for share in shares:
        stop = start + share.rows
        answers.append({name: array[start:stop] for name, array in outputs.items()})
        start = stop
    return answers


def _checked(model: Model, outputs: object) -> Outputs:
    if not isinstance(outputs, dict) or not all(
        isinstance(name, str) and isinstance(array, np.ndarray) for name, array in outputs.items()
    ):
        raise EngineError(f"{model.name} gave something other than named arrays")
    for name, array in outputs.items():
        try:
            datatype_of(array)
        except WireError as error:
            raise EngineError(f"output {name!r} of {model.name}: {error}") from None
    return outputs
