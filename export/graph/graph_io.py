"""Load, clean, check and save ONNX graphs.

A protobuf file holds at most 2 GiB. The weights of a larger graph go to one file beside
it, `NAME.onnx_data` for `NAME.onnx`, which is where transformers.js looks for them.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper, numpy_helper

from edgeclip.export.errors import ExportError
from edgeclip.export.graph.export_modules import MASKED
from edgeclip.runtime.bundle.engine_records import graph_sha256
from edgeclip.runtime.bundle.files import sha256_file
from edgeclip.runtime.errors import first_line

# The largest graph, in bytes of its tensors, that is written as one file: 2 GiB less what
# nodes and names can take.
ONE_FILE_LIMIT = 2**31 - 2**26

PRODUCTS = ("MatMul", "Gemm", "Conv")  # operators that are quantized

_LOWEST_FP16 = float(np.finfo(np.float16).min)
_SMALL_TENSOR = 1024  # bytes; smaller ones stay in the graph, where shape inference reads them
_PAGE = 4096  # large tensors begin at one, so that they can be mapped into memory


def data_path(path: Path) -> Path:
    """Return the file that holds the weights of a graph too large for one file."""
    return path.with_name(f"{path.name}_data")


def graph_files(path: Path) -> list[Path]:
    """Return the files of a graph: its own, and that of its weights if there is one."""
    data = data_path(path)
    return [path, data] if data.is_file() else [path]


def sha256_graph(path: Path) -> str:
    """Return the sha256 of a graph with all its weights, as keys of engines have it."""
    return graph_sha256(*map(sha256_file, graph_files(path)))


def load_graph(path: Path) -> onnx.ModelProto:
    """Read a graph and its weights; a data file must lie in the graph's own folder.

    Raises:
        ExportError: not there, not ONNX, or with weights elsewhere or cut short.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"cannot read {path} as ONNX: {first_line(error)}") from error
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        name = external_data_helper.ExternalDataInfo(tensor).location
        if PurePosixPath(name).name != name or "\\" in name:
            raise ExportError(
                f"{path.name} keeps weights in {name!r}: they must be in a file beside it"
            )
        try:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ExportError(
                f"cannot read the weights of {path.name} from {name}, export it again: "
                f"{first_line(error)}"
            ) from error
        tensor.ClearField("data_location")  # or the same graph would have other bytes
    return model


def save_graph(model: onnx.ModelProto, path: Path, *, limit: int = ONE_FILE_LIMIT) -> None:
    """Clean, check and write a graph; the same graph always gives the same bytes.

    Args:
        model: what to write. Afterwards the tensors of a graph with a data file only say
            where their values are in it: to go on with them, `load_graph` again.
        path: the file. Its data file is written, or one from before is removed.
        limit: bytes of tensors beyond which there is a data file.

    Raises:
        ExportError: not valid ONNX; what was there before stays.
    """
    clean_graph(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".edgeclip-tmp-") as folder:
        written = Path(folder) / path.name
        write_unchecked(model, written, limit=limit)
        try:
            onnx.checker.check_model(str(written), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"{path.name} is not a valid ONNX graph: {error}") from error
        if data_path(written).exists():
            data_path(written).replace(data_path(path))
            written.replace(path)
        else:
            written.replace(path)
            data_path(path).unlink(missing_ok=True)


def write_unchecked(model: onnx.ModelProto, path: Path, *, limit: int = ONE_FILE_LIMIT) -> None:
    """Write a graph as it is, with a data file if its tensors take more than `limit` bytes."""
    if sum(_size(tensor) for tensor in _tensors(model.graph)) > limit:
        _move_weights(model, data_path(path))
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_typed(source: Path, target: Path) -> Path:
    """Write a copy of an fp32 graph with what `note_types` notes.

    ONNX Runtime's quantizer leaves nodes that read values without a type in float, or fails.

    Returns:
        `target`, or `source` if it has no such operators.
    """
    model = load_graph(source)
    if not note_types(model):
        return source
    write_unchecked(model, target)
    return target


def note_types(model: onnx.ModelProto) -> bool:
    """Annotate the outputs of ONNX Runtime's own operators in an fp32 graph with their type.

    ONNX cannot infer these types, nor those of what is computed from them.

    Returns:
        Whether there are such operators.
    """
    foreign = [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    for name in (name for node in foreign for name in node.output if name):
        note = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        model.graph.value_info.append(note)
    return bool(foreign)


def clean_graph(model: onnx.ModelProto) -> None:
    """Drop the exporter's annotations, in place; results stay the same.

    Shapes that the exporter noted (`value_info`) are wrong after its own optimisation and stop ONNX
    Runtime's quantizer; source paths and module names are private.
    """
    del model.graph.value_info[:]
    del model.metadata_props[:]
    model.doc_string = ""
    for item in (
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        item.doc_string = ""
        del item.metadata_props[:]


def limit_masks(model: onnx.ModelProto) -> None:
    """Raise constants below what fp16 holds (masks of -3e38 or -inf) to `MASKED`, in place.

    The weights must be in memory, as `load_graph` gives them.
    """
    for tensor in _tensors(model.graph):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size and values.min() < _LOWEST_FP16:
            limited = np.where(values < _LOWEST_FP16, np.float32(MASKED), values)
            tensor.CopyFrom(numpy_helper.from_array(limited, tensor.name))


def constant_names(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of all constants (weights) of the graph."""
    return frozenset(item.name for item in model.graph.initializer)


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of a graph's ONNX operator set."""
    return int(next(item.version for item in model.opset_import if item.domain == ""))


def with_opset(model: onnx.ModelProto, wanted: int) -> onnx.ModelProto:
    """Convert a graph to operator set `wanted`, unless its own is as high."""
    if opset_of(model) >= wanted:
        return model
    return onnx.version_converter.convert_version(model, wanted)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant: weights and attributes of nodes, also in inner graphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            inner: Iterable[onnx.GraphProto] = attribute.graphs
            if attribute.HasField("g"):
                inner = (*inner, attribute.g)
            for part in inner:
                yield from _tensors(part)


def _size(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor's values in the file."""
    return len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize()


def _move_weights(model: onnx.ModelProto, path: Path) -> None:
    """Write the larger weights to `path`, in the graph's order; say in each where it is."""
    with path.open("wb") as file:
        for tensor in model.graph.initializer:
            if not tensor.HasField("raw_data"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
            if len(tensor.raw_data) < _SMALL_TENSOR:
                continue
            offset = -(-file.tell() // _PAGE) * _PAGE
            file.write(b"\0" * (offset - file.tell()))
            length = file.write(tensor.raw_data)
            external_data_helper.set_external_data(tensor, path.name, offset, length)
            tensor.ClearField("raw_data")
