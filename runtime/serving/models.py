"""The interface of served models (named arrays in and out), and Python functions as models."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from edgeclip.runtime.arrays import Tensors
from edgeclip.runtime.errors import InputError
from edgeclip.runtime.wire.messages import TOP, Parameter, get_number
from edgeclip.runtime.wire.tensors import datatype_of

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # needs no escapes in a URL


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a model.

    Attributes:
        name: unique among the inputs, or among the outputs.
        datatype: data type of the Open Inference Protocol, such as FP32 or BYTES.
        shape: -1 for a size that varies; the first axis is the batch.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def check(self, array: NDArray[Any]) -> None:
        """Raise if an array has another datatype or shape.

        Raises:
            InputError: with the expected datatype and shape.
        """
        fits = len(array.shape) == len(self.shape) and all(
            wanted in (-1, size) for wanted, size in zip(self.shape, array.shape, strict=True)
        )
        found = datatype_of(array)
        if found != self.datatype or not fits:
            raise InputError(
                f"input {self.name!r} is {self.datatype} {list(self.shape)} (-1 varies), "
                f"not {found} {list(array.shape)}"
            )


class ServingModel(Protocol):
    """A model that a server can run; it is called from one thread at a time.

    A model with empty `inputs` checks its inputs itself.
    """

    @property
    def name(self) -> str:
        """Letters, digits, `.`, `_` and `-`."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of `run`."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs of `run`."""
        ...

    @property
    def space(self) -> str | None:
        """Fingerprint of the model's embedding space, if it has one."""
        ...

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Run the model on read-only arrays.

        Raises:
            InputError: the inputs or parameters are wrong.
            EngineError: the model failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """A model, and whether its requests may be batched.

    Attributes:
        model: the model.
        joins: whether rows of several requests may form one batch: every row of the outputs
            must depend on the same row of each input alone.
    """

    model: ServingModel
    joins: bool


class Registry:
    """The models of one server, by name."""

    def __init__(self) -> None:
        self._served: dict[str, RegisteredModel] = {}

    def add(self, model: ServingModel, *, joins: bool = True) -> None:
        """Add a model; for `joins` see `RegisteredModel`.

        Raises:
            InputError: its name is taken, or not valid in a URL.
        """
        if not _NAME.fullmatch(model.name):
            raise InputError(
                f"{model.name!r} cannot name a model: use letters, digits, '.', '_' and '-'"
            )
        if model.name in self._served:
            raise InputError(f"two models are called {model.name!r}: give one another name")
        self._served[model.name] = RegisteredModel(model, joins)

    def get(self, name: str) -> RegisteredModel | None:
        """Return a model by its name; None if there is none."""
        return self._served.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models."""
        return tuple(self._served)

    def __iter__(self) -> Iterator[RegisteredModel]:
        return iter(self._served.values())


def without_columns(model: ServingModel, inputs: Tensors) -> Tensors:
    """Return the inputs, those that are declared as [N] flat where they come as [N, 1].

    So clients send them that add an axis for the batch to every input (Triton's, MLServer's).
    """
    flat = {spec.name for spec in model.inputs if len(spec.shape) == 1}
    return {
        name: array[:, 0] if name in flat and array.ndim == 2 and array.shape[1] == 1 else array
        for name, array in inputs.items()
    }


def check_inputs(model: ServingModel, inputs: Tensors) -> int:
    """Check the inputs of a request and return the number of rows.

    For a model without declared inputs, that is the longest first axis.

    Raises:
        InputError: missing or unknown inputs, another datatype or shape, different numbers of
            rows, or none.
    """
    if not model.inputs:
        return max((array.shape[0] for array in inputs.values() if array.shape), default=1)
    wanted = {spec.name for spec in model.inputs}
    if inputs.keys() != wanted:
        raise InputError(
            f"{model.name} takes the inputs {_names(wanted)}, not {_names(inputs.keys())}"
        )
    for spec in model.inputs:
        spec.check(inputs[spec.name])
    counts = {array.shape[0] for array in inputs.values()}
    if len(counts) > 1:
        raise InputError(f"the inputs have different numbers of rows: {sorted(counts)}")
    (rows,) = counts
    if rows == 0:
        raise InputError("the inputs have no rows: send at least one")
    return int(rows)


def take_top(parameters: Mapping[str, Parameter], default: int, maximum: int) -> int:
    """Return the parameter `top`, at most `maximum`.

    Raises:
        InputError: not a whole number above 0.
    """
    top = get_number(parameters, TOP)
    if top is None:
        return min(default, maximum)
    if top != int(top) or top < 1:
        raise InputError(f"{TOP} is {top:g}: ask for a whole number of answers, at least 1")
    return min(int(top), maximum)


def _names(names: Any) -> str:
    return ", ".join(repr(name[:40]) for name in sorted(names)) or "none"


Function = Callable[[Tensors, Mapping[str, Parameter]], dict[str, NDArray[Any]]]


class FunctionModel:
    """A Python function as a model: named read-only arrays and parameters in, named arrays out.

    The function may have attributes: `inputs` and `outputs`, tuples of `TensorSpec`, to check
    requests; `space`, the fingerprint of its embedding space; and `joins = True` if each row of
    its outputs depends on the same row of its inputs alone, so that requests may be batched. It
    raises `InputError` for a client's mistake. It is called from one thread.

    Args:
        function: the function.
        name: name of the model.

    Raises:
        InputError: attributes of another type.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.name = name
        self.inputs = _specs(function, "inputs")
        self.outputs = _specs(function, "outputs")
        self.joins = getattr(function, "joins", False) is True
        space = getattr(function, "space", None)
        if not isinstance(space, str | None):
            raise InputError(f"{name}.space must be the fingerprint of an embedding space")
        self.space: str | None = space
        self._function = function

    @classmethod
    def load(cls, path: str) -> "FunctionModel":
        """Import a function as a model of the same name.

        Args:
            path: `module:function`.

        Raises:
            InputError: no such module or function, or the module fails.
        """
        module, _, name = path.partition(":")
        if not module or not name.isidentifier():
            raise InputError(f"{path!r} is not a function: write MODULE:FUNCTION")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # the user's module may raise anything
            raise InputError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
        if not callable(function):
            raise InputError(f"{path!r} is not a function, but {type(function).__name__}")
        return cls(function, name)

    def run(self, inputs: Tensors, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Call the function."""
        return self._function(inputs, parameters)


def _specs(function: Function, kind: str) -> tuple[TensorSpec, ...]:
    specs = getattr(function, kind, ())
    if not isinstance(specs, tuple) or not all(isinstance(spec, TensorSpec) for spec in specs):
        raise InputError(f"{kind} of a function must be a tuple of TensorSpec")
    return specs
