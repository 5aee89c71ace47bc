"""Bundles, indexes and functions as models, against the encoder and index themselves."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.bundle.index import Index, LabelSet
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import InputError, SpaceMismatchError
from edgeclip.runtime.serving.bundle_models import LabelModel, bundle_models
from edgeclip.runtime.serving.models import FunctionModel, ServingModel, check_inputs
from edgeclip.runtime.serving.search_model import SearchModel
from edgeclip.runtime.wire.messages import WireError
from tests.conftest import COLOURS, DIM, SPACE

NAMES = tuple(COLOURS)


@pytest.fixture
def models(encoder: Encoder) -> dict[str, ServingModel]:
    return {model.name: model for model in bundle_models(encoder, "tiny")}


@pytest.fixture
def files() -> np.ndarray[Any, Any]:
    """A red JPEG, a green PNG and a blue WebP, as BYTES [3]."""
    found = []
    for colour, kind in zip(COLOURS.values(), ("jpeg", "png", "webp"), strict=True):
        file = io.BytesIO()
        Image.new("RGB", (20, 12), colour).save(file, kind)
        found.append(file.getvalue())
    return np.array(found, object)


def run(
    model: ServingModel, parameters: dict[str, Any] | None = None, **inputs: Any
) -> dict[str, Any]:
    """Run a model as the server does, and check what it promises."""
    rows = check_inputs(model, inputs)
    outputs = model.run(inputs, parameters or {})
    for spec in model.outputs:
        spec.check(outputs[spec.name])
        assert len(outputs[spec.name]) == rows
    return outputs


def test_a_bundle_has_its_towers(models: dict[str, ServingModel], encoder: Encoder) -> None:
    assert list(models) == ["tiny-image", "tiny-pixels", "tiny-text"]
    assert {model.space for model in models.values()} == {SPACE}


def test_image_files_are_embedded(
    models: dict[str, ServingModel], encoder: Encoder, files: np.ndarray[Any, Any]
) -> None:
    found = run(models["tiny-image"], images=files)["image_embeds"]
    np.testing.assert_array_equal(found, encoder.encode_image(files.tolist()))
    files[1] = b"no picture"
    with pytest.raises(InputError, match="image 1"):
        run(models["tiny-image"], images=files)


def test_pixels_are_embedded(models: dict[str, ServingModel], encoder: Encoder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    found = run(models["tiny-pixels"], pixels=pixels)["image_embeds"]
    np.testing.assert_array_equal(found, encoder.encode_pixels(pixels))
    with pytest.raises(InputError, match="UINT8"):
        run(models["tiny-pixels"], pixels=pixels[:, :4])


def test_texts_are_embedded(models: dict[str, ServingModel], encoder: Encoder) -> None:
    texts = np.array([b"a red apple", "die blaue See \u00e9".encode()], object)
    found = run(models["tiny-text"], texts=texts)["text_embeds"]
    expected = encoder.encode_text(["a red apple", "die blaue See \u00e9"])
    np.testing.assert_array_equal(found, expected)
    long = np.array([b"red " * 100], object)
    with pytest.raises(InputError, match="tokens"):
        run(models["tiny-text"], texts=long)
    assert run(models["tiny-text"], {"truncate": True}, texts=long)["text_embeds"].shape == (1, DIM)
    with pytest.raises(InputError, match="UTF-8"):
        run(models["tiny-text"], texts=np.array([b"\xff"], object))
    with pytest.raises(WireError, match="true or false"):
        run(models["tiny-text"], {"truncate": 1}, texts=texts)


def test_labels_are_given(encoder: Encoder, files: np.ndarray[Any, Any]) -> None:
    labels = encoder.bake_labels(NAMES)
    model = LabelModel(encoder, "tiny-labels-colours", labels)
    embeddings = encoder.encode_image(files.tolist())
    found = run(model, {"top": 1}, image_embeds=embeddings)
    assert found["label"][:, 0].tolist() == [name.encode() for name in NAMES]
    assert run(model, image_embeds=embeddings)["score"].shape == (3, 3)
    with pytest.raises(InputError, match="L2-normalised"):
        run(model, image_embeds=2 * embeddings)


def test_label_sets_of_a_bundle_are_served(
    own_bundle: Path, edit_manifest: Any, reseal: Any, cpu_device: DeviceProfile
) -> None:
    encoder = Encoder.open(own_bundle, device=cpu_device)
    encoder.bake_labels(NAMES).save(own_bundle / "labels" / "colours.npz")

    def declare(data: dict[str, Any]) -> None:
        data["files"].append({"path": "labels/colours.npz", "bytes": 0, "sha256": "0" * 64})

    edit_manifest(own_bundle, declare)
    reseal(own_bundle)
    found = bundle_models(Encoder.open(own_bundle, device=cpu_device), "b")
    assert "b-labels-colours" in [model.name for model in found]


def index_of(count: int, dim: int = 16) -> Index:
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(count, dim)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Index(tuple(f"key {number}" for number in range(count)), embeddings, SPACE)


def test_an_index_is_searched(tmp_path: Path) -> None:
    index = index_of(50)
    model = SearchModel(index, "index", tmp_path)
    assert model.description == "index: 50 entries, exact search"
    assert model.space == SPACE
    queries = index.embeddings[3:5]
    found = run(model, {"top": 4}, embeddings=queries)
    expected = index.search(queries, 4)
    assert found["key"].tolist() == [[hit.key.encode() for hit in row] for row in expected]
    np.testing.assert_array_equal(
        found["score"], np.array([[hit.score for hit in row] for row in expected], np.float32)
    )
    assert run(model, {"top": 99}, embeddings=queries)["key"].shape == (2, 50)
    assert not list(tmp_path.iterdir())


def test_a_large_index_is_searched_by_its_graph(tmp_path: Path) -> None:
    index = index_of(1000)
    queries = index.embeddings[:20]
    expected = index.search(queries, 5)
    for _ in range(2):  # the second reads the graph that the first has written
        model = SearchModel(index, "index", tmp_path, exact_up_to=100)
        assert "1,000 entries, approximate search, which finds" in model.description
        found = run(model, {"top": 5}, embeddings=queries)
        for keys, scores, hits in zip(found["key"], found["score"], expected, strict=True):
            assert keys[0].decode() == hits[0].key
            assert len({hit.key.encode() for hit in hits} & set(keys)) >= 4
            exact = {hit.key.encode(): hit.score for hit in hits}
            for key, score in zip(keys, scores, strict=True):
                assert score == pytest.approx(exact.get(key, score), abs=1e-6)
        single = run(model, {"top": 5}, embeddings=queries[:1])
        assert single["key"].tolist() == found["key"][:1].tolist()
        assert len(list(tmp_path.iterdir())) == 1


def test_all_of_a_large_index_can_be_asked_for(tmp_path: Path) -> None:
    model = SearchModel(index_of(120), "index", tmp_path, exact_up_to=100)
    found = run(model, {"top": 120}, embeddings=index_of(120).embeddings[:2])
    assert len(set(found["key"][0])) == 120


def test_queries_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = SearchModel(index_of(5), "index", tmp_path)
    with pytest.raises(InputError, match=r"FP32 \[-1, 16\]"):
        run(model, embeddings=np.ones((1, 8), np.float32))
    with pytest.raises(InputError, match="L2-normalised"):
        run(model, embeddings=np.ones((1, 16), np.float32))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with functions of a user."""
    (tmp_path / "users_functions.py").write_text(
        "from edgeclip.runtime.serving.models import TensorSpec\n"
        "def fuse(inputs, parameters):\n"
        "    return {'fused': sum(inputs.values()) / len(inputs)}\n"
        "def mean(inputs, parameters):\n"
        "    return {'mean': inputs['x'].mean(axis=1)}\n"
        "mean.inputs = (TensorSpec(name='x', datatype='FP32', shape=(-1, 2)),)\n"
        "mean.outputs = (TensorSpec(name='mean', datatype='FP32', shape=(-1,)),)\n"
        f"mean.space = {SPACE!r}\n"
        "mean.joins = True\n"
        "def odd(inputs, parameters): pass\n"
        "odd.inputs = ['x']\n"
        "def spaced(inputs, parameters): pass\n"
        "spaced.space = 5\n"
        "value = 5\n"
    )
    (tmp_path / "broken_functions.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_functions"
    for name in ("users_functions", "broken_functions"):
        sys.modules.pop(name, None)


def test_a_function_is_a_model(module: str) -> None:
    plain = FunctionModel.load(f"{module}:fuse")
    assert (plain.name, plain.inputs, plain.joins, plain.space) == ("fuse", (), False, None)
    found = run(plain, a=np.ones((2, 3)), b=np.full((2, 3), 3.0))
    assert found["fused"].tolist() == [[2, 2, 2]] * 2
    described = FunctionModel.load(f"{module}:mean")
    assert (described.joins, described.space) == (True, SPACE)
    found = run(described, x=np.array([[1, 3]], np.float32))
    assert found["mean"].tolist() == [2]
    with pytest.raises(InputError, match="takes the inputs 'x'"):
        run(described, y=np.ones((1, 2)))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("users_functions", "write MODULE:FUNCTION"),
        (":fuse", "write MODULE:FUNCTION"),
        ("users_functions:", "write MODULE:FUNCTION"),
        ("users_functions:a.b", "write MODULE:FUNCTION"),
        ("users_functions:missing", "cannot import"),
        ("no_such_module:fuse", "ModuleNotFoundError"),
        ("broken_functions:fuse", "ZeroDivisionError"),
        ("users_functions:value", "is not a function, but int"),
        ("users_functions:odd", "tuple of TensorSpec"),
        ("users_functions:spaced", "fingerprint"),
    ],
)
def test_what_is_no_function_is_refused(module: str, path: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        FunctionModel.load(path)


def test_label_sets_of_another_space_are_refused(encoder: Encoder) -> None:
    baked = encoder.bake_labels(NAMES)
    other = LabelSet(names=baked.names, embeddings=baked.embeddings, space="9" * 64)
    model = LabelModel(encoder, "labels", other)
    with pytest.raises(SpaceMismatchError):
        run(model, image_embeds=encoder.encode_text(["red"]))


def test_a_large_index_and_a_bundle_share_a_process(tiny_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime crashes the process if usearch was imported before it."""
    pytest.importorskip("usearch.index")
    program = f"""
from pathlib import Path

import numpy as np

from edgeclip.runtime.bundle.index import Index
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.serving.search_model import ApproximateIndex

rows = np.random.default_rng(0).normal(size=(300, {DIM})).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
index = Index(tuple(map(str, range(300))), rows, "{SPACE}")
found = ApproximateIndex(index, Path({str(tmp_path)!r}))
encoder = Encoder.open(Path({str(tiny_bundle)!r}))
print(encoder.encode_text("a").shape, len(found.search(rows[:1], 3)[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"(1, {DIM}) 3\n"), done.stderr
