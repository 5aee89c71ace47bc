"""Time each layer of a TensorRT engine by TensorRT's own profiler.

Times come through its `IProfiler`, what a layer is from its engine inspector. Both exist in
TensorRT 10 and 11 and in TensorRT for RTX. With `enqueue_emits_profile` off, TensorRT records
events on the stream and reports when asked, once the run is over: the run itself stays
asynchronous. Written by NVIDIA's Python API reference ("IExecutionContext", "Profiler",
"EngineInspector"); no engine was profiled with it yet, for lack of a GPU.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from numpy.typing import NDArray

from edgeclip.profiles.layers.node_costs import TensorType, node_bytes
from edgeclip.profiles.layers.summarize_layers import Layer, run_alternately, summarize_layers
from edgeclip.profiles.record.measurement import LayerProfile
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import Engine
from edgeclip.runtime.engines.tensorrt_engine import TensorRtEngine
from edgeclip.runtime.engines.tensorrt_library import open_library
from edgeclip.runtime.errors import EngineError

# What an engine inspector calls a type, in "Half" or inside "Row major linear FP16 format".
_TYPES = {
    **dict.fromkeys(("float", "fp32"), "float"),
    **dict.fromkeys(("half", "fp16"), "float16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("fp8", "e4m3"), "float8e4m3fn"),
    **dict.fromkeys(("int4",), "int4x2"),
    **dict.fromkeys(("fp4", "e2m1"), "float4e2m1x2"),
    **{name: name for name in ("bool", "int8", "uint8", "int32", "int64")},
}
_PRODUCTS = {"gemm", "matrixmultiply"}
# A compiled part of the graph; it does not list the weights that it holds.
_OPAQUE = {"myelin", "foreignnode", "unknown"}


class LayerRecorder:
    """Collects what a TensorRT profiler reports, run by run.

    Attributes:
        runs: milliseconds of each layer by its name; one mapping for each run that ended.
    """

    def __init__(self) -> None:
        self.runs: list[dict[str, float]] = []
        self._now: dict[str, float] = {}

    def report(self, name: str, ms: float) -> None:
        """Add the time of a layer. TensorRT calls this from C++, where nothing may be raised."""
        self._now[name] = self._now.get(name, 0.0) + ms

    def end_run(self) -> None:
        """End a run: all of its layers were reported."""
        self.runs.append(self._now)
        self._now = {}


def make_profiler(trt: Any, recorder: LayerRecorder) -> Any:
    """Make an `IProfiler` of TensorRT that reports to a recorder.

    Args:
        trt: the TensorRT module.
        recorder: is told of each layer of each run.
    """

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            recorder.report(layer_name, ms)

    return Profiler()


def profile_tensorrt(
    plain: Engine,
    profiled: Engine,
    feed: Mapping[str, NDArray[Any]],
    device: DeviceProfile,
    *,
    runs: int,
    warm_up: int,
) -> LayerProfile:
    """Time each layer of an engine; the sum leaves out what is copied to the GPU and back.

    Args:
        plain: a `TensorRtEngine`.
        profiled: a second one of the same graph, which is slower from now on.
        feed: inputs by name.
        device: what they were opened for.
        runs: that are counted, at least 1.
        warm_up: runs before them.

    Raises:
        EngineError: another kind of engine, or one that fails or reports nothing.
        InputError: `runs` is below 1 or `warm_up` below 0.
    """
    if not isinstance(profiled, TensorRtEngine):
        raise EngineError(
            f"{profiled.name} tells no times of layers: use one of TensorRT's engines"
        )
    library = open_library(device)
    recorder = LayerRecorder()
    context = profiled.context  # the one that runs: another would need buffers of its own
    profiler = make_profiler(library.module, recorder)  # kept alive here until all is done
    context.profiler = profiler
    context.enqueue_emits_profile = False
    times = run_alternately(
        partial(plain.run, feed),
        partial(_run_once, profiled, context, recorder, feed),
        runs=runs,
        warm_up=warm_up,
    )
    counted = recorder.runs[warm_up:]
    names = list(dict.fromkeys(name for run in counted for name in run))
    if not names:
        raise EngineError(f"{library.title} reported no layers: build the engine again")
    known = read_layers(_inspect(library.module, context), library.title)
    layers = {name: known.get(name, _unknown(name, library.title)) for name in names}
    return summarize_layers(f"{library.title} IProfiler", layers, counted, times)


def read_layers(report: str, provider: str) -> dict[str, Layer]:
    """Read layers by name from the JSON of an engine inspector (or `trtexec --exportLayerInfo`).

    An engine that was built without `ProfilingVerbosity.DETAILED` has names alone.

    Args:
        report: `{"Layers": [...]}`.
        provider: see `LayerTime`.

    Raises:
        EngineError: it is something else.
    """
    try:
        listed = json.loads(report)["Layers"]
        layers = [
            _unknown(item, provider) if isinstance(item, str) else _layer(item, provider)
            for item in listed
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"TensorRT's engine inspector gave no list of layers ({error!r}): build the engine "
            "again with this version"
        ) from error
    return {layer.name: layer for layer in layers}


def _run_once(
    engine: TensorRtEngine, context: Any, recorder: LayerRecorder, feed: Mapping[str, NDArray[Any]]
) -> None:
    engine.run(feed)  # returns when the stream is done
    if not context.report_to_profiler():
        raise EngineError(f"{engine.name} does not tell the times of its layers: update TensorRT")
    recorder.end_run()


def _inspect(trt: Any, context: Any) -> str:
    inspector = context.engine.create_engine_inspector()
    inspector.execution_context = context  # then it tells the shapes of the last run
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _unknown(name: str, provider: str) -> Layer:
    return Layer(name=name, op="unknown", provider=provider, flops=None, bytes=None)


def _layer(item: dict[str, Any], provider: str) -> Layer:
    op = str(item.get("ParameterType") or item.get("LayerType") or "unknown")
    inputs, outputs = (_tensors(item.get(key) or []) for key in ("Inputs", "Outputs"))
    weights = [_constant(item[key]) for key in ("Weights", "Bias") if item.get(key)]
    known = inputs is not None and outputs is not None and None not in weights
    size = None
    if known and op.lower() not in _OPAQUE:
        every = [*(inputs or ()), *(outputs or ()), *(each for each in weights if each)]
        size = node_bytes("Concat", every, ())  # all of them, read or written
    flops = _flops(item, op.lower(), inputs or [], outputs or []) if known else None
    return Layer(name=str(item["Name"]), op=op, provider=provider, flops=flops, bytes=size)


def _flops(
    item: dict[str, Any], op: str, inputs: list[TensorType], outputs: list[TensorType]
) -> float | None:
    """Count operations of convolutions, matrix products and data moves; None for other layers."""
    if op in ("reformat", "noop", "shuffle", "constant"):
        return 0.0
    made = outputs[0][1] if outputs else ()
    if op == "convolution" and item.get("OutMaps") and item.get("Weights"):
        return 2.0 * math.prod(made) * float(item["Weights"]["Count"]) / float(item["OutMaps"])
    if op not in _PRODUCTS or len(made) < 2:
        return None
    rows, columns = made[-2:]
    ends = [shape[-2:] for _, shape in inputs if len(shape) >= 2]
    inner = {right[0] for left in ends for right in ends if left == (rows, right[0])}
    inner = {size for size in inner if (size, columns) in ends or (columns, size) in ends}
    return 2.0 * math.prod(made) * inner.pop() if len(inner) == 1 else None


def _tensors(listed: list[dict[str, Any]]) -> list[TensorType] | None:
    """Read types and shapes; None where a type or a size is unknown.

    TensorRT 11 has a type by itself, 10 has it within the format (NVIDIA, "Migrating
    IEngineInspector Usage from TensorRT 10.x to 11.x").
    """
    found = []
    for item in listed:
        kind = _type_of(str(item.get("DataType") or item.get("Format/Datatype") or ""))
        shape = tuple(item.get("Dimensions") or ())
        if kind is None or any(size < 0 for size in shape):
            return None
        found.append((kind, shape))
    return found


def _constant(item: dict[str, Any]) -> TensorType | None:
    kind = _type_of(str(item.get("Type", "")))
    return None if kind is None else (kind, (int(item["Count"]),))


def _type_of(words: str) -> str | None:
    found = (_TYPES[word] for word in re.findall(r"\w+", words.lower()) if word in _TYPES)
    return next(found, None)
