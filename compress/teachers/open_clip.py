"""Read a checkpoint of OpenCLIP as a model of transformers, without importing open_clip.

A CLIP with a ViT becomes a `CLIPModel`, a SigLIP (whose image tower is timm's) a `SiglipModel`.
Source of the layout: https://github.com/mlfoundations/open_clip, `model.py`, `transformer.py` and
`push_to_hf_hub.py`; of timm's names: https://github.com/huggingface/pytorch-image-models.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from edgeclip.compress.teachers.model_folder import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    check_tokenizer_files,
    check_weight_file,
    read_json,
)
from edgeclip.compress.teachers.read_tokenizer import as_generic, canonicalise, read_tokenizer
from edgeclip.runtime.errors import ConfigError, first_line
from edgeclip.runtime.inputs.preprocess import CLIP_MEAN, CLIP_STD
from edgeclip.runtime.spec import ImageSpec

# timm computes the activation of these towers by the tanh approximation, of its other SigLIPs
# exactly.
_TANH = (
    "vit_base_patch32_siglip_256",
    "vit_large_patch16_siglip_512",
    "vit_giantopt_patch16_siglip_256",
    "vit_giantopt_patch16_siglip_384",
)


def read_open_clip(
    folder: Path, source: str | Path
) -> tuple[PreTrainedModel, ImageSpec, PreTrainedTokenizerFast]:
    """Read weights, preprocessing and tokenizer of an OpenCLIP checkpoint, as float32.

    Args:
        folder: holds open_clip_config.json, weights and tokenizer files.
        source: how the user named it, for the messages.

    Raises:
        ConfigError: an architecture that cannot be read, or files that are missing or damaged.
    """
    settings = read_json(folder / OPEN_CLIP_CONFIG)
    given = _Settings(settings.get("model_cfg"), source)
    check_tokenizer_files(folder, source)
    state = _read_weights(folder, source)
    model: PreTrainedModel
    config: Any
    if given.is_siglip:
        config = _siglip_config(given, state)
        model, rules = SiglipModel(config), _SIGLIP
    else:
        config = _clip_config(given)
        model, rules = CLIPModel(config), _CLIP
    tokenizer = read_tokenizer(folder, source, config)
    clean = given.text.get("tokenizer_kwargs", {}).get("clean")
    is_cleaned = clean in ("canonicalize", "lower")
    if is_cleaned and canonicalise(tokenizer, lower=True, punctuation=clean == "lower"):
        tokenizer = as_generic(tokenizer)
    if given.is_siglip:
        tokenizer.model_max_length = config.text_config.max_position_embeddings
    else:
        config.text_config.eos_token_id = tokenizer.eos_token_id
        config.text_config.bos_token_id = tokenizer.bos_token_id
        model.text_model.eos_token_id = tokenizer.eos_token_id
    _load(model, dict(_renamed(state, rules)), source)
    return model, _image_spec(settings.get("preprocess_cfg", {}), given, source), tokenizer


class _Settings:
    """`model_cfg` of an OpenCLIP checkpoint, checked."""

    def __init__(self, config: object, source: str | Path) -> None:
        if not isinstance(config, Mapping):
            raise ConfigError(f"{source}: {OPEN_CLIP_CONFIG} has no model_cfg: download it again")
        self.vision: Mapping[str, Any] = config.get("vision_cfg", {})
        self.text: Mapping[str, Any] = config.get("text_cfg", {})
        self.dim = int(config.get("embed_dim", 0))
        timm = str(self.vision.get("timm_model_name") or "")
        self.is_siglip = "_siglip_" in timm and self.vision.get("timm_pool") == "map"
        self.timm = timm
        self.hidden_act = "quick_gelu" if config.get("quick_gelu") else "gelu"
        amiss = [*self._amiss()]
        if amiss:
            raise ConfigError(
                f"{source}: an OpenCLIP model with {', '.join(amiss)}, of which transformers has "
                "no counterpart here: only ViT towers of CLIP and SigLIP can be read; look for a "
                "version of it that was converted to transformers"
            )

    def _amiss(self) -> Iterator[str]:
        if self.timm and not self.is_siglip:
            yield f"the image tower {self.timm}"
        if not isinstance(self.vision.get("layers", 12), int):
            yield "a ResNet"
        if self.text.get("hf_model_name"):
            yield f"the text tower {self.text['hf_model_name']}"
        wanted = {"vision_cfg": _CLIP_VISION, "text_cfg": _CLIP_TEXT}
        if self.is_siglip:
            wanted = {"vision_cfg": _SIGLIP_VISION, "text_cfg": _SIGLIP_TEXT}
        for part, found in (("vision_cfg", self.vision), ("text_cfg", self.text)):
            for name, value in wanted[part].items():
                usual = (_CLIP_VISION | _CLIP_TEXT).get(name) if self.is_siglip else value
                if found.get(name, usual) != value:
                    yield f"{name} {found.get(name, usual)!r} in {part}"


# What transformers' classes compute. For CLIP, these are also what OpenCLIP takes for settings that
# a file leaves out.
_CLIP_VISION: dict[str, object] = {
    "pool_type": "tok",
    "no_ln_pre": False,
    "attentional_pool": False,
    "ls_init_value": None,
    "final_ln_after_pool": False,
}
_CLIP_TEXT: dict[str, object] = {
    "pool_type": "argmax",
    "no_causal_mask": False,
    "proj_bias": False,
    "embed_cls": False,
    "ls_init_value": None,
}
_SIGLIP_VISION: dict[str, object] = {"timm_proj": "none"}
_SIGLIP_TEXT = _CLIP_TEXT | {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}


def _clip_config(given: _Settings) -> CLIPConfig:
    vision, text = given.vision, given.text
    width, words = int(vision.get("width", 768)), int(text.get("width", 512))
    return CLIPConfig(
        projection_dim=given.dim,
        vision_config={
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": int(vision.get("layers", 12)),
            "num_attention_heads": width // int(vision.get("head_width", 64)),
            "image_size": _side(vision.get("image_size", 224)),
            "patch_size": _side(vision.get("patch_size", 16)),
            "hidden_act": _activation(given.hidden_act, vision),
            "layer_norm_eps": _epsilon(vision, 1e-5),
            "projection_dim": given.dim,
        },
        text_config=_text_config(given, words)
        | {"layer_norm_eps": _epsilon(text, 1e-5), "projection_dim": given.dim},
    )


def _text_config(given: _Settings, width: int) -> dict[str, Any]:
    text = given.text
    return {
        "vocab_size": int(text.get("vocab_size", 49408)),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": int(text.get("layers", 12)),
        "num_attention_heads": int(text.get("heads", 8)),
        "max_position_embeddings": int(text.get("context_length", 77)),
        "hidden_act": _activation(given.hidden_act, text),
    }


def _siglip_config(given: _Settings, state: Mapping[str, Tensor]) -> SiglipConfig:
    """Read the sizes of timm's tower from its weights: the config only names it."""
    try:
        patches = state["visual.trunk.patch_embed.proj.weight"]
        hidden = len(state["visual.trunk.blocks.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ConfigError(f"the weights have no {error.args[0]}, so they are no SigLIP's") from None
    width = len(patches)
    layers = {name.split(".")[3] for name in state if name.startswith("visual.trunk.blocks.")}
    known = {768: 12, 1024: 16, 1152: 16, 1536: 16}  # heads: timm's names do not tell them
    heads = given.vision.get("timm_heads") or known.get(width)
    if heads is None:
        raise ConfigError(
            f"a SigLIP image tower of width {width} is none of timm's, so its number of attention "
            "heads is unknown: write it as timm_heads into vision_cfg of open_clip_config.json"
        )
    words = int(given.text.get("width", 512))
    return SiglipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": len(layers),
            "num_attention_heads": int(heads),
            "image_size": _side(given.vision.get("image_size", 224)),
            "patch_size": int(patches.shape[-1]),
            "hidden_act": "gelu_pytorch_tanh" if given.timm in _TANH else "gelu",
            "layer_norm_eps": 1e-6,
        },
        text_config=_text_config(given, words)
        | {"layer_norm_eps": _epsilon(given.text, 1e-5), "projection_size": given.dim},
    )


def _side(value: object) -> int:
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ConfigError(f"{OPEN_CLIP_CONFIG} has {value!r} where one side of a square is needed")
    return value


def _activation(usual: str, part: Mapping[str, Any]) -> str:
    is_tanh = (part.get("act_kwargs") or {}).get("approximate") == "tanh"
    return "gelu_pytorch_tanh" if is_tanh else usual


def _epsilon(part: Mapping[str, Any], usual: float) -> float:
    return float((part.get("norm_kwargs") or {}).get("eps", usual))


def _image_spec(config: object, given: _Settings, source: str | Path) -> ImageSpec:
    found: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
    mode, resample = found.get("resize_mode", "shortest"), found.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
        raise ConfigError(
            f"{source}: preprocess_cfg has resize_mode {mode!r} and interpolation {resample!r}, "
            "which cannot be carried to a device: only shortest or squash, bicubic or bilinear can"
        )
    size = _side(found.get("size", given.vision.get("image_size", 224)))
    mean, std = found.get("mean") or CLIP_MEAN, found.get("std") or CLIP_STD
    return ImageSpec(
        size=size,
        resize=size,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        resample="bicubic" if resample == "bicubic" else "bilinear",
        stretch=mode == "squash",
    )


def _read_weights(folder: Path, source: str | Path) -> dict[str, Tensor]:
    """Read safetensors, or a file of torch that holds nothing but tensors."""
    path = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ConfigError(
            f"{source} has no weights: neither of {', '.join(OPEN_CLIP_WEIGHTS)} is there; "
            "download it whole"
        )
    check_weight_file(path, source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except Exception as error:  # of many kinds
        raise ConfigError(
            f"{path} cannot be read as tensors alone ({first_line(error)[:200]}): bring the "
            "safetensors of the same model"
        ) from error
    return {str(name).removeprefix("module."): value.float() for name, value in state.items()}


@dataclass(frozen=True, slots=True)
class _Rule:
    """Weights whose name matches `pattern` become `name`, changed by `change`."""

    pattern: str
    name: str
    change: Callable[[Tensor], Tensor] = lambda value: value


def _transposed(value: Tensor) -> Tensor:
    return value.T


def _blocks(before: str, after: str) -> tuple[_Rule, ...]:
    """The rules of a stack of OpenCLIP's residual attention blocks."""
    start, layer = rf"{before}resblocks\.(\d+)\.", rf"{after}.encoder.layers.\1."
    names = {
        r"ln_(\d)\.(\w+)": r"layer_norm\2.\3",
        r"attn\.out_proj\.(\w+)": r"self_attn.out_proj.\2",
        r"mlp\.c_fc\.(\w+)": r"mlp.fc1.\2",
        r"mlp\.c_proj\.(\w+)": r"mlp.fc2.\2",
    }
    joint = _Rule(rf"{start}attn\.in_proj_(\w+)", rf"{layer}self_attn.QKV_proj.\2")
    return (joint, *(_Rule(start + given, layer + made) for given, made in names.items()))


_TEXT = (
    *_blocks(r"(?:text\.)?transformer\.", "text_model"),
    _Rule(r"(?:text\.)?token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    _Rule(r"(?:text\.)?positional_embedding", "text_model.embeddings.position_embedding.weight"),
    _Rule(r"(?:text\.)?ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    _Rule(r"logit_(scale|bias)", r"logit_\1"),
)
_CLIP = (
    *_TEXT,
    *_blocks(r"visual\.transformer\.", "vision_model"),
    _Rule(r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    _Rule(r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    _Rule(r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    _Rule(r"visual\.ln_pre\.(\w+)", r"vision_model.pre_layrnorm.\1"),
    _Rule(r"visual\.ln_post\.(\w+)", r"vision_model.post_layernorm.\1"),
    _Rule(r"visual\.proj", "visual_projection.weight", _transposed),
    _Rule(r"(?:text\.)?text_projection", "text_projection.weight", _transposed),
    _Rule(r"(?:text\.)?text_projection\.weight", "text_projection.weight"),
)
_SIGLIP = (
    *_TEXT,
    _Rule(r"text\.text_projection\.(\w+)", r"text_model.head.\1"),
    _Rule(
        r"visual\.trunk\.patch_embed\.proj\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"
    ),
    _Rule(
        r"visual\.trunk\.pos_embed",
        "vision_model.embeddings.position_embedding.weight",
        lambda value: value.flatten(0, -2),
    ),
    _Rule(r"visual\.trunk\.norm\.(\w+)", r"vision_model.post_layernorm.\1"),
    _Rule(
        r"visual\.trunk\.blocks\.(\d+)\.norm(\d)\.(\w+)",
        r"vision_model.encoder.layers.\1.layer_norm\2.\3",
    ),
    _Rule(
        r"visual\.trunk\.blocks\.(\d+)\.attn\.qkv\.(\w+)",
        r"vision_model.encoder.layers.\1.self_attn.QKV_proj.\2",
    ),
    _Rule(
        r"visual\.trunk\.blocks\.(\d+)\.attn\.proj\.(\w+)",
        r"vision_model.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    _Rule(r"visual\.trunk\.blocks\.(\d+)\.(mlp\.fc\d\.\w+)", r"vision_model.encoder.layers.\1.\2"),
    _Rule(r"visual\.trunk\.attn_pool\.latent", "vision_model.head.probe"),
    _Rule(r"visual\.trunk\.attn_pool\.(q|kv)\.(\w+)", r"vision_model.head.attention.\1_\2"),
    _Rule(r"visual\.trunk\.attn_pool\.proj\.(\w+)", r"vision_model.head.attention.out_proj.\1"),
    _Rule(r"visual\.trunk\.attn_pool\.norm\.(\w+)", r"vision_model.head.layernorm.\1"),
    _Rule(r"visual\.trunk\.attn_pool\.(mlp\.fc\d\.\w+)", r"vision_model.head.\1"),
)
_IGNORED = re.compile(r"attn_mask$|num_batches_tracked$")  # buffers


def _renamed(state: Mapping[str, Tensor], rules: tuple[_Rule, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by transformers' names; what no rule knows keeps its name."""
    halves: dict[str, Tensor] = {}
    for name, value in state.items():
        if _IGNORED.search(name):
            continue
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            yield name, value
            continue
        made = re.sub(rule.pattern, rule.name, name)
        if "QKV" in made:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                yield made.replace("QKV", letter), part.clone()
        elif made.startswith("vision_model.head.attention.") and "out_proj" not in made:
            halves[made.removeprefix("vision_model.head.attention.")] = value
        else:
            yield made, rule.change(value).contiguous()
    for kind in ("weight", "bias"):
        if f"q_{kind}" in halves and f"kv_{kind}" in halves:
            joint = torch.cat([halves[f"q_{kind}"], halves[f"kv_{kind}"]])
            yield f"vision_model.head.attention.in_proj_{kind}", joint


def _load(model: PreTrainedModel, state: dict[str, Tensor], source: str | Path) -> None:
    """Fill all weights of a model; nothing may be missing or left over."""
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in wanted:
            state[name] = state[name].reshape(wanted[name].shape)
    amiss = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "of another size": sorted(
            name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape
        ),
    }
    problems = [f"{len(names)} {how} (such as {names[0]})" for how, names in amiss.items() if names]
    if problems:
        raise ConfigError(
            f"{source}: the weights do not fit {OPEN_CLIP_CONFIG}: {', '.join(problems)}; both "
            "files must come from one model"
        )
    model.load_state_dict(state)
