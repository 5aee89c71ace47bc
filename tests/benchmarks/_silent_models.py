"""Small models with random weights, of four kinds of families, as directories of Hugging Face."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from consumers import convnext_bert, openai_layout
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.teachers.dual_encoder import MARKER, DualEncoder
from edgeclip.compress.train.pretrain import train_tokenizer
from edgeclip.runtime.spec import ImageSpec

PICTURES = {"train": 8, "calibration": 8, "test": 16}
_COLOURS = ("red", "green", "blue", "white", "black", "pink", "teal", "brown")


def own_layout(seed: int = 0, width: int = 64) -> DualEncoder:
    """A CLIP as `edgeclip pretrain` makes it."""
    tokenizer = train_tokenizer(_texts(), vocab_size=400, context_length=40)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        projection_dim=32,
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **sizes,
        },
    )
    torch.manual_seed(seed)
    half = (0.5, 0.5, 0.5)
    image = ImageSpec(size=32, resize=32, mean=half, std=half)
    return DualEncoder(CLIPModel(config).eval(), image, tokenizer)


def _texts() -> list[str]:
    return [f"a picture of {first} and {second}" for first in _COLOURS for second in _COLOURS]


def vit_roberta(seed: int = 0) -> DualEncoder:
    """A ViT beside a RoBERTa, with two positions more than a text may have tokens."""
    trained = ByteLevelBPETokenizer()
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(_texts(), vocab_size=400, special_tokens=marks, show_progress=False)
    trained._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), marks, strict=False)),
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=32,
    )
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=34,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        # At the usual 0.02 a text tower this narrow gives every text nearly one embedding.
        initializer_range=0.2,
        **sizes,
    )
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    torch.manual_seed(seed)
    model = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    )
    half = (0.5, 0.5, 0.5)
    return DualEncoder(model.eval(), ImageSpec(size=32, resize=36, mean=half, std=half), tokenizer)


FAMILIES: dict[str, Callable[[], DualEncoder]] = {
    "clip": own_layout,
    "openai": openai_layout,
    "roberta": vit_roberta,
    "convnext-bert": convnext_bert,
}


def write_models(folder: Path) -> None:
    """Save one model of each family, and for "clip" two more: other weights, other sizes."""
    for name, make in FAMILIES.items():
        _save(make(), folder / name)
    _save(own_layout(seed=1), folder / "clip-retrained")
    _save(own_layout(seed=2, width=96), folder / "clip-wider")


def _save(dual: DualEncoder, folder: Path) -> None:
    dual.save(folder)
    (folder / MARKER).unlink()  # as others save models


def write_pictures(folder: Path) -> None:
    """Coloured rectangles on a ground, with captions, in the subfolders of the splits."""
    draw = np.random.default_rng(0)
    for split, count in PICTURES.items():
        (folder / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((40, 52, 3), draw.integers(0, 255, 3), dtype=np.uint8)
            for _ in range(3):
                top, left = draw.integers(0, 28, 2)
                pixels[top : top + 12, left : left + 14] = draw.integers(0, 255, 3)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
            words = " and ".join(draw.choice(_COLOURS, size=2))
            caption = f"picture {number} of {split}: {words}"
            (folder / split / f"{number}.txt").write_text(caption, encoding="utf-8")


def copy_model(models: Path, name: str, target: Path) -> Path:
    """Copy a model, to be broken."""
    return shutil.copytree(models / name, target)
