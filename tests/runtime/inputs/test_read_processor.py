import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.preprocess import image_spec_from_hugging_face, preprocess

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
    from transformers import CLIPImageProcessorPil

    processor: Any = CLIPImageProcessorPil(
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
    ("changes", "message"),
    [
        ({"size": {"height": 224, "width": 224}}, "would stretch"),
        ({"size": {"shortest_edge": 224, "longest_edge": 500}}, "would stretch"),
        ({"size": "224"}, "would stretch"),
        ({"size": 0}, "would stretch"),
        ({"size": True}, "would stretch"),
        ({"crop_size": {"height": 224, "width": 200}}, "not a square"),
        ({"crop_size": {"shortest_edge": 224}}, "not a square"),
        ({"crop_size": 256}, "size <= resize"),
        ({"do_resize": False}, "do_resize is off"),
        ({"do_center_crop": None}, "do_center_crop is off"),
        ({"do_rescale": False}, "do_rescale is off"),
        ({"do_pad": True}, "do_pad"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 4}, "resample 4 is none of"),
        ({"resample": [3]}, "resample"),
        ({"image_mean": 0.5}, "three numbers"),
        ({"image_std": [0.5, 0.5]}, "three numbers"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "std must be positive"),
        ({"image_processor_type": "SiglipImageProcessor"}, "SiglipImageProcessor"),
    ],
)
def test_what_a_spec_cannot_say_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(**changes)
    assert str(caught.value).startswith("config.json")


def test_all_mistakes_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"do_resize.*size.*crop_size.*resample"):
        read(do_resize=False, size=None, crop_size=-1, resample=9)
