"""Tiny teachers of every family, saved as their own libraries save them.

Weights are random, and all unlike each other; tokenizers know the captions of the built-in scenes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from torch import Tensor, nn
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    XLMRobertaTokenizer,
)

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.train.pretrain import train_tokenizer

SIDE, DIM, CONTEXT, VOCABULARY = 32, 16, 24, 320
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION: dict[str, Any] = {**SIZES, "image_size": SIDE, "patch_size": 8}


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher's directory, and how its own library embeds.

    Attributes:
        folder: what a user would name.
        model: the model as transformers runs it, in evaluation mode.
        processor: makes pixels of pictures.
        tokenize: makes the keyword arguments of `get_text_features` of texts.
    """

    folder: Path
    model: Any
    processor: Any
    tokenize: Callable[[list[str]], dict[str, Tensor]]

    def embed_image(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embed pictures: float32 [N, dim], L2-normalised."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = self.model.get_image_features(pixel_values=pixels).pooler_output
        return nn.functional.normalize(found, dim=-1)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts one by one: float32 [N, dim], L2-normalised."""
        with torch.inference_mode():
            found = [
                self.model.get_text_features(**self.tokenize([text])).pooler_output
                for text in texts
            ]
        return nn.functional.normalize(torch.cat(found), dim=-1)


@cache
def corpus() -> tuple[str, ...]:
    """Captions of scenes, and some words in other scripts."""
    source = EmojiSource("train", 200, size=SIDE)
    captions = [source.captions(index)[0] for index in range(len(source))]
    return (*captions, "a photo of a dog", "two red cars", "собака", "一只狗 红苹果", "犬の写真")


def clip(folder: Path) -> Teacher:
    tokenizer = train_tokenizer(corpus(), vocab_size=VOCABULARY, context_length=CONTEXT)
    model = CLIPModel(_clip_config(tokenizer))
    return _saved(folder, model, tokenizer, _clip_processor())


def _clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    text = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": DIM,
    }
    return CLIPConfig(
        projection_dim=DIM, vision_config={**VISION, "projection_dim": DIM}, text_config=text
    )


def metaclip_2(folder: Path) -> Teacher:
    tokenizer = _xlm_roberta(CONTEXT)
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "projection_dim": DIM}
    config = MetaClip2Config(
        projection_dim=DIM, vision_config={**VISION, "projection_dim": DIM}, text_config=text
    )
    return _saved(folder, MetaClip2Model(config), tokenizer, _clip_processor())


def altclip(folder: Path) -> Teacher:
    tokenizer = _xlm_roberta(CONTEXT)
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT + 2}
    text |= {"project_dim": 24, "pad_token_id": 1, "hidden_size": 48, "num_attention_heads": 3}
    config = AltCLIPConfig(
        projection_dim=DIM, vision_config={**VISION, "projection_dim": DIM}, text_config=text
    )
    return _saved(folder, AltCLIPModel(config), tokenizer, _clip_processor())


def chinese_clip(folder: Path) -> Teacher:
    tokenizer = _bert()
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    config = ChineseCLIPConfig(
        projection_dim=DIM, vision_config={**VISION, "projection_dim": DIM}, text_config=text
    )
    processor = _clip_processor()
    return _saved(folder, ChineseCLIPModel(config), tokenizer, processor)


def siglip(folder: Path) -> Teacher:
    """With a tokenizer.json that canonicalises, as on the hub."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids"],
    )
    teacher = _siglip(folder, fast)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "SiglipTokenizer"}
    path.write_text(json.dumps(settings))
    return teacher


def siglip_2(folder: Path) -> Teacher:
    """Of fixed resolution, with Gemma's tokenizer: no padding in the vocabulary of the text."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        show_progress=False,
    )
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    make: Any = GemmaTokenizer
    tokenizer = make(
        vocab=model["vocab"],
        merges=merges,
        padding_side="right",
        model_input_names=["input_ids"],
        add_bos_token=False,
        add_eos_token=True,
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return _siglip(folder, tokenizer)


def _siglip(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Teacher:
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    config = SiglipConfig(vision_config=VISION, text_config=text)
    size = {"height": SIDE, "width": SIDE}
    processor = SiglipImageProcessorPil(size=size)
    return _saved(folder, SiglipModel(config), tokenizer, processor, padding="max_length")


def vit_and_bert(folder: Path) -> Teacher:
    tokenizer = _bert()
    text = BertConfig(**_text_sizes(tokenizer, CONTEXT), pad_token_id=0)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return _saved(folder, _mixed(ViTConfig(**VISION), text), tokenizer, processor)


def dinov2_and_clip(folder: Path) -> Teacher:
    tokenizer = train_tokenizer(corpus(), vocab_size=VOCABULARY, context_length=CONTEXT)
    config: Any = _clip_config(tokenizer)
    text = CLIPTextConfig(**config.text_config.to_dict())
    sizes = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    vision = Dinov2Config(**sizes, mlp_ratio=2)
    processor = _clip_processor("Bit")
    return _saved(folder, _mixed(vision, text), tokenizer, processor)


def convnext_and_roberta(folder: Path) -> Teacher:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(corpus(), trainer)
    parts = json.loads(trained.to_str())["model"]
    make: Any = RobertaTokenizer
    tokenizer = make(vocab=parts["vocab"], merges=[tuple(pair) for pair in parts["merges"]])
    text = RobertaConfig(**_text_sizes(tokenizer, CONTEXT + 2), pad_token_id=1)
    vision = ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], image_size=SIDE)
    vision.hidden_size = 32
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=DIM)
    model = VisionTextDualEncoderModel(config, ConvNextModel(vision), RobertaModel(text))
    processor = ConvNextImageProcessorPil(size={"shortest_edge": SIDE})
    return _saved(folder, model, tokenizer, processor)


def _mixed(vision: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedModel:
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=DIM)
    return VisionTextDualEncoderModel(config)


def _text_sizes(tokenizer: PreTrainedTokenizerFast, positions: int) -> dict[str, Any]:
    return {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": positions}


def _clip_processor(kind: str = "CLIP") -> Any:
    import transformers

    make = getattr(transformers, f"{kind}ImageProcessorPil")
    return make(size={"shortest_edge": 36}, crop_size={"height": SIDE, "width": SIDE})


def _xlm_roberta(length: int) -> PreTrainedTokenizerFast:
    """SentencePiece in XLM-RoBERTa's order of special tokens."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    pieces = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    make: Any = XLMRobertaTokenizer
    fast: PreTrainedTokenizerFast = make(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=length)
    return fast


def _bert() -> PreTrainedTokenizerFast:
    make: Any = BertTokenizer
    bare = make().backend_tokenizer
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = bare.normalizer, bare.pre_tokenizer
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    fast: PreTrainedTokenizerFast = make(vocab=tokenizer.get_vocab(), model_max_length=CONTEXT)
    return fast


def spread(model: nn.Module, seed: int = 0) -> None:
    """Make all weights unlike each other, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 0 and not name.startswith("logit_"):
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        for name, weight in model.named_parameters():
            if name.startswith("logit_"):
                weight.fill_(2.5 if name == "logit_scale" else -10.0)


def _saved(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    processor: Any,
    *,
    padding: str | bool = False,
) -> Teacher:
    spread(model)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        ids = tokenizer(
            texts, truncation=True, max_length=CONTEXT, padding=padding, return_tensors="pt"
        )
        return dict(ids)

    return Teacher(folder, model, processor, tokenize)


FAMILIES: dict[str, Callable[[Path], Teacher]] = {
    maker.__name__: maker
    for maker in (
        clip,
        siglip,
        siglip_2,
        chinese_clip,
        altclip,
        metaclip_2,
        vit_and_bert,
        dinov2_and_clip,
        convnext_and_roberta,
    )
}
