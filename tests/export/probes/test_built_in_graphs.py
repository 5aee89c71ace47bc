from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgeclip.export.probes.built_in_graphs import (
    main,
    product_graph,
    reading_graph,
    write_probe_graphs,
)
from edgeclip.profiles.layers.roofline import (
    GRAPHS,
    INPUT,
    PRODUCT_SIZES,
    PRODUCTS,
    Form,
    product_path,
    reading_path,
)
from edgeclip.profiles.measure.benchmark_worker import YARDSTICK_GRAPH
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine

FORMS: tuple[Form, ...] = ("fp32", "fp16", "int8", "symmetric_int8")


def test_the_graphs_that_are_kept_are_those_that_are_written(tmp_path: Path) -> None:
    for path in write_probe_graphs(tmp_path):
        assert path.read_bytes() == (GRAPHS / path.name).read_bytes(), path.name
    kept = {path.name for pattern in ("product_*", "reading_*") for path in GRAPHS.glob(pattern)}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_the_command_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 0
    count = sum(map(len, PRODUCT_SIZES.values())) + 2
    assert capsys.readouterr().out == f"{count} graphs written to {tmp_path}\n"
    written = tmp_path / YARDSTICK_GRAPH.name
    assert onnx.load(written) == onnx.load(YARDSTICK_GRAPH)
    assert written.stat().st_size < 10_000


@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("form", FORMS)
def test_an_even_number_of_products_gives_back_what_went_in(
    form: Form, size: int, cpu_device: DeviceProfile
) -> None:
    content = product_graph(form, size).SerializeToString()
    engine = open_engine(Path(f"product_{form}.onnx"), device=cpu_device, content=content)
    middle = np.arange(size) + 0.5
    values = np.cos(np.outer(middle, middle) * np.float32(1.2345678)) * np.sqrt(2 / size)
    step = 4 / np.sqrt(size) / 127  # of int8
    bound = {"fp32": 1e-4, "fp16": 5e-3}.get(form, 8 * step)
    for factor in (1.0, -0.5):
        (found,) = engine.run({INPUT: np.array([factor], np.float32)}).values()
        assert found.shape == ()
        assert float(found) == pytest.approx((factor * values).max(), abs=bound)


@pytest.mark.parametrize(
    ("form", "product"), [("fp32", "MatMul"), ("int8", "QLinearMatMul"), ("fp16", "MatMul")]
)
def test_nothing_but_products_is_left_when_it_runs(
    form: Form, product: str, tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    path = product_path(form, 256)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    operators = [node.op_type for node in nodes if node.op_type != "Cast"]
    assert operators.count(product) == PRODUCTS
    assert set(operators) <= {"Mul", product, "QuantizeLinear", "DequantizeLinear", "ReduceMax"}


def test_reading_keeps_the_value(cpu_device: DeviceProfile) -> None:
    content = reading_graph(256).SerializeToString()
    engine = open_engine(Path("reading_fp32.onnx"), device=cpu_device, content=content)
    (found,) = engine.run({INPUT: np.array([3.0], np.float32)}).values()
    assert float(found) == pytest.approx(3.0, rel=1e-5)


def test_files_are_small() -> None:
    paths = [reading_path()]
    paths += [product_path(form, size) for form, sizes in PRODUCT_SIZES.items() for size in sizes]
    assert all(path.stat().st_size < 4000 for path in paths)
