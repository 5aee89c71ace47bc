"""Directories whose parts do not belong together."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    PreTrainedConfig,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.pretrain import train_tokenizer
from edgeclip.runtime.errors import ConfigError

pytestmark = pytest.mark.slow

LONG = "a red apple left of a blue house " * 12


@pytest.fixture
def own_folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of the teacher's directory that a test may alter, as others would have saved it."""
    folder = shutil.copytree(teacher_folder, tmp_path / "own")
    (folder / "edgeclip-model.json").unlink()
    return folder


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _text(**values: object) -> Callable[[Path], None]:
    return lambda folder: _edit(
        folder / "config.json", lambda data: data["text_config"].update(values)
    )


def _tokenizer(**values: object) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / "tokenizer_config.json", lambda data: data.update(values))


def _processor(**values: object) -> Callable[[Path], None]:
    return lambda folder: _edit(
        folder / "preprocessor_config.json", lambda data: data.update(values)
    )


def _weight(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights[name])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return edit


def _larger_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    tokenizer.save(str(folder / "tokenizer.json"))


def _no_frame(folder: Path) -> None:
    _edit(folder / "tokenizer.json", lambda data: data.update(post_processor=None))


def _knows_nothing(folder: Path) -> None:
    """A vocabulary of marks: every word is dropped."""

    def change(data: dict[str, Any]) -> None:
        data["model"]["vocab"] = {item["content"]: item["id"] for item in data["added_tokens"]}
        data["model"]["merges"] = []

    _edit(folder / "tokenizer.json", change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_text(eos_token_id=49407), "eos_token_id in config.json is 49407.*ends a text with 1"),
        (_text(eos_token_id=0), "eos_token_id in config.json is 0.*ends a text with 1"),
        (_text(eos_token_id=None), "eos_token_id in config.json is None"),
        (_larger_vocabulary, "token ids up to 408, the text tower has vectors for 400"),
        (_no_frame, "post-processor must put one token before and one behind"),
        (_knows_nothing, "of every text, so that all would have one embedding"),
        (_tokenizer(truncation_side="left"), "truncation_side be right"),
        (_tokenizer(model_max_length=2), "model_max_length in tokenizer_config.json"),
        (_processor(crop_size={"height": 24, "width": 24}), "24 x 24.*image_size 32"),
        (
            _processor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
            "64 x 64.*image_size 32",
        ),
        (
            _weight("visual_projection.weight", lambda value: value.fill_(float("nan"))),
            "not finite, such as those of visual_projection.weight",
        ),
        (
            _weight("visual_projection.weight", lambda value: value.zero_()),
            "every picture gets the same embedding",
        ),
        (
            _weight("text_model.final_layer_norm.weight", lambda value: value.zero_()),
            "every text gets the same embedding",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    own_folder: Path, change: Callable[[Path], None], message: str
) -> None:
    change(own_folder)
    with pytest.raises(ConfigError, match=message) as caught:
        DualEncoder.load(own_folder)
    assert str(caught.value).startswith(str(own_folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_text(eos_token_id=2), "pools at the largest token id"),
        (_processor(image_mean=[122.0, 117.0, 104.0]), "not those of pixels from 0 to 1"),
    ],
)
def test_where_transformers_is_wrong_as_well_there_is_a_warning(
    own_folder: Path,
    change: Callable[[Path], None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(own_folder)
    with caplog.at_level(logging.WARNING, logger="edgeclip"):
        DualEncoder.load(own_folder)
    assert message in caplog.text


def test_a_sound_model_gives_no_warning(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="edgeclip"):
        DualEncoder.load(own_folder)
    assert not caplog.records


def test_a_small_tokenizer_gives_a_warning(
    own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_tokenizer([LONG], vocab_size=300, context_length=40).save_pretrained(own_folder)
    with caplog.at_level(logging.WARNING, logger="edgeclip"):
        DualEncoder.load(own_folder)
    assert "the text tower vectors for 400: unless it was trained so" in caplog.text


@pytest.mark.parametrize("eos", [1, 2])
def test_texts_are_as_transformers_embeds_them(own_folder: Path, eos: int) -> None:
    """Also where a tower pools at the largest id, and padding has the id 2."""
    _text(eos_token_id=eos)(own_folder)
    loaded = DualEncoder.load(own_folder)
    model, tokenizer = CLIPModel.from_pretrained(own_folder).eval(), _auto(own_folder)
    texts = ["", "red apple", LONG]
    with torch.inference_mode():
        ours = loaded.embed_text(loaded.tokenize(texts))
        for text, found in zip(texts, ours, strict=True):
            given = tokenizer(text, truncation=True, return_tensors="pt")
            theirs = model.get_text_features(input_ids=given["input_ids"]).pooler_output[0]
            torch.testing.assert_close(found, theirs / theirs.norm(), atol=1e-5, rtol=0)


def test_the_nested_processor_goes_first_as_in_transformers(own_folder: Path) -> None:
    path = own_folder / "preprocessor_config.json"
    nested = json.loads(path.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (own_folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert DualEncoder.load(own_folder).image_spec.mean == (0.1, 0.2, 0.3)


def test_the_tokenizer_may_allow_fewer_tokens_than_the_tower(own_folder: Path) -> None:
    _tokenizer(model_max_length=12)(own_folder)
    loaded = DualEncoder.load(own_folder)
    assert loaded.spec.text.context_length == 12
    assert loaded.tokenize([LONG]).shape == (1, 12)


def _auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def _saved_beside_a_vit(
    folder: Path, text: PreTrainedConfig, own_folder: Path, pad: str = "<|pad|>"
) -> Path:
    """A small ViT beside a text tower of another family."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    torch.manual_seed(0)
    VisionTextDualEncoderModel(config).eval().save_pretrained(folder)
    shutil.copy(own_folder / "preprocessor_config.json", folder)
    tokenizer = _auto(own_folder)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    return folder


def _roberta(**changes: Any) -> RobertaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 43,
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return RobertaConfig(**sizes | changes)


@pytest.mark.parametrize(("positions", "pad", "context"), [(43, 2, 40), (34, 2, 31), (34, 1, 32)])
@pytest.mark.parametrize("mark", ["<|pad|>", "<|endoftext|>"])
def test_a_roberta_has_fewer_tokens_than_positions(
    own_folder: Path, tmp_path: Path, positions: int, pad: int, context: int, mark: str
) -> None:
    """Positions begin behind the id of the padding; that may also be the end token."""
    text = _roberta(max_position_embeddings=positions, pad_token_id=pad)
    folder = _saved_beside_a_vit(tmp_path / "roberta", text, own_folder, mark)
    loaded = DualEncoder.load(folder)
    assert loaded.spec.text.context_length == context
    model = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    texts = ["", "red apple", LONG]
    with torch.inference_mode():
        ours = loaded.embed_text(loaded.tokenize(texts))
        for row, found in zip(texts, ours, strict=True):
            given = _auto(folder)(row, truncation=True, max_length=context, return_tensors="pt")
            theirs = model.get_text_features(**given).pooler_output[0]
            torch.testing.assert_close(found, theirs / theirs.norm(), atol=1e-5, rtol=0)


def test_another_padding_than_the_config_gives_a_warning(
    own_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _saved_beside_a_vit(tmp_path / "roberta", _roberta(pad_token_id=1), own_folder)
    DualEncoder.load(folder)
    assert "pads with token 2, text_config.pad_token_id in config.json is 1" in caplog.text


def test_a_clip_text_tower_beside_another_picture_tower(own_folder: Path, tmp_path: Path) -> None:
    text = CLIPTextConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        eos_token_id=7,
    )
    folder = _saved_beside_a_vit(tmp_path / "vit", text, own_folder)
    with pytest.raises(ConfigError, match=r"eos_token_id in config\.json is 7"):
        DualEncoder.load(folder)


def test_a_text_tower_without_a_pooled_output(own_folder: Path, tmp_path: Path) -> None:
    text = GPT2Config(vocab_size=400, n_positions=40, n_embd=32, n_layer=1, n_head=2)
    folder = _saved_beside_a_vit(tmp_path / "gpt", text, own_folder)
    with pytest.raises(ConfigError, match="cannot embed a text of 40 tokens") as caught:
        DualEncoder.load(folder)
    assert "\n" not in str(caught.value)
