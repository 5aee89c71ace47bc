"""Small random models in the forms that are common, for consumers to read."""

import json
from typing import Any

import torch
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.pretrain import train_tokenizer
from edgeclip.runtime.spec import ImageSpec

_START, _END = "<|startoftext|>", "<|endoftext|>"


def openai_layout() -> DualEncoder:
    """A small random CLIP as OpenAI's are stored.

    Its tokenizer splits into words and pads with the end mark, which is the largest id, and
    its config has the eos_token_id 2 that those checkpoints have.
    """
    tokenizer = _openai_tokenizer()
    shape = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 32,
    }
    config = CLIPConfig(
        projection_dim=32,
        vision_config={"image_size": 48, "patch_size": 16, **shape},
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 77,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            **shape,
        },
    )
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    torch.manual_seed(0)
    image = ImageSpec(size=48, resize=48, mean=mean, std=std)
    return DualEncoder(_stirred(CLIPModel(config)), image, tokenizer)


def _openai_tokenizer() -> CLIPTokenizer:
    """Every byte within a word and at its end, then what is merged, then the two marks."""
    source = EmojiSource("train", 300, size=64)
    backend = CLIPTokenizer(vocab={_START: 0, _END: 1}, merges=[]).backend_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=[_START, _END],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator([source.caption(index) for index in range(300)], trainer)
    # Any: transformers wants tuples, but says strings.
    pairs: Any = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)]
    vocabulary = {word: number for number, word in enumerate([*dict.fromkeys(words), _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77)


def convnext_bert() -> DualEncoder:
    """A small random ConvNext beside a BERT: no part of it is CLIP's."""
    source = EmojiSource("train", 300, size=64)
    captions = (source.caption(index) for index in range(300))
    tokenizer = train_tokenizer(captions, vocab_size=600, context_length=40)
    vision = ConvNextConfig(depths=[1, 1], hidden_sizes=[32, 64], num_stages=2, image_size=64)
    vision.hidden_size = 64  # the projection reads its width there
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=40,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=32)
    torch.manual_seed(0)
    model = VisionTextDualEncoderModel(
        config, vision_model=ConvNextModel(vision), text_model=BertModel(text)
    )
    half = (0.5, 0.5, 0.5)
    image = ImageSpec(size=64, resize=72, mean=half, std=half, resample="bilinear")
    return DualEncoder(_stirred(model), image, tokenizer)


def _stirred(model: PreTrainedModel) -> PreTrainedModel:
    """Weights all unlike each other, norms and biases included, so that none can be mistaken."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 0:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    return model
