"""What a captured tower computes in torch, value by value, named as in its ONNX graph."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class TorchValues:
    """All values of a program that `torch.onnx.export` made a graph of, from one run.

    The exporter names the results of ONNX nodes after those of torch's operators, so they
    can be compared by name. (torch.onnx.verification compares the same values, but only
    those of a program still in memory, and with one more session for every value.)

    Args:
        program: the exporter's result.
        inputs: what the program takes, in order.
    """

    def __init__(self, program: torch.onnx.ONNXProgram, inputs: Sequence[Tensor]) -> None:
        captured = program.exported_program
        assert captured is not None
        recorder = _Recorder(captured.module())
        with torch.no_grad():
            given = recorder.run(*inputs)
        self.results: tuple[NDArray[Any], ...] = tuple(map(_array, _flat(given)))
        names = [str(item.name) for item in program.model.graph.outputs]
        self._values = recorder.values | dict(zip(names, self.results, strict=True))
        self.names: tuple[str, ...] = tuple(self._values)

    def values(self, names: Collection[str]) -> dict[str, NDArray[Any]]:
        """Return the values of those names."""
        return {name: self._values[name] for name in names}


class _Recorder(torch.fx.Interpreter):
    """Runs a program operator by operator and keeps each tensor."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)  # an exported module is a graph module
        self.values: dict[str, NDArray[Any]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor):
            self.values[n.name] = _array(result)
        return result


def _flat(given: Any) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _array(value: Tensor) -> NDArray[Any]:
    """Copy a tensor; bfloat16, which numpy lacks, as float32."""
    plain = value.detach().cpu()
    found: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return found.copy()
