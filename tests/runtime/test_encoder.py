import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from PIL import Image

from edgeclip.runtime.bundle.index import Index, LabelSet
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.encoder import Encoder
from edgeclip.runtime.errors import (
    BundleError,
    ConfigError,
    EngineError,
    InputError,
    SpaceMismatchError,
)
from edgeclip.runtime.inputs.images import ImageInput
from tests.conftest import Edit

TEXTS = ["a red apple", "green", "a photo of the blue sea and a red car", "hill", ""]


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (11, 9), colour)


def random_images(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_opens_on_this_machine_by_default(tiny_bundle: Path) -> None:
    encoder = Encoder.open(str(tiny_bundle))
    assert encoder.device.name == "this-machine"
    assert encoder.precisions == {"image": "int8", "text": "fp32"}
    assert encoder.spec.dim == 8
    assert encoder.space == "5" * 64


def test_unknown_device(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="toaster"):
        Encoder.open(tiny_bundle, device="toaster")


@pytest.mark.parametrize("threads", [1, 3])
def test_many_files_are_decoded_meanwhile_and_stay_in_order(
    tiny_bundle: Path, cpu_device: DeviceProfile, threads: int
) -> None:
    device = dataclasses.replace(cpu_device, threads=threads)
    encoder = Encoder.open(tiny_bundle, device=device)
    files = []
    for pixels in random_images(23):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    alone = np.concatenate([encoder.encode_image(file) for file in files])
    np.testing.assert_allclose(encoder.encode_image(files, batch_size=4), alone, atol=1e-6)
    with pytest.raises(InputError, match=r"^image 17: "):
        encoder.encode_image([*files[:17], b"", *files[17:]], batch_size=4)


def test_every_kind_of_image_gives_one_answer(encoder: Encoder, tmp_path: Path) -> None:
    image = picture("red")
    path = tmp_path / "a.png"
    image.save(path)
    kinds: list[ImageInput] = [image, path, str(path), path.read_bytes(), np.asarray(image)]
    rows = [encoder.encode_image(kind) for kind in kinds]
    assert all(row.shape == (1, 8) and row.dtype == np.float32 for row in rows)
    assert all(np.array_equal(row, rows[0]) for row in rows)
    np.testing.assert_allclose(np.linalg.norm(rows[0], axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(encoder.encode_image(kinds), np.concatenate(rows))


def test_array_of_four_dimensions_is_a_batch(encoder: Encoder) -> None:
    images = random_images(3)
    together = encoder.encode_image(images)
    assert together.shape == (3, 8)
    np.testing.assert_array_equal(together, encoder.encode_image(list(images)))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_images_do_not_depend_on_their_batch(
    tiny_bundle: Path, cpu_device: DeviceProfile, precision: Any
) -> None:
    encoder = Encoder.open(tiny_bundle, device=cpu_device, precision=precision)
    images = list(random_images(7))
    alone = np.concatenate([encoder.encode_image(image) for image in images])
    for size in (1, 2, 3, 7, 100):
        together = encoder.encode_image(images, batch_size=size)
        np.testing.assert_allclose(together, alone, atol=1e-6)


@given(order=st.permutations(TEXTS), size=st.integers(1, 6))
def test_texts_do_not_depend_on_their_batch(tiny_bundle: Path, order: list[str], size: int) -> None:
    encoder = Encoder.open(tiny_bundle, check_hashes=False)
    together = encoder.encode_text(order, batch_size=size)
    alone = np.concatenate([encoder.encode_text(text) for text in order])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_nothing_gives_nothing(encoder: Encoder) -> None:
    assert encoder.encode_image([]).shape == (0, 8)
    assert encoder.encode_text([]).shape == (0, 8)
    assert encoder.encode_pixels(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, 8)


def test_only_the_tower_that_is_used_is_loaded(own_bundle: Path, cpu_device: DeviceProfile) -> None:
    encoder = Encoder.open(own_bundle, device=cpu_device)
    (own_bundle / "onnx" / "text_model.onnx").unlink()
    assert encoder.encode_image(picture("red")).shape == (1, 8)
    with pytest.raises(BundleError, match=r"cannot read .*text_model\.onnx"):
        encoder.encode_text("red")


def test_text_of_500_words(encoder: Encoder) -> None:
    long = "red " * 500
    with pytest.raises(InputError, match="the limit is 16"):
        encoder.encode_text(long)
    assert encoder.encode_text(long, truncate=True).shape == (1, 8)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 8, 9, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 1), np.uint8),
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((1, 3, 8, 8), np.uint8),
    ],
)
def test_pixels_of_another_shape_or_type(encoder: Encoder, pixels: Any) -> None:
    with pytest.raises(InputError, match=r"must be uint8 \[N, 8, 8, 3\]"):
        encoder.encode_pixels(pixels)


def test_batch_size_below_one(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        encoder.encode_image([picture("red")], batch_size=0)


def replace_tower(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = bundle / "onnx" / "vision_model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def give_nan(model: onnx.ModelProto) -> None:
    weights = next(item for item in model.graph.initializer if item.name == "weights")
    values = numpy_helper.to_array(weights).copy()
    values[0, 0] = np.nan
    weights.CopyFrom(numpy_helper.from_array(values, "weights"))


def give_other_dim(model: onnx.ModelProto) -> None:
    weights = next(item for item in model.graph.initializer if item.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(np.ones((3, 5), np.float32), "weights"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5


def give_other_name(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "pooler_output"
    model.graph.output[0].name = "pooler_output"


def skip_normalisation(model: onnx.ModelProto) -> None:
    del model.graph.node[-2:]
    model.graph.node.append(helper.make_node("Identity", ["projected"], ["image_embeds"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (give_nan, "NaN"),
        (give_other_dim, r"float32 \[1, 5\] instead of float32 \[1, 8\]"),
        (give_other_name, "has no output image_embeds"),
        (skip_normalisation, "L2-normalised"),
    ],
)
def test_output_that_is_no_embedding_is_refused(
    own_bundle: Path,
    reseal: Callable[[Path], None],
    cpu_device: DeviceProfile,
    change: Callable[[onnx.ModelProto], None],
    message: str,
) -> None:
    replace_tower(own_bundle, change)
    reseal(own_bundle)
    encoder = Encoder.open(own_bundle, device=cpu_device, precision="fp32")
    with pytest.raises(EngineError, match=message):
        encoder.encode_image(picture("red"))


def test_altered_tower_is_not_run(own_bundle: Path, cpu_device: DeviceProfile) -> None:
    replace_tower(own_bundle, give_nan)
    with pytest.raises(BundleError, match="was altered"):
        Encoder.open(own_bundle, device=cpu_device)


def test_tower_that_is_altered_after_the_check_is_not_run(
    own_bundle: Path, cpu_device: DeviceProfile
) -> None:
    checked, unchecked = (
        Encoder.open(own_bundle, device=cpu_device, precision="fp32", check_hashes=check)
        for check in (True, False)
    )
    replace_tower(own_bundle, lambda model: setattr(model, "producer_name", "other"))
    with pytest.raises(BundleError, match=r"vision_model\.onnx was altered"):
        checked.encode_image(picture("red"))
    assert unchecked.encode_image(picture("red")).shape == (1, 8)


@pytest.mark.parametrize(
    "embeddings",
    [
        np.eye(2, 8, dtype=np.float64),
        np.eye(2, 9, dtype=np.float32),
        2 * np.eye(2, 8, dtype=np.float32),
        np.full((2, 8), np.nan, np.float32),
        np.full((8, 8), 0.5, np.float32),  # could be a grey image
    ],
)
def test_floats_that_are_no_embeddings(encoder: Encoder, index: Index, embeddings: Any) -> None:
    with pytest.raises(InputError, match="a grey image is given as uint8"):
        encoder.search(embeddings, index)
    with pytest.raises(InputError, match="image embeddings"):
        encoder.classify_embeddings(embeddings, encoder.bake_labels(["red"]))


def test_no_images_have_no_answers(encoder: Encoder) -> None:
    assert encoder.classify([], ["red"]) == []


def test_grey_image_is_a_query(encoder: Encoder, index: Index) -> None:
    assert len(encoder.search(np.full((8, 8), 200, np.uint8), index)[0]) == 3


def test_messages_count_in_the_whole_list(encoder: Encoder) -> None:
    images: list[ImageInput] = [*random_images(4), b"no image"]
    with pytest.raises(InputError, match=r"^image 4: "):
        encoder.encode_image(images, batch_size=3)
    with pytest.raises(InputError, match=r"^text 4 has 503 tokens"):
        encoder.encode_text([*"abcd", "red " * 500], batch_size=3)
    texts: Any = [*"abcd", None]
    with pytest.raises(InputError, match=r"^text 4 is NoneType"):
        encoder.encode_text(texts, batch_size=3)


@pytest.mark.parametrize(
    "texts",
    [1, None, b"red", [b"red"], {"red": 1}, {"red"}, [["red"]], [1.0], np.array("red"), object()],
    ids=lambda texts: type(texts).__name__,
)
def test_what_is_no_text_is_refused(encoder: Encoder, texts: Any) -> None:
    for ask in (
        encoder.encode_text,
        encoder.bake_labels,
        lambda given: encoder.bake_labels(["red"], given),
        lambda given: encoder.classify(picture("red"), given),
    ):
        with pytest.raises(InputError, match=type(texts).__name__ + "|bytes|list|float"):
            ask(texts)


@pytest.mark.parametrize("make", [tuple, np.array, iter, lambda texts: dict.fromkeys(texts).keys()])
def test_any_iterable_of_texts_will_do(encoder: Encoder, make: Callable[[list[str]], Any]) -> None:
    texts = ["red", "a green tree"]
    expected = encoder.encode_text(texts)
    np.testing.assert_array_equal(encoder.encode_text(make(texts)), expected)
    assert encoder.bake_labels(make(texts)).names == tuple(texts)


def test_one_template_may_be_given_without_a_list(encoder: Encoder) -> None:
    one, several = encoder.bake_labels(["red"], "a {}"), encoder.bake_labels(["red"], ["a {}"])
    assert one.templates == several.templates == ("a {}",)


@pytest.mark.parametrize("again", [lambda item: pickle.loads(pickle.dumps(item)), copy.deepcopy])
def test_a_copy_of_a_used_encoder_answers_the_same(
    tiny_bundle: Path, cpu_device: DeviceProfile, again: Callable[[Encoder], Encoder]
) -> None:
    encoder = Encoder.open(tiny_bundle, device=cpu_device)
    images, texts = encoder.encode_image(picture("red")), encoder.encode_text("red")
    copied = again(encoder)
    assert copied.precisions == encoder.precisions
    np.testing.assert_array_equal(copied.encode_image(picture("red")), images)
    np.testing.assert_array_equal(copied.encode_text("red"), texts)


def test_classify(encoder: Encoder) -> None:
    names = ["red", "green", "blue"]
    answers = encoder.classify([picture("blue"), picture("red")], names, top=2)
    assert [best[0].label for best in answers] == ["blue", "red"]
    assert [len(best) for best in answers] == [2, 2]
    everything = encoder.classify(picture("red"), names, top=99)[0]
    assert sorted(answer.label for answer in everything) == sorted(names)
    assert sum(answer.score for answer in everything) == pytest.approx(1, abs=1e-6)


def test_scores_are_the_softmax_of_scaled_cosines(encoder: Encoder) -> None:
    labels = encoder.bake_labels(["red", "green"])
    logits = encoder.spec.logit_scale * encoder.encode_image(picture("red")) @ labels.embeddings.T
    expected = 1 / (1 + np.exp(logits[0, 1] - logits[0, 0]))
    answer = encoder.classify(picture("red"), labels)[0][0]
    assert answer.label == "red"
    assert answer.score == pytest.approx(expected, rel=1e-5)


def test_labels_are_the_mean_over_templates(encoder: Encoder) -> None:
    labels = encoder.bake_labels(["red", "green"], ["a {}", "the {} car"])
    mean = encoder.encode_text(["a green", "the green car"]).mean(axis=0)
    np.testing.assert_allclose(labels.embeddings[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert labels.templates == ("a {}", "the {} car")
    assert labels.space == encoder.space
    assert labels.embedder == encoder.embedder("text") != encoder.embedder("image")


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "at least one name"),
        ("red", ["{}"], "a list of"),
        (["red"], [], "at least one template"),
        (["red"], ["no place"], "must contain"),
        (["red"], ["{} and {}"], "must contain"),
        (["red", "red"], ["{}"], "twice"),
    ],
)
def test_labels_that_cannot_be_baked(
    encoder: Encoder, names: Any, templates: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encoder.bake_labels(names, templates)


def test_name_with_braces_is_plain_text(encoder: Encoder) -> None:
    assert encoder.bake_labels(["{red}"]).names == ("{red}",)


def test_labels_and_index_of_another_space(encoder: Encoder) -> None:
    rows = encoder.encode_text(["red", "green"])
    labels = LabelSet(names=("red", "green"), embeddings=rows, space="6" * 64)
    index = Index(keys=("red", "green"), embeddings=rows, space="6" * 64)
    with pytest.raises(SpaceMismatchError):
        encoder.classify(picture("red"), labels)
    with pytest.raises(SpaceMismatchError):
        encoder.search("red", index)


def test_answers_below_one(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="top is 0"):
        encoder.classify(picture("red"), ["red"], top=0)


@pytest.fixture
def index(encoder: Encoder) -> Index:
    colours = ("red", "green", "blue")
    embeddings = encoder.encode_image([picture(colour) for colour in colours])
    return Index(keys=colours, embeddings=embeddings, space=encoder.space)


def test_search_by_text_image_and_embedding(encoder: Encoder, index: Index, tmp_path: Path) -> None:
    path = tmp_path / "blue.png"
    picture("blue").save(path)
    stream = io.BytesIO()
    picture("blue").save(stream, "PNG")
    queries: list[ImageInput] = [
        "the blue sea",
        path,
        stream.getvalue(),
        picture("blue"),
        index.embeddings[2:],
    ]
    for query in queries:
        hits = encoder.search(query, index, top=2)
        assert [hit.key for hit in hits[0]][:1] == ["blue"]
        assert len(hits[0]) == 2
    several = encoder.search(["a red apple", "green"], index, top=99)
    assert [hits[0].key for hits in several] == ["red", "green"]
    assert [len(hits) for hits in several] == [3, 3]


def test_search_for_a_mixture_or_nothing(encoder: Encoder, index: Index) -> None:
    mixture: Any = ["red", picture("red")]
    with pytest.raises(InputError, match="not for both"):
        encoder.search(mixture, index)
    with pytest.raises(InputError, match="no query was given"):
        encoder.search([], index)


def test_a_model_is_named_by_how_its_input_is_prepared(
    tiny_bundle: Path,
    own_bundle: Path,
    edit_manifest: Callable[[Path, Edit], None],
    cpu_device: DeviceProfile,
) -> None:
    def names(bundle: Path) -> tuple[str, str]:
        encoder = Encoder.open(bundle, device=cpu_device)
        return encoder.model_of("image"), encoder.model_of("text")

    def change(data: dict[str, Any]) -> None:
        data["spec"]["image"]["resample"] = "nearest"

    image, text = names(tiny_bundle)
    assert names(own_bundle) == (image, text)
    edit_manifest(own_bundle, change)
    assert names(own_bundle)[0] != image
    assert names(own_bundle)[1] == text
