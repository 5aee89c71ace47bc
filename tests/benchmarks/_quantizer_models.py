"""Towers that are quantized: the built-in student, the built-in teacher grown, and outliers in it.

Towers whose weights mean something are grown from the built-in teacher (64 px, width 256, 8
layers). Its width is repeated, each copy with its own weights that add up to the teacher's
(Net2Net, Chen et al. 2016): exact. Some layers are done in two half steps, the grid of positions is
interpolated, and the patches' weights are spread over more pixels (FlexiViT, Beyer et al. 2023):
close. A few minutes of distillation then bring the tower nearer to the teacher, and the copies
apart. What int8 loses of such a tower is real; but it is no CLIP trained on photographs, and has
none of the channels that are many times larger than the others: `plant_outliers` gives it some.
"""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _processes import BUILD, install_once
from onnx import GraphProto, numpy_helper
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.export.demo.demo import KEPT_BUNDLE
from edgeclip.export.graph.graph_io import load_graph
from edgeclip.runtime.bundle.bundle import Bundle
from edgeclip.runtime.bundle.files import tower_path
from edgeclip.runtime.spec import ImageSpec, Tower

WORK = BUILD / "quantizers"
_SIZE = 224  # pixels
_MIX = 0.5  # spread of a copy's weights about their share, in standard deviations of that
_BATCH, _RATE = 16, 1e-4  # of the distillation
_OUTLIERS, _FACTORS = 0.01, (32.0, 128.0)  # share of a norm's channels, and times as large
_VALUES_FACTOR = 64.0
_PROJECTIONS: tuple[tuple[Tower, str], ...] = (("image", "visual"), ("text", "text"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What the teacher's image tower grows to: so many times as wide, and of which layers."""

    name: str
    width: int
    layers: tuple[int, ...]
    patch: int
    steps: int


VIT_8M = Growth(name="vit_8m", width=1, layers=(0, 1, 2, 3, 4, 5, 6, 6, 7, 7), patch=16, steps=100)
VIT_B32 = Growth(
    name="vit_b32", width=3, layers=(0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7), patch=32, steps=60
)


def grown(growth: Growth, folder: Path = WORK) -> DualEncoder:
    """Return a grown tower beside the teacher's text tower; made once, then kept in `folder`."""
    target = folder / growth.name

    def grow() -> None:
        teacher = DualEncoder.load(BUILT_IN_TEACHER)
        dual = _grow(teacher, growth)
        if growth.steps:
            _learn(dual, teacher, growth)
        dual.save(target / "model")

    install_once(target, str(growth), grow)
    return DualEncoder.load(target / "model")


def _grow(teacher: DualEncoder, growth: Growth) -> DualEncoder:
    """Return the teacher with a larger image tower that has learnt nothing yet."""
    config: Any = copy.deepcopy(teacher.model.config)
    vision = config.vision_config
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(vision, name, growth.width * getattr(vision, name))
    vision.num_hidden_layers = len(growth.layers)
    vision.image_size, vision.patch_size = _SIZE, growth.patch
    model = CLIPModel(config)
    model.load_state_dict(dict(_weights(model, teacher.model.state_dict(), growth)))
    old = teacher.image_spec
    spec = ImageSpec(size=_SIZE, resize=_SIZE, mean=old.mean, std=old.std)
    return DualEncoder(model.eval(), spec, teacher.tokenizer, space=teacher.space)


def _learn(dual: DualEncoder, teacher: DualEncoder, growth: Growth) -> None:
    """Distil the image tower from the teacher, who looks at the same pictures at 64 px."""
    model: Any = dual.model
    for part in (model.text_model, model.text_projection, dual.logit_scale):
        part.requires_grad_(False)
    source = EmojiSource("train", growth.steps * _BATCH, size=_SIZE)
    settings = TrainSettings(
        steps=growth.steps,
        batch_size=_BATCH,
        learning_rate=_RATE,
        warmup_steps=max(1, growth.steps // 10),
        checkpoint_seconds=1e9,  # none
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(teacher, source, Path(folder) / "cache")
        out = Path(folder) / "run"
        distill(dual, cache, source, loss_weights=LossWeights(), settings=settings, out=out)


def _weights(
    model: CLIPModel, teacher: dict[str, Tensor], growth: Growth
) -> Iterator[tuple[str, Tensor]]:
    draw, layers = torch.Generator().manual_seed(0), growth.layers
    for name in model.state_dict():
        before, found, rest = name.partition("vision_model.encoder.layers.")
        origin, share = name, 1.0
        if found:
            number, _, tail = rest.partition(".")
            layer = layers[int(number)]
            origin = f"{before}{found}{layer}.{tail}"
            if tail.startswith(("self_attn.out_proj", "mlp.fc2")):
                share = 1 / layers.count(layer)  # what is done twice adds half each time
        weight = share * teacher[origin] if share != 1 else teacher[origin]
        if name.startswith("vision_model.") or name == "visual_projection.weight":
            weight = _larger(name, weight, growth, draw)
        yield name, weight


def _larger(name: str, weight: Tensor, growth: Growth, draw: torch.Generator) -> Tensor:
    """Return a weight of the image tower as wide as it must be."""
    times = growth.width
    if name.endswith("patch_embedding.weight"):  # [width, 3, side, side]
        spread = growth.patch // weight.shape[-1]
        pixels = weight.repeat_interleave(spread, 2).repeat_interleave(spread, 3) / spread**2
        return pixels.repeat(times, 1, 1, 1)
    if name.endswith("position_embedding.weight"):  # [1 + side squared, width]
        old, side = round((len(weight) - 1) ** 0.5), _SIZE // growth.patch
        grid = weight[1:].T.reshape(1, -1, old, old)  # without the class token
        grid = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic")
        return torch.cat([weight[:1], grid.flatten(2)[0].T]).repeat(1, times)
    if weight.ndim == 1:
        return weight.repeat(times)
    if name != "visual_projection.weight":
        weight = weight.repeat(times, 1)
    if times == 1:
        return weight
    # [out, width] -> [out, times x width]: each copy of an input has a weight of its own.
    spread_of = _MIX * float(weight.std())
    noise = spread_of * torch.randn((times, *weight.shape), generator=draw)
    parts = (weight + noise - noise.mean(dim=0)) / times
    return torch.cat(list(parts), dim=1)


def plant_outliers(dual: DualEncoder) -> DualEncoder:
    """Return a copy that computes the same, with large channels behind each of its LayerNorms.

    Such channels of trained ViTs vary severely (RepQ-ViT, Li et al. 2023; FQ-ViT, Lin et al. 2022);
    how many become how large here, and the weights behind them smaller, is this benchmark's choice.
    """
    planted, draw, ends = copy.deepcopy(dual), np.random.default_rng(0), np.log(_FACTORS)
    model: Any = planted.model
    for layer in model.vision_model.encoder.layers:
        attention = layer.self_attn
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        for norm, behind in ((layer.layer_norm1, readers), (layer.layer_norm2, (layer.mlp.fc1,))):
            _enlarge(norm, behind, draw, lambda: float(np.exp(draw.uniform(*ends))))
    return planted


def plant_values(dual: DualEncoder) -> DualEncoder:
    """The same with channels of each attention's values, which the projection behind undoes."""
    planted, draw = copy.deepcopy(dual), np.random.default_rng(1)
    model: Any = planted.model
    for layer in model.vision_model.encoder.layers:
        attention = layer.self_attn
        _enlarge(attention.v_proj, (attention.out_proj,), draw, lambda: _VALUES_FACTOR)
    return planted


@torch.no_grad()
def _enlarge(
    source: Any, readers: tuple[Any, ...], draw: np.random.Generator, factor: Callable[[], float]
) -> None:
    count = len(source.weight)
    for channel in draw.choice(count, max(1, round(_OUTLIERS * count)), replace=False):
        times = factor()
        source.weight[channel] *= times
        source.bias[channel] *= times
        for reader in readers:
            reader.weight[:, channel] /= times


def kept_student() -> DualEncoder:
    """Return the student whose bundle is kept, its weights read back from the bundle's graphs."""
    manifest = Bundle.open(KEPT_BUNDLE).manifest
    weights = {"logit_scale": torch.tensor(math.log(manifest.spec.logit_scale))}
    for tower, name in _PROJECTIONS:
        found = dict(_named(load_graph(KEPT_BUNDLE / tower_path(tower, "fp32")).graph))
        weights[f"{name}_projection.weight"] = found.pop("projection.weight")
        weights |= {name: value for name, value in found.items() if "." in name}
    model = CLIPModel(CLIPConfig.from_pretrained(KEPT_BUNDLE))
    wanted = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in weights.items() if name in wanted})
    tokenizer: Any = AutoTokenizer.from_pretrained(KEPT_BUNDLE)
    return DualEncoder(model.eval(), manifest.spec.image, tokenizer, space=manifest.space)


def _named(graph: GraphProto) -> Iterator[tuple[str, Tensor]]:
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for name, value in constants.items():
        yield name, torch.from_numpy(value.copy())
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        biases = [name for name in node.input if name.endswith(".bias") and name in constants]
        made = [products[name] for name in node.input if name in products]
        # Weights of products are transposed, and the bias that is added right behind has the name.
        if node.op_type == "Add" and biases and made:
            name = f"{biases[0].removesuffix('.bias')}.weight"
            yield name, torch.from_numpy(constants[made[0].input[1]].T.copy())
