"""Teachers of every family: what their own library computes, EdgeCLIP computes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    SiglipVisionConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.errors import ConfigError
from tests.compress.teachers.teacher_factory import FAMILIES, VISION, Teacher, spread

pytestmark = pytest.mark.slow

SHAPES = [(32, 32), (61, 40), (37, 129), (5, 7), (300, 33)]
TEXTS = [
    "",
    "eagle left of a RED apple, on a blue background!",
    "  two\n\nspaces -- and (punctuation)...  ",
    "一只狗 собака 犬の写真 🦅",
    "a red apple left of a blue house " * 12,
]


def pictures() -> list[Image.Image]:
    """Smooth pictures of odd shapes."""
    found = []
    for width, height in SHAPES:
        y, x = np.mgrid[0:height, 0:width]
        waves = [127.5 + 127.5 * np.sin(k * x / width + 5 * y / height) for k in (3, 7, 11)]
        found.append(Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)))
    return found


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return FAMILIES[request.param](tmp_path_factory.mktemp("teacher") / str(request.param))


@pytest.fixture(scope="module")
def loaded(made: Teacher) -> DualEncoder:
    return DualEncoder.load(made.folder)


def test_pictures_are_embedded_as_by_their_own_library(made: Teacher, loaded: DualEncoder) -> None:
    with torch.inference_mode():
        ours = loaded.embed_image(loaded.preprocess(pictures()))
    torch.testing.assert_close(ours, made.embed_image(pictures()), atol=1e-5, rtol=0)


def test_texts_are_embedded_as_by_their_own_library(made: Teacher, loaded: DualEncoder) -> None:
    with torch.inference_mode():
        ours = loaded.embed_text(loaded.tokenize(TEXTS))
    torch.testing.assert_close(ours, made.embed_text(TEXTS), atol=1e-5, rtol=0)


def test_a_family_survives_saving(loaded: DualEncoder, tmp_path: Path) -> None:
    loaded.save(tmp_path / "again")
    again = DualEncoder.load(tmp_path / "again")
    assert again.space == loaded.space
    assert again.spec == loaded.spec
    assert again.logit_scale == loaded.logit_scale


def test_the_weights_of_the_towers_have_their_prefixes(loaded: DualEncoder) -> None:
    image, text = loaded.tower_parts("image"), loaded.tower_parts("text")
    names = [name for name, _ in loaded.named_parameters()]
    rest = [name for name in names if not name.startswith((*image, *text))]
    assert set(rest) <= {"model.logit_scale", "model.logit_bias"}
    for parts in (image, text):
        assert any(name.startswith(parts) for name in names)
    assert not any(name.startswith(image) and name.startswith(text) for name in names)


def test_siglips_tokenizer_is_made_from_its_sentencepiece_model(tmp_path: Path) -> None:
    """As the package sentencepiece would read it, which is not needed here."""
    from transformers.utils import sentencepiece_model_pb2_new as messages

    made = FAMILIES["siglip"](tmp_path / "siglip")
    before = DualEncoder.load(made.folder)
    path = made.folder / "tokenizer.json"
    pieces = json.loads(path.read_text())["model"]["vocab"]
    make: Any = messages
    model = make.ModelProto()
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.trainer_spec.model_type = 1
    model.trainer_spec.vocab_size = len(pieces)
    model.normalizer_spec.name = "identity"
    (made.folder / "spiece.model").write_bytes(model.SerializeToString())
    path.unlink()
    (made.folder / "tokenizer_config.json").unlink()
    after = DualEncoder.load(made.folder)
    assert torch.equal(before.tokenize(TEXTS), after.tokenize(TEXTS))
    (made.folder / "spiece.model").write_bytes(model.SerializeToString()[:-3])
    with pytest.raises(ConfigError, match=r"spiece\.model is no SentencePiece model"):
        DualEncoder.load(made.folder)


def test_siglips_image_tower_beside_another_text_tower(tmp_path: Path) -> None:
    """It has a projection there, also where that changes no width."""
    made = FAMILIES["vit_and_bert"](tmp_path / "bert")
    text = made.model.config.text_config
    vision = SiglipVisionConfig(**VISION)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=32)
    model = VisionTextDualEncoderModel(config)
    spread(model)
    model.save_pretrained(made.folder)
    loaded = DualEncoder.load(made.folder)
    assert torch.equal(
        loaded.model.get_parameter("visual_projection.weight"), model.visual_projection.weight
    )


def test_chinese_clip_as_it_lies_on_the_hub(tmp_path: Path) -> None:
    """A vocabulary alone, and pictures that are stretched."""
    made = FAMILIES["chinese_clip"](tmp_path / "chinese")
    before = DualEncoder.load(made.folder)
    vocabulary = before.tokenizer.get_vocab()
    words = sorted(vocabulary, key=lambda word: vocabulary[word])
    (made.folder / "vocab.txt").write_text("\n".join(words) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made.folder / name).unlink()
    square = {"do_center_crop": False, "size": {"height": 32, "width": 32}}
    kind = {"feature_extractor_type": "ChineseCLIPFeatureExtractor", "resample": 3}
    (made.folder / "preprocessor_config.json").write_text(json.dumps(square | kind))
    after = DualEncoder.load(made.folder)
    assert after.image_spec.stretch
    assert torch.equal(before.tokenize(TEXTS[:3]), after.tokenize(TEXTS[:3]))


def test_a_model_for_pictures_of_any_shape_is_said_to_be_fixed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = FAMILIES["siglip_2_naflex"](tmp_path / "naflex")
    with caplog.at_level(logging.WARNING, logger="edgeclip"):
        assert DualEncoder.load(made.folder).image_spec.stretch
    assert "SigLIP of 32 x 32 pixels in it, to which pictures are stretched" in caplog.text


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["model_cfg"]["vision_cfg"].update(layers=[3, 4, 6, 3]), "a ResNet"),
        (
            lambda data: data["model_cfg"]["vision_cfg"].update(layers=3),
            "do not fit open_clip_conf",
        ),
        (
            lambda data: data["model_cfg"]["vision_cfg"].update(timm_model_name="convnext_base"),
            "the image tower convnext_base",
        ),
        (
            lambda data: data["model_cfg"]["text_cfg"].update(hf_model_name="xlm-roberta-base"),
            "the text tower xlm-roberta-base",
        ),
        (lambda data: data["model_cfg"]["text_cfg"].update(pool_type="last"), "pool_type 'last'"),
        (
            lambda data: data["preprocess_cfg"].update(resize_mode="longest"),
            "resize_mode 'longest'",
        ),
        (lambda data: data.pop("model_cfg"), "has no model_cfg"),
    ],
)
def test_what_of_open_clip_cannot_be_read(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    made = FAMILIES["open_clip"](tmp_path / "checkpoint")
    _change(made.folder / "open_clip_config.json", change)
    with pytest.raises(ConfigError, match=message) as caught:
        DualEncoder.load(made.folder)
    assert str(made.folder) in str(caught.value)


def test_open_clips_text_tower_may_be_a_module_of_its_own(tmp_path: Path) -> None:
    made = FAMILIES["open_clip"](tmp_path / "checkpoint")
    before = DualEncoder.load(made.folder)
    path = made.folder / "open_clip_model.safetensors"
    state = load_file(path)
    own = {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": value
        for name, value in state.items()
    }
    save_file(own | {"text.attn_mask": torch.zeros(2, 2)}, path)
    _change(
        made.folder / "open_clip_config.json",
        lambda data: data["model_cfg"].update(custom_text=True),
    )
    assert DualEncoder.load(made.folder).space == before.space


def test_open_clip_weights_of_torch_are_read_without_running_anything(tmp_path: Path) -> None:
    made = FAMILIES["open_clip"](tmp_path / "checkpoint")
    before = DualEncoder.load(made.folder).space
    path = made.folder / "open_clip_model.safetensors"
    state = load_file(path)
    torch.save(
        {f"module.{name}": value for name, value in state.items()},
        path.with_name("open_clip_pytorch_model.bin"),
    )
    path.unlink()
    assert DualEncoder.load(made.folder).space == before
    torch.save({"state": print}, made.folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be read as tensors alone"):
        DualEncoder.load(made.folder)


def test_steps_behind_a_sentence_transformers_clip_are_refused(tmp_path: Path) -> None:
    made = FAMILIES["sentence_transformers"](tmp_path / "sentences")
    path = made.folder / "modules.json"
    first = json.loads(path.read_text())
    dense = {"idx": 1, "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    normalize = {"idx": 1, "path": "1_Norm", "type": "sentence_transformers.models.Normalize"}
    path.write_text(json.dumps([*first, normalize]))
    DualEncoder.load(made.folder)
    path.write_text(json.dumps([*first, dense]))
    with pytest.raises(ConfigError, match="pass through Dense behind the CLIP"):
        DualEncoder.load(made.folder)


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    made = FAMILIES["lora"](tmp_path / "adapter")
    path = made.folder / "adapter_config.json"
    _change(path, lambda data: data.update(base_model_name_or_path=None))
    with pytest.raises(ConfigError, match="does not name its base model"):
        DualEncoder.load(made.folder)
    _change(path, lambda data: data.update(base_model_name_or_path=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="nowhere is not a directory"):
        DualEncoder.load(made.folder)
