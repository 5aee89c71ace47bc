"""Tiny teachers of every family, saved as their own libraries save them.

Weights are random, and all unlike each other; tokenizers know the captions of the built-in scenes.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordPieceTrainer
from torch import Tensor, nn
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessorPil,
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
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
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


def siglip_2_naflex(folder: Path) -> Teacher:
    """Of any resolution: held against itself on squares of its own grid of positions."""
    made = siglip_2(folder.with_name("fixed"))
    vision = {**VISION, "num_patches": (SIDE // 8) ** 2}
    vision.pop("image_size")
    text = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
    spread(model)
    model.eval().save_pretrained(folder)
    make: Any = Siglip2Tokenizer
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in parts["merges"]]
    tokenizer = make(vocab=parts["vocab"], merges=merges, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.save_pretrained(folder)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=(SIDE // 8) ** 2)
    processor.save_pretrained(folder)
    return Teacher(folder, _OfPatches(model), _Squares(processor), _padded(tokenizer))


class _Squares:
    """Stretches pictures to the square, then makes patches of them."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, Any]:
        squares = [image.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
        return {"pixel_values": self._processor(images=squares, return_tensors=return_tensors)}


class _OfPatches:
    """Passes all that the processor makes on to the image tower."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.get_text_features = model.get_text_features

    def get_image_features(self, pixel_values: dict[str, Tensor]) -> Any:
        return self._model.get_image_features(**pixel_values)


def _padded(tokenizer: Any) -> Callable[[list[str]], dict[str, Tensor]]:
    """Tokenize as SigLIP was trained: to the whole context, padding not masked."""

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        given = tokenizer(
            texts, truncation=True, max_length=CONTEXT, padding="max_length", return_tensors="pt"
        )
        return {"input_ids": given["input_ids"]}

    return tokenize


def open_clip(folder: Path) -> Teacher:
    """A CLIP in OpenCLIP's layout."""
    made = clip(folder.with_name("hugging-face"))
    state = made.model.state_dict()
    found: dict[str, Tensor] = {
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    found |= _res_blocks(state, "vision_model", "visual.transformer")
    found |= _res_blocks(state, "text_model", "transformer")
    config = {
        "embed_dim": DIM,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16}
        | {"patch_size": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2}
        | {"layers": 2, "mlp_ratio": 2.0},
    }
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    _save_open_clip(folder, found, config, made.folder)
    return Teacher(folder, made.model, processor, made.tokenize)


def open_clip_siglip(folder: Path) -> Teacher:
    """A SigLIP in OpenCLIP's layout, with timm's image tower."""
    made = siglip(folder.with_name("hugging-face"))
    model = made.model
    state = model.state_dict()
    image, trunk, pool = "vision_model", "visual.trunk", "visual.trunk.attn_pool"
    position = state[f"{image}.embeddings.position_embedding.weight"]
    found = {
        "text.token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        f"{trunk}.pos_embed": position[None],
        f"{pool}.latent": state[f"{image}.head.probe"],
        "logit_scale": state["logit_scale"].reshape(()),
        "logit_bias": state["logit_bias"].reshape(()),
    }
    for kind in ("weight", "bias"):
        found[f"text.ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        found[f"text.text_projection.{kind}"] = state[f"text_model.head.{kind}"]
        patches = state[f"{image}.embeddings.patch_embedding.{kind}"]
        found[f"{trunk}.patch_embed.proj.{kind}"] = patches
        found[f"{trunk}.norm.{kind}"] = state[f"{image}.post_layernorm.{kind}"]
        joint = state[f"{image}.head.attention.in_proj_{kind}"]
        found[f"{pool}.q.{kind}"], found[f"{pool}.kv.{kind}"] = joint[:32], joint[32:]
        found[f"{pool}.proj.{kind}"] = state[f"{image}.head.attention.out_proj.{kind}"]
        found[f"{pool}.norm.{kind}"] = state[f"{image}.head.layernorm.{kind}"]
        for part in ("fc1", "fc2"):
            found[f"{pool}.mlp.{part}.{kind}"] = state[f"{image}.head.mlp.{part}.{kind}"]
        for layer in range(2):
            theirs, ours = f"{trunk}.blocks.{layer}", f"{image}.encoder.layers.{layer}"
            found[f"{theirs}.attn.qkv.{kind}"] = _joint(state, ours, kind)
            found[f"{theirs}.attn.proj.{kind}"] = state[f"{ours}.self_attn.out_proj.{kind}"]
            for number in (1, 2):
                norm = state[f"{ours}.layer_norm{number}.{kind}"]
                found[f"{theirs}.norm{number}.{kind}"] = norm
                part = f"mlp.fc{number}.{kind}"
                found[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    found |= _res_blocks(state, "text_model", "text.transformer")
    config = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": SIDE, "timm_model_name": "vit_base_patch32_siglip_256"}
        | {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
        | {"timm_heads": 2},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2}
        | {"layers": 2, "mlp_ratio": 2.0, "no_causal_mask": True, "proj_bias": True}
        | {"pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "hf_tokenizer_name": "timm/some"}
        | {"act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"}},
    }
    half = [0.5, 0.5, 0.5]
    preprocess: dict[str, object] = {
        "mean": half,
        "std": half,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    _save_open_clip(folder, found, config, made.folder, preprocess)
    bare = json.loads((folder / "tokenizer.json").read_text()) | {"normalizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    settings = folder / "tokenizer_config.json"
    kept = json.loads(settings.read_text()) | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    settings.write_text(json.dumps(kept))
    return Teacher(folder, model, made.processor, made.tokenize)


def _res_blocks(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """The layers of a tower in the names of OpenCLIP."""
    found = {}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(2):
        block, inner = f"{theirs}.resblocks.{layer}", f"{ours}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            found[f"{block}.attn.in_proj_{kind}"] = _joint(state, inner, kind)
            for their, our in names.items():
                found[f"{block}.{their}.{kind}"] = state[f"{inner}.{our}.{kind}"]
    return found


def _joint(state: dict[str, Tensor], layer: str, kind: str) -> Tensor:
    return torch.cat([state[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"])


def _save_open_clip(
    folder: Path,
    state: dict[str, Tensor],
    config: dict[str, object],
    tokenizer: Path,
    preprocess: dict[str, object] | None = None,
) -> None:
    folder.mkdir()
    whole = {name: value.contiguous() for name, value in state.items()}
    save_file(whole, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)


def sentence_transformers(folder: Path) -> Teacher:
    """A CLIP as the first module of a sentence-transformers model."""
    made = clip(folder / "0_CLIPModel")
    first = {"idx": 0, "name": "0", "path": "0_CLIPModel"}
    first["type"] = "sentence_transformers.models.CLIPModel"
    (folder / "modules.json").write_text(json.dumps([first]))
    return replace(made, folder=folder)


def lora(folder: Path) -> Teacher:
    """A CLIP with an adapter of peft, which is not merged where it is the reference."""
    from peft import LoraConfig, get_peft_model

    made = clip(folder.with_name("base"))
    kept = CLIPModel.from_pretrained(made.folder)
    names = ["q_proj", "v_proj", "fc1", "visual_projection"]
    adapted: Any = get_peft_model(kept, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    spread(adapted, seed=1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" not in name:
                own = name.removeprefix("base_model.model.").replace(".base_layer", "")
                weight.copy_(made.model.get_parameter(own))
    adapted.eval().save_pretrained(folder)
    return Teacher(folder, adapted, made.processor, made.tokenize)


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
        siglip_2_naflex,
        open_clip,
        open_clip_siglip,
        sentence_transformers,
        lora,
        vit_and_bert,
        dinov2_and_clip,
        convnext_and_roberta,
    )
}
# Of these, what is loaded is of a class that another one has already.
OTHER_LAYOUTS = {
    "siglip_2_naflex",
    "open_clip",
    "open_clip_siglip",
    "sentence_transformers",
    "lora",
}
ARCHITECTURES = sorted(FAMILIES.keys() - OTHER_LAYOUTS)
