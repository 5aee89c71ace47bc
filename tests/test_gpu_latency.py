"""The benchmark of GPUs, as far as it goes without one: torch and ONNX Runtime on the CPU."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPModel

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.spec import ImageSpec, Tower
from tests.conftest import QUICK

_BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(_BENCHMARKS))  # scripts import each other by name

from _gpu_candidates import (  # noqa: E402
    REFERENCE,
    Case,
    Resident,
    Variant,
    cases,
    engine_variant,
    torch_variants,
)
from gpu_latency import (  # noqa: E402
    GpuMachine,
    Row,
    append_rows,
    attempt,
    bars,
    measure_case,
    table,
    why_no_gpu,
)

pytestmark = pytest.mark.slow

_SCRIPT = _BENCHMARKS / "gpu_latency.py"
_HOPPER = GpuMachine(
    name="test GPU",
    capability="9.0",
    memory_mb=1000,
    versions={
        "driver": "580.1",
        "CUDA": "13.0",
        "cuDNN": None,
        "TensorRT": None,
        "triton": "3.0",
    },
)
_TOWERS: tuple[Tower, ...] = ("image", "text")
_BATCH = 3
needs_none = pytest.mark.skipif(why_no_gpu() is None, reason="this machine has a GPU")


@pytest.fixture(scope="module")
def tiny() -> DualEncoder:
    """A CLIP of width 32 with random weights, and the built-in teacher's tokenizer."""
    tokenizer = DualEncoder.load(BUILT_IN_TEACHER).tokenizer
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    shape |= {"num_hidden_layers": 2, "projection_dim": 16}
    config = CLIPConfig(
        projection_dim=16,
        vision_config={"image_size": 32, "patch_size": 8, **shape},
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **shape,
        },
    )
    torch.manual_seed(0)
    half = (0.5, 0.5, 0.5)
    spec = ImageSpec(size=32, resize=32, mean=half, std=half)
    return DualEncoder(CLIPModel(config).eval(), spec, tokenizer)


@pytest.fixture(scope="module")
def both(tiny: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> dict[Tower, Case]:
    """A case for each tower, with real graphs."""
    found = {}
    for tower in _TOWERS:
        folder = tmp_path_factory.mktemp(tower)
        (found[tower],) = cases("tiny", tiny, tower, [_BATCH], folder)
    return found


@pytest.fixture
def on_cpu(cpu_device: DeviceProfile, tmp_path: Path) -> list[Variant]:
    """What runs here: torch without GPU features, and ONNX Runtime's CPU provider."""
    torch_ones = [
        item for item in torch_variants("cpu") if item.name.split()[1] in ("eager", "fp32")
    ]
    return [
        *torch_ones,
        engine_variant("ONNX Runtime CPU fp32", lambda batch: cpu_device, "fp32", tmp_path),
        engine_variant("ONNX Runtime CPU fp16", lambda batch: cpu_device, "fp16", tmp_path),
    ]


def by_name(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.candidate: row for row in rows}


@needs_none
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(_SCRIPT), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"gpu_latency was not run: torch {torch.__version__}")
    assert "BAR" not in line
    assert not out.exists()


@pytest.mark.parametrize("tower", _TOWERS)
def test_candidates_are_compared_and_timed(
    both: dict[Tower, Case], on_cpu: list[Variant], tower: Tower, tmp_path: Path
) -> None:
    case = both[tower]
    rows = measure_case(case, on_cpu, QUICK, quick=False)
    assert [row.candidate for row in rows] == [item.name for item in on_cpu]
    assert len(rows) == 5
    for row in rows:
        assert not row.why
        assert row.cosine is not None
        assert row.cosine > 0.999
        assert row.input_shape == case.values.shape
        assert row.host is not None
        assert row.device is not None
        for timing in (row.host, row.device):
            assert (timing.ratio is None) == (row.candidate == REFERENCE)
            assert 0 <= timing.ms.low <= timing.ms.value <= timing.ms.high
    for _ in range(2):
        append_rows(rows, tmp_path / "out" / "gpu.rows.jsonl")
    lines = (tmp_path / "out" / "gpu.rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["candidate"] for line in lines] == 2 * [row.candidate for row in rows]
    judged = {bar.name: bar for bar in bars([replace(row, batch=1) for row in rows])}
    assert judged["wrong_outputs"].passed
    assert judged["engines_timed"].value == 2
    assert f"tiny_{tower}_best_engine_over_torch_eager_fp32" in judged


@needs_none
def test_what_cannot_run_here_is_listed_with_its_reason(
    both: dict[Tower, Case], tmp_path: Path
) -> None:
    variants = [*torch_variants("cuda"), *_HOPPER.variants(tmp_path)]
    rows = measure_case(both["image"], variants, QUICK, quick=True)
    found = by_name(rows)
    assert len(found) == len(variants) == 19
    text = table(rows)
    for name, row in found.items():
        assert row.host is None
        assert row.device is None
        assert row.why
        assert name in text
        assert row.why in text
    assert "left out by --quick" in found["torch.compile max-autotune fp16"].why
    assert "CUDAExecutionProvider" in found["ONNX Runtime CUDA fp16"].why
    assert "not 9.0" in found["TensorRT-RTX fp32"].why
    judged = bars(rows)
    assert [bar.name for bar in judged] == ["wrong_outputs", "engines_timed"]
    assert [bar.passed for bar in judged] == [True, False]


class Skewed:
    """Gives right embeddings, or others."""

    def __init__(self, case: Case, host: NDArray[Any], device: NDArray[Any]) -> None:
        self._host, self._device = host, device

    def host(self, values: NDArray[Any]) -> NDArray[Any]:
        return self._host

    def place(self, values: NDArray[Any]) -> Resident:
        return Resident(lambda: None, lambda: self._device)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda right: -right, "least cosine with torch fp32 -1.0000"),
        (lambda right: right * np.nan, "NaN"),
        (lambda right: right[:-1], "device: wrong"),
    ],
)
def test_wrong_outputs_are_never_timed(both: dict[Tower, Case], change: Any, words: str) -> None:
    case = both["image"]
    right = case.expected[:_BATCH]
    variant = Variant(
        name="skewed", precision="fp16", open=lambda case: Skewed(case, right, change(right))
    )
    tried = attempt(case, variant)
    assert tried.wrong
    assert list(tried.runs) == ["host"]
    assert words in tried.reasons[0]
    (row,) = measure_case(case, [variant], QUICK, quick=False)
    assert row.host is not None
    assert row.device is None
    assert "skewed  not timed: device: wrong" in table([row])
    assert not bars([row])[0].passed


def test_rows_that_changed_places_are_wrong_however_close(both: dict[Tower, Case]) -> None:
    case = both["image"]
    # As random weights may have it: all embeddings almost the same.
    close = case.expected * 1e-2 + np.eye(1, 16, dtype=np.float32)
    alike = replace(case, expected=close / np.linalg.norm(close, axis=1, keepdims=True))
    swapped = alike.expected[[1, 0, 2]]
    assert alike.judge(alike.expected[:_BATCH], "fp16")[1] == ""
    cosine, fault = alike.judge(swapped, "fp16")
    assert cosine is not None
    assert cosine > 0.999
    assert fault.startswith("row 0 is nearest to the embedding of another input")


@pytest.mark.parametrize("tower", _TOWERS)
def test_a_tower_compiles_without_a_break(both: dict[Tower, Case], tower: Tower) -> None:
    case = both[tower]
    variants = {item.name: item for item in torch_variants("cpu")}
    runner: Any = variants[REFERENCE].open(case)
    whole: Any = torch.compile(runner._call, backend="eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        found = whole(torch.from_numpy(case.values)).numpy()
    assert case.judge(found, "fp32")[1] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("tower", _TOWERS)
def test_torch_on_a_gpu(both: dict[Tower, Case], tower: Tower) -> None:
    if why_no_gpu() is not None:
        pytest.skip(why_no_gpu() or "")
    for variant in torch_variants("cuda"):
        tried = attempt(both[tower], variant, quick=True)
        assert variant.slow or list(tried.runs) == ["host", "device"], tried.reasons


def test_the_gpu_is_described() -> None:
    text = str(_HOPPER)
    assert text == (
        "test GPU (compute capability 9.0), driver 580.1, CUDA 13.0, cuDNN unknown, "
        "TensorRT unknown, triton 3.0"
    )
