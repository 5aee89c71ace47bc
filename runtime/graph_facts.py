"""What an execution provider that compiles a graph must know of it beforehand."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip.runtime.errors import EngineError
from edgeclip.runtime.files import cache_root
from edgeclip.runtime.ort_session import data_entries, import_onnxruntime, session_options

if TYPE_CHECKING:
    from edgeclip.profiles.device import DevicePrecision

Inputs = tuple[tuple[str, tuple[int | None, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """Facts of one graph.

    Attributes:
        precision: of the graph's weights.
        inputs: name and shape of each input, None for a dimension that varies. The first of
            those is the batch. Empty where nothing need be known.
        context_length: the longest text, in tokens, where a second dimension varies.
        cache: a folder for what is compiled, of this graph alone; None for none.
    """

    precision: "DevicePrecision"
    inputs: Inputs = ()
    context_length: int | None = None
    cache: Path | None = None


def precision_of(path: Path) -> "DevicePrecision":
    """The precision of a bundle's graph, which its name tells: `text_model_int8.onnx`."""
    named: dict[str, DevicePrecision] = {"fp16": "fp16", "int8": "int8", "fp8": "fp8"}
    return named.get(path.stem.rpartition("_")[2], "fp32")


def read_inputs(path: Path, content: bytes | None, data_folder: Path | None) -> Inputs:
    """Names and shapes of a graph's inputs; none of an EP context, which needs no shapes.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    ort = import_onnxruntime()
    options = session_options(ort, threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    for key, value in data_entries(path, content, data_folder).items():
        options.add_session_config_entry(key, value)
    try:
        graph = str(path) if content is None else content
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception:  # no graph, or not one for the CPU: the provider itself will say
        return ()
    return tuple(
        (item.name, tuple(size if isinstance(size, int) else None for size in item.shape))
        for item in session.get_inputs()
    )


def cache_folder(content: bytes, data_folder: Path | None) -> Path:
    """Make the user's folder for what is compiled of exactly this graph and its data files.

    TensorRT's provider knows a graph by its names and shapes: with other weights in it, it
    would use the engine of the old ones.

    Raises:
        EngineError: the folder cannot be made, or `data_folder` cannot be read.
    """
    digest = hashlib.sha256(hashlib.sha256(content).digest())
    try:
        for file in sorted(data_folder.iterdir()) if data_folder else ():
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
        folder = cache_root() / "onnxruntime" / digest.hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise EngineError(
            f"cannot make a cache folder for compiled graphs: {error}: set EDGECLIP_CACHE to a "
            "folder that can be written"
        ) from error
    return folder
