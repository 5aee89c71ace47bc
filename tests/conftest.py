"""Settings for the whole suite, and a tiny but real bundle for whoever needs one.

Its image tower looks at the mean colour, its text tower at the words red, green and blue,
and both give embeddings in one space: a red picture is nearest to "a red apple".
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from PIL import Image

from edgeclip.profiles.workload import Workload
from edgeclip.runtime.bundle.bundle import Expected, Golden
from edgeclip.runtime.bundle.files import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    labels_path,
    sha256_file,
    tower_path,
)
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.bundle.manifest import (
    SCHEMA_VERSION,
    FileRecord,
    GateRecord,
    Manifest,
    Provenance,
    TowerFile,
    TowerManifest,
)
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.onnxruntime_engine import OrtEngine
from edgeclip.runtime.inputs.preprocess import crop_batch
from edgeclip.runtime.inputs.tokenizer import TextTokenizer
from edgeclip.runtime.spec import EncoderSpec, ImageSpec, PixelForm, Precision, TextSpec, Tower
from edgeclip.runtime.towers.tower_runner import tower_feed

# Several tests run at a time: more threads than cores would wait for each other. Read at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Whoever starts the suite in the background makes it deaf to Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run, and no deadline: a busy machine must not fail a test that only
# asks for a right answer. `make fuzz` searches at random with the other profile, and keeps what
# failed in .hypothesis until it passes.
settings.register_profile("edgeclip", deadline=None, derandomize=True, database=None)
settings.register_profile("fuzz", deadline=None, derandomize=False, print_blob=True)
settings.load_profile("edgeclip")

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
DIM = 8
SIZE = 8
SPACE = "5" * 64
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
PIXELS: dict[Precision, PixelForm] = {"fp32": "float32-nchw", "int8": "uint8-nhwc"}
CHOSEN: dict[Tower, Precision] = {"image": "int8", "text": "fp32"}
SPECIALS = ["<pad>", "<start>", "<end>"]
SENTENCES = ["a photo of a red apple", "a green tree", "the blue sea", "a red car on a green hill"]
QUICK = Workload(
    name="test",
    description="as little as possible",
    batch_sizes=(1,),
    min_warmup_runs=2,
    max_warmup_seconds=0.01,
    repeats=12,
    seconds_per_batch=0.001,
    cold_starts=0,
)
GATE = GateRecord(
    name="mean cosine",
    value=0.999,
    low=0.998,
    high=1.0,
    bound=0.99,
    direction=">=",
    unit="cosine",
    outcome="passed",
)

LONGEST = (
    "test_documents.py",
    "test_golden.py",
    "test_no_connections.py",
    "test_profile.py",
    "test_tensorrt_rtx_graphs.py",
    "test_teacher_roads.py",
    "test_teachers_as_they_are.py",
    "test_families_to_onnx.py",
    "test_to_onnx.py",
    "test_build_bundle.py",
    "test_gpu_latency.py",
    "test_road.py",
    "test_quantize.py",
    "test_wheel.py",
    "test_write_probes.py",
)

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session", autouse=True)
def _state_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests remember of each other is not the user's, and ends with the run."""
    os.environ["EDGECLIP_STATE"] = str(tmp_path_factory.mktemp("state"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that no process is left alone with one of them at the end.
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        if "openvino" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.openvino)
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    # Processes of pytest-xdist cannot send what is no Unicode, such as names of broken files.
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with both towers in fp32 and int8; read it, do not alter it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may alter."""
    return shutil.copytree(tiny_bundle, tmp_path / "own_bundle")


@pytest.fixture(scope="session")
def image_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle without its text tower, with the label set "colours"; do not alter it."""
    root = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("image_only") / "bundle")
    manifest = Manifest.from_json((root / MANIFEST_NAME).read_text(encoding="utf-8"))
    golden = Golden.load(root / GOLDEN_NAME, manifest)
    colours = LabelSet(
        names=tuple(COLOURS),
        embeddings=next(
            item.embeddings
            for item in golden.expected
            if (item.tower, item.precision) == ("image", "fp32")
        ),
        space=SPACE,
        templates=("a photo of a {}",),
    )
    colours.save(root / labels_path("colours"))
    images = tuple(item for item in golden.expected if item.tower == "image")
    replace(golden, texts=(), input_ids=golden.input_ids[:0], expected=images).save(
        root / GOLDEN_NAME
    )
    for path in (root / TOKENIZER_NAME, root / "tokenizer_config.json", *root.glob("onnx/text*")):
        path.unlink()
    (root / MANIFEST_NAME).unlink()
    alone = replace(manifest, towers=(manifest.tower("image"),), files=_file_records(root))
    (root / MANIFEST_NAME).write_text(alone.to_json(), encoding="utf-8")
    return root


@pytest.fixture
def edit_manifest() -> Callable[[Path, Edit], None]:
    """A function that changes the JSON of a bundle's manifest in place."""

    def edit(bundle: Path, change: Edit) -> None:
        path = bundle / MANIFEST_NAME
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return edit


@pytest.fixture
def reseal(edit_manifest: Callable[[Path, Edit], None]) -> Callable[[Path], None]:
    """A function that writes the sizes and hashes of a bundle's files anew."""

    def seal(bundle: Path) -> None:
        def change(data: dict[str, Any]) -> None:
            for entry in data["files"]:
                entry["bytes"] = (bundle / entry["path"]).stat().st_size
                entry["sha256"] = sha256_file(bundle / entry["path"])

        edit_manifest(bundle, change)

    return seal


@pytest.fixture(scope="session")
def cpu_device() -> DeviceProfile:
    """A CPU with one thread on which every precision may run."""
    return DeviceProfile(
        name="test-cpu",
        description="one thread",
        engine="onnxruntime-cpu",
        precisions=("fp32", "fp16", "int8"),
        threads=1,
        memory_mb=1000,
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with red.png, green.png and blue.png, and captions.csv."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["file,caption"]
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 12), colour).save(folder / f"{name}.png")
        rows.append(f'{name}.png,"a photo, {name}"')
    (folder / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_tiny_bundle(root: Path) -> Path:
    """Write the tiny bundle into `root`, with real graphs, tokenizer, hashes and golden file."""
    (root / "onnx").mkdir(parents=True)
    vocabulary = _write_tokenizer(root / TOKENIZER_NAME)
    spec = EncoderSpec(
        dim=DIM,
        image=ImageSpec(size=SIZE, resize=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        text=TextSpec(context_length=16, vocab_size=len(vocabulary), pad_id=0, bos_id=1, eos_id=2),
        logit_scale=10.0,
    )
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (root / name).write_text("{}\n", encoding="utf-8")
    for precision in PRECISIONS:
        path = root / tower_path("image", precision, PIXELS[precision])
        _write_image_tower(path, precision, spec.image)
        _write_text_tower(root / tower_path("text", precision), precision, vocabulary)
    _golden(root, spec).save(root / GOLDEN_NAME)
    manifest = _manifest(root, spec)
    (root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return root


def _write_tokenizer(path: Path) -> dict[str, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, *COLOURS] * 2, trainer)
    tokenizer.save(str(path))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _write_image_tower(path: Path, precision: Precision, spec: ImageSpec) -> None:
    """Mean colour [N, 3] -> Gemm -> L2; in int8 the graph itself normalises uint8 pixels."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(0, 0.02, (3, DIM)).astype(np.float32)
    weights[:3, :3] += np.eye(3, dtype=np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixel_values"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["mean_colour"]),
        helper.make_node("Gemm", ["mean_colour", "weights"], ["projected"]),
    ]
    if PIXELS[precision] == "float32-nchw":
        given: tuple[str, list[int | None]] = ("pixel_values", [None, 3, SIZE, SIZE])
        _write_graph(path, nodes, given, weights, precision)
        return
    mean, std = (np.array(item, np.float32).reshape(3, 1, 1) for item in (spec.mean, spec.std))
    before = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["channels_first"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["channels_first", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["pixel_values"]),
    ]
    more = [numpy_helper.from_array(255 * mean, "mean"), numpy_helper.from_array(255 * std, "std")]
    given = ("pixels", [None, SIZE, SIZE, 3])
    _write_graph(path, [*before, *nodes], given, weights, precision, more)


def _write_text_tower(path: Path, precision: Precision, vocabulary: dict[str, int]) -> None:
    """Token vectors -> sum (padding is zero) -> MatMul -> L2."""
    from onnx import helper, numpy_helper

    table = np.random.default_rng(1).normal(0, 0.02, (len(vocabulary), DIM)).astype(np.float32)
    table[0] = 0
    for axis, colour in enumerate(COLOURS):
        table[vocabulary[f"Ġ{colour}"], :3] = -1
        table[vocabulary[f"Ġ{colour}"], axis] = 1
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "length_axis"], ["summed"], keepdims=0),
        helper.make_node("MatMul", ["summed", "weights"], ["projected"]),
    ]
    more = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([1]), "length_axis"),
    ]
    weights = np.eye(DIM, dtype=np.float32)
    _write_graph(path, nodes, ("input_ids", [None, None]), weights, precision, more)


def _write_graph(
    path: Path,
    nodes: list[Any],
    given: tuple[str, list[int | None]],
    weights: NDArray[np.float32],
    precision: Precision,
    more: list[Any] | None = None,
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(weights, "weights"), *(more or [])]
    if precision == "int8":
        scale = np.float32(np.abs(weights).max() / 127)
        quantized = np.round(weights / scale).astype(np.int8)
        constants[0] = numpy_helper.from_array(quantized, "quantized")
        constants.append(numpy_helper.from_array(np.array(scale), "scale"))
        nodes = [helper.make_node("DequantizeLinear", ["quantized", "scale"], ["weights"]), *nodes]
    kinds = {
        "pixel_values": TensorProto.FLOAT,
        "pixels": TensorProto.UINT8,
        "input_ids": TensorProto.INT64,
    }
    output = "text_embeds" if given[0] == "input_ids" else "image_embeds"
    constants.append(numpy_helper.from_array(np.array([1]), "last_axis"))
    nodes += [
        helper.make_node("ReduceL2", ["projected", "last_axis"], ["norm"], keepdims=1),
        helper.make_node("Div", ["projected", "norm"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(given[0], kinds[given[0]], given[1])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, DIM])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _golden(root: Path, spec: EncoderSpec) -> Golden:
    images = [Image.new("RGB", (10, 10), colour) for colour in COLOURS.values()]
    pixels = crop_batch(images, spec.image)
    input_ids = TextTokenizer.from_file(root / TOKENIZER_NAME, spec.text).encode(SENTENCES)
    inputs: dict[Tower, NDArray[Any]] = {"image": pixels, "text": input_ids}
    expected = []
    for precision in PRECISIONS:
        for tower, values in inputs.items():
            path = root / tower_path(tower, precision, PIXELS[precision])
            given = tower_feed(values, tower, PIXELS[precision], spec.image)
            engine = OrtEngine(path, providers=("CPUExecutionProvider",), threads=1)
            (embeddings,) = engine.run(given).values()
            expected.append(Expected(tower, precision, embeddings))
    return Golden(
        pixels=pixels,
        texts=tuple(SENTENCES),
        input_ids=input_ids,
        expected=tuple(expected),
    )


def _manifest(root: Path, spec: EncoderSpec) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        space=SPACE,
        spec=spec,
        towers=(_tower("image"), _tower("text")),
        gates=(),
        measured_on="nothing",
        provenance=Provenance(
            teacher="none",
            student="mean colour",
            data="none",
            command="pytest",
            created="2026-01-01T00:00:00Z",
            versions=(("numpy", np.__version__),),
        ),
        licence="Apache-2.0",
        files=_file_records(root),
    )


def _file_records(root: Path) -> tuple[FileRecord, ...]:
    return tuple(
        FileRecord(path.relative_to(root).as_posix(), path.stat().st_size, sha256_file(path))
        for path in sorted(path for path in root.rglob("*") if path.is_file())
    )


def _tower(tower: Tower) -> TowerManifest:
    files = tuple(
        TowerFile(
            path=tower_path(tower, precision, PIXELS[precision]),
            pixels=PIXELS[precision] if tower == "image" else None,
            precision=precision,
            gates=(GATE,),
            latency_ms=None,
            golden_tolerance=1e-4,
        )
        for precision in PRECISIONS
    )
    return TowerManifest(tower, CHOSEN[tower], files)
