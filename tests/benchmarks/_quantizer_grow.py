"""Towers of any size whose weights mean something, where no pretrained ones can be downloaded.

The built-in teacher (64 px, width 256, 8 layers) is grown. Its width is repeated, each copy
with its own weights that add up to the teacher's (Net2Net, Chen et al. 2016): exact. Some layers
are done in two half steps, the grid of positions is interpolated, and the patches' weights are
spread over more pixels, as if the picture had been averaged down to the teacher's (FlexiViT,
Beyer et al. 2023): close. A few minutes of distillation from the teacher's cached embeddings
then bring the tower nearer to it, and the copies apart.

Such a tower finds the captions of unseen scenes as the teacher does, so what int8 loses of
that is real. It is no CLIP trained on photographs: its copies are alike, and it has none of
the channels that are many times larger than the others. `plant_outliers` gives it some.
"""

import copy
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bars import command
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from edgeclip.compress.built_in import BUILT_IN_TEACHER
from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.teachers.teacher_cache import build_cache
from edgeclip.compress.train.distill import distill
from edgeclip.compress.train.losses import LossWeights
from edgeclip.compress.train.train_loop import TrainSettings
from edgeclip.runtime.spec import ImageSpec

BUILD = Path(__file__).parents[2] / "build" / "quantizers"
SIZE = 224  # pixels
_MIX = 0.5  # spread of a copy's weights about their share, in standard deviations of that
_OUTLIERS, _FACTORS = 0.01, (32.0, 128.0)  # share of a norm's channels, and times as large
_NO_CHECKPOINT = 1e9  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What the teacher's image tower grows to, and how long it learns then.

    Attributes:
        name: a short one.
        width: how many times as wide.
        layers: the teacher's layer that each layer is made of.
        patch: side in pixels, a multiple of the teacher's 8.
        steps, batch, rate: of the distillation.
    """

    name: str
    width: int
    layers: tuple[int, ...]
    patch: int
    steps: int
    batch: int
    rate: float


VIT_8M = Growth(
    name="vit_8m",
    width=1,
    layers=(0, 1, 2, 3, 4, 5, 6, 6, 7, 7),
    patch=16,
    steps=100,
    batch=16,
    rate=1e-4,
)
VIT_B32 = Growth(
    name="vit_b32",
    width=3,
    layers=(0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7),
    patch=32,
    steps=60,
    batch=16,
    rate=1e-4,
)


def grown(growth: Growth, folder: Path) -> DualEncoder:
    """Return a grown tower beside the teacher's text tower; made once, then kept in `folder`.

    `NAME.json` beside the model says by which command it was made and how long that took.
    """
    target, note = folder / growth.name, folder / f"{growth.name}.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8"))["growth"] == _plain(growth):
        return DualEncoder.load(target)
    print(f"growing {growth.name} from the built-in teacher, into {target}", flush=True)
    began = time.monotonic()
    teacher = DualEncoder.load(BUILT_IN_TEACHER)
    dual = grow(teacher, growth)
    if growth.steps:
        _learn(dual, teacher, growth)
    folder.mkdir(parents=True, exist_ok=True)
    dual.save(target)
    seconds = round(time.monotonic() - began)
    record = {"growth": _plain(growth), "command": command(), "seconds": seconds}
    note.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return DualEncoder.load(target)


def grow(teacher: DualEncoder, growth: Growth) -> DualEncoder:
    """Return the teacher with a larger image tower that has learnt nothing yet."""
    config = copy.deepcopy(teacher.model.config)
    assert isinstance(config, CLIPConfig)
    vision = config.vision_config
    assert isinstance(vision, CLIPVisionConfig)
    vision.hidden_size *= growth.width
    vision.intermediate_size *= growth.width
    vision.num_attention_heads *= growth.width
    vision.num_hidden_layers = len(growth.layers)
    vision.image_size, vision.patch_size = SIZE, growth.patch
    model = CLIPModel(config)
    model.load_state_dict(dict(_weights(model, teacher.model.state_dict(), growth)))
    old = teacher.image_spec
    spec = ImageSpec(size=SIZE, resize=SIZE, mean=old.mean, std=old.std)
    return DualEncoder(model.eval(), spec, teacher.tokenizer, space=teacher.space)


def plant_outliers(dual: DualEncoder, *, seed: int = 0) -> DualEncoder:
    """Return a copy that computes the same, with large channels behind each of its LayerNorms.

    Channels behind the LayerNorms of trained ViTs vary severely (RepQ-ViT, Li et al. 2023, ICCV);
    before them, the ranges of some exceed 40 times the median (FQ-ViT, Lin et al. 2022, IJCAI).
    How many become how large here is this benchmark's choice: one in a hundred, 32 to 128 times,
    and the weights behind it are divided by as much.
    """
    planted = copy.deepcopy(dual)
    draw = np.random.default_rng(seed)
    model: Any = planted.model
    with torch.no_grad():
        for layer in model.vision_model.encoder.layers:
            attention = layer.self_attn
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            _plant(layer.layer_norm1, readers, draw)
            _plant(layer.layer_norm2, (layer.mlp.fc1,), draw)
    return planted


def _plant(norm: Any, readers: tuple[Any, ...], draw: np.random.Generator) -> None:
    count = len(norm.weight)
    low, high = np.log(_FACTORS)
    for channel in draw.choice(count, max(1, round(_OUTLIERS * count)), replace=False):
        factor = float(np.exp(draw.uniform(low, high)))
        norm.weight[channel] *= factor
        norm.bias[channel] *= factor
        for reader in readers:
            reader.weight[:, channel] /= factor


def _plain(growth: Growth) -> Any:
    return json.loads(json.dumps(asdict(growth)))


def _learn(dual: DualEncoder, teacher: DualEncoder, growth: Growth) -> None:
    """Distil the image tower from the teacher, who looks at the same pictures at 64 px."""
    model: Any = dual.model
    for part in (model.text_model, model.text_projection, dual.logit_scale):
        part.requires_grad_(False)
    source = EmojiSource("train", growth.steps * growth.batch, size=SIZE)
    settings = TrainSettings(
        steps=growth.steps,
        batch_size=growth.batch,
        learning_rate=growth.rate,
        warmup_steps=max(1, growth.steps // 10),
        checkpoint_seconds=_NO_CHECKPOINT,
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(teacher, source, Path(folder) / "cache")
        out = Path(folder) / "run"
        distill(dual, cache, source, loss_weights=LossWeights(), settings=settings, out=out)


def _weights(
    model: CLIPModel, teacher: dict[str, Tensor], growth: Growth
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of the grown model."""
    draw = torch.Generator().manual_seed(0)
    for name in model.state_dict():
        origin, share = _origin(name, growth.layers)
        weight = share * teacher[origin] if share != 1 else teacher[origin]
        if name.startswith("vision_model.") or name == "visual_projection.weight":
            weight = _larger(name, weight, growth, draw)
        yield name, weight


def _origin(name: str, layers: tuple[int, ...]) -> tuple[str, float]:
    """Of which weight of the teacher one is made, and how much of that it takes.

    A layer that is done twice adds half of what it did to the residual stream.
    """
    before, found, rest = name.partition("vision_model.encoder.layers.")
    if not found:
        return name, 1.0
    number, _, tail = rest.partition(".")
    layer = layers[int(number)]
    adds = tail.startswith(("self_attn.out_proj", "mlp.fc2"))
    return f"{before}{found}{layer}.{tail}", 1 / layers.count(layer) if adds else 1.0


def _larger(name: str, weight: Tensor, growth: Growth, draw: torch.Generator) -> Tensor:
    """Return a weight of the image tower as wide as it must be."""
    times = growth.width
    if name.endswith("patch_embedding.weight"):  # [width, 3, side, side]
        spread = growth.patch // weight.shape[-1]
        pixels = weight.repeat_interleave(spread, 2).repeat_interleave(spread, 3) / spread**2
        return pixels.repeat(times, 1, 1, 1)
    if name.endswith("position_embedding.weight"):
        return _interpolated(weight, SIZE // growth.patch).repeat(1, times)
    if weight.ndim == 1:
        return weight.repeat(times)
    if name != "visual_projection.weight":
        weight = weight.repeat(times, 1)
    return _shared_out(weight, times, draw)


def _shared_out(weight: Tensor, times: int, draw: torch.Generator) -> Tensor:
    """[out, width] -> [out, times x width]: each copy of an input has a weight of its own."""
    if times == 1:
        return weight
    spread = _MIX * float(weight.std())
    noise = spread * torch.randn((times, *weight.shape), generator=draw)
    parts = (weight + noise - noise.mean(dim=0)) / times
    return torch.cat(list(parts), dim=1)


def _interpolated(positions: Tensor, side: int) -> Tensor:
    """[1 + old side squared, width] -> [1 + side squared, width]; the class token stays."""
    old = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].T.reshape(1, -1, old, old)
    found = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic")
    return torch.cat([positions[:1], found.flatten(2)[0].T])


if __name__ == "__main__":
    for each in (VIT_8M, VIT_B32):
        grown(each, BUILD)
