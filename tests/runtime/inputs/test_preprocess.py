"""Preprocessing, and the settings of Hugging Face image processors."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.images import ImageInput
from edgeclip.runtime.inputs.preprocess import (
    crop_ahead,
    image_spec_from_hugging_face,
    preprocess,
    preprocess_batch,
    resize_and_crop,
)
from edgeclip.runtime.spec import ImageSpec, Resample

SPEC = ImageSpec(
    size=32,
    resize=36,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
NUMBER = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise is the hardest picture for two resizers to agree on."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_hugging_face(image: Image.Image, spec: ImageSpec) -> NDArray[np.float32]:
    transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

    processor: Any = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": spec.resize},
        crop_size={"height": spec.size, "width": spec.size},
        resample=NUMBER[spec.resample],
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    # The layout is told: a picture one or three pixels wide would be taken for channels.
    result = processor(image, return_tensors="np", input_data_format="channels_last")
    pixels: NDArray[np.float32] = result["pixel_values"][0]
    return pixels


def unnormalised_gap(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    std = np.asarray(SPEC.std)[:, None, None]
    return float((np.abs(ours - theirs) * std).mean())


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    size=st.integers(8, 40),
    margin=st.integers(0, 9),
    seed=st.integers(0, 5),
)
@example(width=1, height=1, size=32, margin=0, seed=0)
@example(width=1, height=30, size=32, margin=5, seed=0)
@example(width=30, height=1, size=31, margin=4, seed=0)
@example(width=32, height=32, size=32, margin=0, seed=0)
@example(width=37, height=53, size=31, margin=6, seed=0)
def test_agrees_with_hugging_face_bit_for_bit(
    width: int, height: int, size: int, margin: int, seed: int
) -> None:
    assume(max(width, height) <= 32 * min(width, height))  # longer strips are tested below
    spec = ImageSpec(size=size, resize=size + margin, mean=SPEC.mean, std=SPEC.std)
    image = noise(width, height, seed)
    ours = preprocess(image, spec)
    assert ours.dtype == np.float32
    assert ours.shape == (3, size, size)
    assert np.abs(ours - by_hugging_face(image, spec)).max() < 1e-5


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (20, 15), (36, 36)])
def test_every_filter_agrees(resample: Resample, shape: tuple[int, int]) -> None:
    spec = ImageSpec(size=32, resize=36, mean=SPEC.mean, std=SPEC.std, resample=resample)
    image = noise(*shape)
    assert np.abs(preprocess(image, spec) - by_hugging_face(image, spec)).max() < 1e-5


def texture(width: int, height: int, seed: int) -> Image.Image:
    """Random texture with a photograph's spectrum, 1/f, and a third as much colour as light."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))
    noise_planes = generator.standard_normal((3, height, width))
    planes = np.fft.irfft2(np.fft.rfft2(noise_planes) * amplitude, (height, width))
    light, red, blue = planes / planes.std(axis=(1, 2), keepdims=True)
    colours = np.stack([light + red / 3, light - red / 3, light - blue / 3], axis=-1)
    return Image.fromarray((128 + 50 * colours).clip(0, 255).astype(np.uint8))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(150, 800), height=st.integers(150, 800), seed=st.integers(0, 99))
@example(width=1003, height=773, seed=0)
@example(width=324, height=216, seed=1)
def test_jpeg_reduced_while_decoding_stays_within_one_level(
    width: int, height: int, seed: int
) -> None:
    file = io.BytesIO()
    texture(width, height, seed).save(file, "JPEG", quality=92)
    with Image.open(file) as full:
        theirs = by_hugging_face(full.convert("RGB"), SPEC)
    assert unnormalised_gap(preprocess(file.getvalue(), SPEC), theirs) < 1 / 255


@pytest.mark.parametrize("shape", [(3, 700), (700, 3), (40, 2000), (2000, 40)])
def test_long_strips_stay_within_one_level(shape: tuple[int, int]) -> None:
    image = texture(*shape, seed=0)
    assert unnormalised_gap(preprocess(image, SPEC), by_hugging_face(image, SPEC)) < 1 / 255


def test_a_strip_is_never_resized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        asked.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    strip = Image.new("RGB", (1, 60_000), (10, 200, 30))  # 36 x 2,160,000 pixels if it were
    assert (resize_and_crop(strip, SPEC) == (10, 200, 30)).all()
    assert asked == [(32, 32)]


def test_normalisation_by_hand() -> None:
    spec = ImageSpec(size=2, resize=2, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    grey = Image.new("RGB", (5, 3), (255, 51, 102))
    expected = [(1 - 0.5) / 0.5, (0.2 - 0.25) / 0.25, 0.4 / 2]
    pixels = preprocess(grey, spec)
    assert np.allclose(pixels, np.asarray(expected)[:, None, None], atol=1e-6)
    assert pixels.flags.c_contiguous


def test_the_centre_is_kept() -> None:
    wide = Image.new("RGB", (300, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    spec = ImageSpec(size=20, resize=20, mean=(0, 0, 0), std=(1, 1, 1), resample="nearest")
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert (resize_and_crop(image, spec) == (0, 0, 255)).all()


def test_a_batch_is_its_pictures_one_by_one() -> None:
    images: list[ImageInput] = [noise(50, 40), np.asarray(noise(40, 90)), noise(7, 7)]
    batch = preprocess_batch(images, SPEC)
    assert batch.shape == (3, 3, 32, 32)
    for row, image in zip(batch, images, strict=True):
        assert np.array_equal(row, preprocess(image, SPEC))


def test_an_array_of_pictures_is_a_batch() -> None:
    images = np.stack([np.asarray(noise(40, 40, seed)) for seed in range(2)])
    assert preprocess_batch(images, SPEC).shape == (2, 3, 32, 32)  # type: ignore[arg-type]


def test_a_bad_picture_of_a_batch_is_named() -> None:
    with pytest.raises(InputError, match=r"image 1: .*known format"):
        preprocess_batch([noise(9, 9), b"text"], SPEC)


@pytest.mark.parametrize("images", ["a.png", b"abc", noise(4, 4), np.asarray(noise(4, 4))])
def test_one_picture_is_not_a_batch(images: Any) -> None:
    with pytest.raises(InputError, match="put the one image into a list"):
        preprocess_batch(images, SPEC)


def test_no_pictures_are_not_a_batch() -> None:
    with pytest.raises(InputError, match="no images"):
        preprocess_batch([], SPEC)


# preprocessor_config.json of openai/clip-vit-base-patch32
OPENAI = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


def read(**changes: Any) -> Any:
    return image_spec_from_hugging_face({**OPENAI, **changes}, "config.json")


def test_the_original_clip_file() -> None:
    spec = read()
    assert (spec.size, spec.resize, spec.resample) == (224, 224, "bicubic")
    assert spec.mean == (0.48145466, 0.4578275, 0.40821073)
    assert image_spec_from_hugging_face({}, "empty") == spec  # these are the defaults too


def test_dictionaries_of_sizes() -> None:
    spec = read(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}, resample=2)
    assert (spec.size, spec.resize, spec.resample) == (64, 72, "bilinear")


def test_normalisation_switched_off() -> None:
    spec = read(do_normalize=False)
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_what_transformers_saves_means_the_same_here(tmp_path: Path, file: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

    processor: Any = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=2
    )
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    if file == "processor_config.json":  # how a whole CLIPProcessor is saved
        config = {"processor_class": "CLIPProcessor", "image_processor": config}
    spec = image_spec_from_hugging_face(config, file)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 51, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    assert np.abs(preprocess(pixels, spec) - theirs).mean() < 1e-3


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 32}}),
        ("ViTImageProcessorPil", {"size": {"height": 40, "width": 40}}),
        ("CLIPImageProcessorPil", {"size": {"height": 40, "width": 40}, "crop_size": 32}),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": 32}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 32}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}}),
    ],
)
@pytest.mark.parametrize("shape", [(70, 51, 3), (31, 95, 3), (33, 32, 3)])
def test_processors_of_other_families(
    tmp_path: Path, kind: str, settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """Those that crop, those that stretch, and those that do both."""
    transformers = pytest.importorskip("transformers", reason="the oracle of these tests")

    processor: Any = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    spec = image_spec_from_hugging_face(config, "saved")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    assert np.abs(preprocess(pixels, spec) - theirs).max() < 1e-5


def test_a_stretched_picture_is_seen_whole() -> None:
    halves = Image.new("RGB", (400, 50), (255, 0, 0))
    halves.paste((0, 0, 255), (200, 0, 400, 50))
    plain = ImageSpec(size=10, resize=10, mean=(0, 0, 0), std=(1, 1, 1), resample="nearest")
    pixels = resize_and_crop(halves, replace(plain, stretch=True))
    assert (pixels[:, :5] == (255, 0, 0)).all()
    assert (pixels[:, 5:] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 224, "width": 200}}, "neither one shortest edge nor a square"),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "neither one shortest edge"),
        ({"size": "224"}, "neither one shortest edge"),
        ({"size": 0}, "neither one shortest edge"),
        ({"size": True}, "neither one shortest edge"),
        ({"crop_size": {"height": 224, "width": 200}}, "not a square"),
        ({"crop_size": {"shortest_edge": 224}}, "not a square"),
        ({"crop_size": 256}, "size <= resize"),
        ({"do_resize": False}, "do_resize is off"),
        ({"do_center_crop": None, "size": {"shortest_edge": 224}}, "do_center_crop is off"),
        ({"do_rescale": False}, "do_rescale is off"),
        ({"do_pad": True}, "do_pad"),
        ({"use_square_size": True}, "use_square_size"),
        ({"do_normalize": None}, "do_normalize is null"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 4}, "resample 4 is none of"),
        ({"resample": [3]}, "resample"),
        ({"image_mean": 0.5}, "three numbers"),
        ({"image_std": [0.5, 0.5]}, "three numbers"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "std must be positive"),
        ({"image_processor_type": "BlipImageProcessor"}, "its type is BlipImageProcessor"),
    ],
)
def test_what_a_spec_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json")


def test_all_mistakes_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"do_resize.*size.*crop_size.*resample"):
        read(do_resize=False, size=None, crop_size=-1, resample=9)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    noise(40 + seed, 30, seed).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_what_is_decoded_ahead_is_the_same_in_the_same_order(threads: int, ahead: int) -> None:
    given: list[Any] = [encoded(seed) for seed in range(9)]
    given[2] = b"no picture"
    given[4] = noise(20, 20, 3)  # opened already
    found = list(crop_ahead(given, SPEC, threads=threads, ahead=ahead))
    assert len(found) == 9
    for number, (image, crop) in enumerate(zip(given, found, strict=True)):
        if number == 2:
            assert isinstance(crop, InputError)
        else:
            np.testing.assert_array_equal(crop, resize_and_crop(image, SPEC))


def test_no_more_is_decoded_than_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[object]()

    def count(image: Any, spec: ImageSpec) -> NDArray[np.uint8]:
        begun.append(image)
        return resize_and_crop(image, spec)

    monkeypatch.setattr("edgeclip.runtime.inputs.preprocess.resize_and_crop", count)
    crops = crop_ahead([encoded(seed) for seed in range(40)], SPEC, threads=2, ahead=4)
    next(crops)
    assert len(begun) <= 5
    crops.close()  # whoever stops asking waits for two at most
    assert len(begun) <= 5


def test_nothing_is_decoded_ahead_of_nothing() -> None:
    assert list(crop_ahead([], SPEC, threads=2, ahead=4)) == []
