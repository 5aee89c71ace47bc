"""A Python function of the user as a model of the server: fusion, captions, anything."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from edgeclip.runtime.errors import InputError
from edgeclip.runtime.serving.models import Arrays, TensorSpec
from edgeclip.runtime.wire.messages import Parameter

Function = Callable[[Arrays, Mapping[str, Parameter]], dict[str, NDArray[Any]]]


class FunctionModel:
    """Calls a function with named arrays (read-only) and parameters; it gives named arrays.

    The function may carry attributes: `inputs` and `outputs`, tuples of `TensorSpec`, by which
    requests are checked; `space`, the fingerprint of the embedding space it works in; and
    `joins = True` where each row of its outputs comes from the same row of its inputs alone,
    so that requests may be run together. It raises `InputError` for a client's mistake. It is
    called from one thread.

    Args:
        function: the function.
        name: of the model.

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
        """Import a function; the model is called like it.

        Args:
            path: `module:function`.

        Raises:
            InputError: no such module or function, or the module fails.
        """
        module, _, name = path.partition(":")
        if not module or not name.isidentifier():
            raise InputError(f"{path!r} is no function: write MODULE:FUNCTION")
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # the user's module may raise anything
            raise InputError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
        if not callable(function):
            raise InputError(f"{path!r} is no function, but {type(function).__name__}")
        return cls(function, name)

    def run(self, inputs: Arrays, parameters: Mapping[str, Parameter]) -> dict[str, NDArray[Any]]:
        """Call the function."""
        return self._function(inputs, parameters)


def _specs(function: Function, kind: str) -> tuple[TensorSpec, ...]:
    specs = getattr(function, kind, ())
    if not isinstance(specs, tuple) or not all(isinstance(spec, TensorSpec) for spec in specs):
        raise InputError(f"{kind} of a function must be a tuple of TensorSpec")
    return specs
