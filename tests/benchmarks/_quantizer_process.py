"""What others' quantizers and engines do, each in a process of its own.

    python _quantizer_process.py make RECIPE SOURCE TARGET ROWS
    python _quantizer_process.py serve ENGINE THREADS MODEL ROWS

`make` quantizes a tower as the documentation of its maker shows it, with ROWS to calibrate on.
`serve` answers lines: `warm S` runs the first of ROWS for S seconds, `run` once, giving its
seconds, and `embed FILE.npy` writes the embeddings of all, run one by one. ROWS is an .npy
file, or an .npz file with `values` and the `lengths` that count of them. This runs in
environments without EdgeCLIP and imports nothing of it.
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


class Rows:
    """Inputs of batch 1, read when they are needed; of token ids only those of the text."""

    def __init__(self, path: str) -> None:
        self.lengths = None
        if path.endswith(".npy"):
            self.values = np.load(path, mmap_mode="r")
        else:
            with np.load(path) as file:
                self.values, self.lengths = file["values"], file["lengths"]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Array]:
        for at in range(len(self)):
            row = np.array(self.values[at : at + 1])
            yield row if self.lengths is None else row[:, : self.lengths[at]]


def input_name(source: str) -> str:
    """Name of the only input of an ONNX file."""
    import onnx

    return str(onnx.load(source, load_external_data=False).graph.input[0].name)


def feeds(source: str, path: str) -> Iterator[dict[str, Array]]:
    """What a tower is calibrated with."""
    name = input_name(source)
    for row in Rows(path):
        yield {name: row}


def reader(source: str, path: str) -> Any:
    """As ONNX Runtime's quantizer wants it."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime is untyped
        def __init__(self) -> None:
            self.left = feeds(source, path)

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    return Reader()


def ort_static(source: str, target: str, path: str) -> None:
    """`quantize_static` with its defaults, after the preparation that it asks for.

    Symbolic shape inference, the first step of that, fails on graphs of torch's exporter; its
    documentation says to leave it out then.
    """
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = f"{target}.prepared.onnx"
    try:
        quant_pre_process(source, prepared)
    except Exception:  # whatever sympy or a failed assumption raises
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, target, reader(prepared, path))


def ort_dynamic(source: str, target: str, path: str) -> None:
    """`quantize_dynamic` with its defaults."""
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
        name = input_name(source)
        data = [{name: row[0]} for row in Rows(path)]
        calibration = CalibrationConfig(
            dataset_name="rows",
            dataset_config_name="",
            dataset_split="calibration",
            dataset_num_samples=len(data),
            method=CalibrationMethod.MinMax,
        )
        augmented = f"{target}.augmented.onnx"
        operators = config.operators_to_quantize
        ranges = quantizer.fit(data, calibration, augmented, operators)
    folder = Path(target).with_suffix("")
    quantizer.quantize(config, folder, calibration_tensors_range=ranges)
    (made,) = folder.glob("*.onnx")
    made.replace(target)


def nncf_openvino(source: str, target: str, path: str) -> None:
    """NNCF on OpenVINO's own form of the tower."""
    import nncf
    import openvino

    data = nncf.Dataset(list(Rows(path)))
    model = openvino.Core().read_model(source)
    model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, target)


def nncf_onnx(source: str, target: str, path: str) -> None:
    """NNCF on the ONNX file, for ONNX Runtime."""
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
    values: Any = np.array(Rows(path).values)
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
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
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


ENGINES: dict[str, Callable[[str, int, Array], Run]] = {
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}


def serve(engine: str, threads: int, model: str, path: str) -> None:
    """Answer until there are no more lines."""
    inputs = Rows(path)
    first = next(iter(inputs))
    run = ENGINES[engine](model, threads, first)
    answer(run(first).shape[1])
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "run":
            answer(timed(run, first))
        elif word == "warm":
            end = time.perf_counter() + float(rest)
            done = 0
            while done < LEAST_RUNS or time.perf_counter() < end:
                run(first)
                done += 1
            answer(done)
        elif word == "embed":
            np.save(rest, np.concatenate([run(row) for row in inputs]))
            answer(len(inputs))


def timed(run: Run, values: Array) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run(values)
    return time.perf_counter() - start


def answer(value: float) -> None:
    """One line, on the stdout that the process began with."""
    os.write(_ANSWERS, f"{value!r}\n".encode())


_ANSWERS = os.dup(1)  # what libraries print must not get among the answers


def main() -> None:
    """Do what the arguments say."""
    what, *rest = sys.argv[1:]
    with redirect_stdout(sys.stderr):
        if what == "make":
            recipe, source, target, path = rest
            RECIPES[recipe](source, target, path)
        else:
            engine, threads, model, path = rest
            serve(engine, int(threads), model, path)


if __name__ == "__main__":
    main()
