"""What others' quantizers and engines do, each in a process of its own.

    python _quantizer_process.py make RECIPE SOURCE TARGET ROWS
    python _quantizer_process.py serve ENGINE THREADS MODEL ROWS

`make` quantizes a tower as the documentation of its maker shows it, with ROWS to calibrate on.
`serve` answers lines: `warm S` runs the first of ROWS for S seconds, `run` once, giving its
seconds, and `embed FILE.npy` writes the embeddings of all, run one by one. ROWS is an .npz file
of inputs of batch 1, in order. Nothing of EdgeCLIP is imported.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Run = Callable[[Array], Array]
EMBEDDINGS = ("image_embeds", "text_embeds")
LEAST_RUNS = 10
os.environ.setdefault("CI", "true")  # where nncf and openvino report no use of them


def rows(path: str) -> Iterator[Array]:
    with np.load(path) as file:
        for name in file.files:
            yield file[name]


def input_name(source: str) -> str:
    """Name of the only input of an ONNX file."""
    import onnx

    return str(onnx.load(source, load_external_data=False).graph.input[0].name)


def feeds(source: str, path: str) -> Iterator[dict[str, Array]]:
    name = input_name(source)
    return ({name: row} for row in rows(path))


def ort_static(source: str, target: str, path: str) -> None:
    """`quantize_static` with its defaults, after the preparation that it asks for.

    Symbolic shape inference, the first step of that, fails on graphs of torch's exporter; its
    documentation says to leave it out then.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime is untyped
        left = feeds(source, path)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    prepared = f"{target}.prepared.onnx"
    try:
        quant_pre_process(source, prepared)
    except Exception:  # whatever sympy or a failed assumption raises
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, target, Reader())


def ort_dynamic(source: str, target: str, path: str) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, target)


def optimum(source: str, target: str, path: str, *, static: bool) -> None:
    """optimum-onnx's configuration for CPUs with AVX512-VNNI."""
    from onnxruntime.quantization import CalibrationMethod
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer
    from optimum.onnxruntime.configuration import CalibrationConfig
    from transformers import PretrainedConfig

    quantizer = ORTQuantizer(Path(source), config=PretrainedConfig())
    config = AutoQuantizationConfig.avx512_vnni(is_static=static)
    ranges = None
    if static:
        data = [{name: row[0] for name, row in feed.items()} for feed in feeds(source, path)]
        calibration = CalibrationConfig(
            dataset_name="rows",
            dataset_config_name="",
            dataset_split="calibration",
            dataset_num_samples=len(data),
            method=CalibrationMethod.MinMax,
        )
        augmented, operators = f"{target}.augmented.onnx", config.operators_to_quantize
        ranges = quantizer.fit(data, calibration, augmented, operators)
    folder = Path(target).with_suffix("")
    quantizer.quantize(config, folder, calibration_tensors_range=ranges)
    (made,) = folder.glob("*.onnx")
    made.replace(target)


def nncf_openvino(source: str, target: str, path: str) -> None:
    """NNCF on OpenVINO's own form of the tower."""
    import nncf
    import openvino

    data, model = nncf.Dataset(list(rows(path))), openvino.Core().read_model(source)
    model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, target)


def nncf_onnx(source: str, target: str, path: str) -> None:
    import nncf
    import onnx

    data = nncf.Dataset(list(feeds(source, path)))
    model = nncf.quantize(onnx.load(source), data, model_type=nncf.ModelType.TRANSFORMER)
    onnx.save(model, target)


def autocast(source: str, target: str, path: str) -> None:
    """Model-Optimizer's AutoCast with its defaults; inputs and outputs keep their types."""
    import onnx
    from modelopt.onnx.autocast import (  # type: ignore[import-not-found]
        convert_to_mixed_precision,
    )

    seen = f"{target}.seen.npz"
    values: Any = np.concatenate(list(rows(path)))
    np.savez(seen, **{input_name(source): values})
    model = convert_to_mixed_precision(
        source, low_precision_type="fp16", keep_io_types=True, calibration_data=seen
    )
    onnx.save(model, target)


RECIPES: dict[str, Callable[[str, str, str], None]] = {
    "ort-static": ort_static,
    "ort-dynamic": ort_dynamic,
    "optimum-static": lambda *paths: optimum(*paths, static=True),
    "optimum-dynamic": lambda *paths: optimum(*paths, static=False),
    "nncf-openvino": nncf_openvino,
    "nncf-onnx": nncf_onnx,
    "autocast": autocast,
}


def open_onnxruntime(model: str, threads: int, example: Array) -> Run:
    """A session as EdgeCLIP's runtime opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    wanted = [item.name for item in session.get_outputs() if item.name in EMBEDDINGS]
    return lambda values: np.asarray(session.run(wanted, {name: values})[0])


def open_openvino(model: str, threads: int, example: Array) -> Run:
    """Compiled for latency, and where all inputs are alike, for their shape."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    if example.ndim == 4:
        graph.reshape(list(example.shape))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    compiled = core.compile_model(graph, "CPU", settings)
    return lambda values: np.asarray(compiled([values])[0])


def serve(engine: str, threads: int, model: str, path: str) -> None:
    first = next(rows(path))
    opened = open_openvino if engine == "openvino" else open_onnxruntime
    run = opened(model, threads, first)
    answer(run(first).shape[1])
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        start = time.perf_counter()
        if word == "run":
            run(first)
            answer(time.perf_counter() - start)
        elif word == "warm":
            done = 0
            while done < LEAST_RUNS or time.perf_counter() < start + float(rest):
                run(first)
                done += 1
            answer(done)
        elif word == "embed":
            np.save(rest, np.concatenate([run(row) for row in rows(path)]))
            answer(0)


def answer(value: float) -> None:
    """One line, on the stdout that the process began with."""
    os.write(_ANSWERS, f"{value!r}\n".encode())


_ANSWERS = os.dup(1)  # what libraries print must not get among the answers


if __name__ == "__main__":
    what, how, *rest = sys.argv[1:]
    with redirect_stdout(sys.stderr):
        if what == "make":
            RECIPES[how](*rest)
        else:
            serve(how, int(rest[0]), *rest[1:])
