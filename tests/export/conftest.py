"""Tiny students with random weights, a tiny source of pairs, and what is exported of them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from edgeclip.compress.data.emoji_scenes import Split
from edgeclip.compress.data.sources import Pair
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.compress.train.pretrain import train_tokenizer
from edgeclip.export.bundle.build_bundle import BuiltBundle, build_bundle
from edgeclip.export.bundle.bundle_plan import BundlePlan, Origin
from edgeclip.export.gates.gates import DEFAULT_BOUNDS
from edgeclip.export.graph.to_onnx import (
    TowerPaths,
    export_towers,
)
from edgeclip.runtime.bundle.index import LabelSet
from edgeclip.runtime.device.device_profile import DeviceProfile
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.spec import ImageSpec
from tests.captures import captured_once, captures  # noqa: F401 (fixtures)
from tests.compress.conftest import one_thread  # noqa: F401 (a fixture)
from tests.conftest import QUICK

os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that tests start

CONTEXT = 24
SIZE = 32
DIM = 16
COLOURS = ("red", "green", "blue", "white", "black", "pink", "teal", "brown")

# Weights without training tell few pictures apart, so that rounding alone can cost a rank,
# and with 40 pairs a rank is more than a point.
LOOSE = {
    name: replace(bounds, r1_loss=25.0, zero_shot_loss=50.0)
    for name, bounds in DEFAULT_BOUNDS.items()
}


@dataclass(frozen=True, slots=True)
class Blobs:
    """Two random rectangles on a ground; the caption says their colours, or more."""

    count: int
    seed: int = 0
    has_captions: bool = True
    split: Split = "calibration"

    @property
    def name(self) -> str:
        return f"{self.count} blobs"

    @property
    def identity(self) -> str:
        return f"blobs:{self.count}:{self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        draw = np.random.default_rng((self.seed, index))
        pixels = np.full((40, 48, 3), draw.integers(0, 255, 3), dtype=np.uint8)
        for _ in range(2):
            top, left = draw.integers(0, 30, 2)
            pixels[top : top + 12, left : left + 14] = draw.integers(0, 255, 3)
        return Pair(Image.fromarray(pixels), self.caption(index))

    def caption(self, index: int) -> str | None:
        draw = np.random.default_rng((self.seed, index, 1))
        words = draw.choice(COLOURS, size=1 + index % 5)
        return f"picture {index}: {' '.join(words)}" if self.has_captions else None

    def captions(self, index: int) -> tuple[str, ...]:
        return (str(self.caption(index)),) if self.has_captions else ()

    def content(self, index: int) -> str:
        return f"{self.seed:032x}{index:032x}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    texts = [f"picture {index}: {' '.join(COLOURS)}" for index in range(20)]
    return train_tokenizer(texts, vocab_size=300, context_length=CONTEXT)


def tiny_clip(*, legacy_eos: bool = False, layers: int = 2) -> DualEncoder:
    """A CLIP of width 32; with `legacy_eos` its config has the eos_token_id 2 of old files."""
    tokenizer = tiny_tokenizer()
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "projection_dim": DIM,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=DIM,
        vision_config={"image_size": SIZE, "patch_size": 8, **shape},
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": 2 if legacy_eos else tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **shape,
        },
    )
    return _dual(CLIPModel(config), tokenizer)


def tiny_convnext() -> DualEncoder:
    """A ConvNext beside a BERT: no part of it is CLIP's."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vision = ConvNextConfig(depths=[1, 1], hidden_sizes=[16, 32], num_stages=2, image_size=SIZE)
    vision.hidden_size = 32  # the projection reads its width there
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=DIM)
    model = VisionTextDualEncoderModel(
        config, vision_model=ConvNextModel(vision), text_model=BertModel(text)
    )
    return _dual(model, tokenizer)


def _dual(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> DualEncoder:
    """Wrap a model whose weights, norms and biases included, are all unlike each other."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 0:
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.add_(0.1 * noise)
    half = (0.5, 0.5, 0.5)
    image = ImageSpec(size=SIZE, resize=SIZE, mean=half, std=half)
    return DualEncoder(model.eval(), image, tokenizer)


@pytest.fixture(scope="session")
def blobs() -> Callable[..., Blobs]:
    """Make a source: `blobs(count, seed=0, has_captions=True)`."""
    return Blobs


@pytest.fixture(scope="session")
def clip() -> DualEncoder:
    return tiny_clip()


@pytest.fixture(scope="session")
def legacy_clip() -> DualEncoder:
    return tiny_clip(legacy_eos=True)


@pytest.fixture(scope="session")
def convnext() -> DualEncoder:
    return tiny_convnext()


@pytest.fixture(scope="session")
def clip_towers(clip: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> TowerPaths:
    return export_towers(clip, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def convnext_towers(convnext: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> TowerPaths:
    return export_towers(convnext, tmp_path_factory.mktemp("convnext"))


RunGraph = Callable[[Path, NDArray[Any]], dict[str, NDArray[Any]]]


@pytest.fixture
def run_graph(cpu_device: DeviceProfile) -> RunGraph:
    """Run an ONNX file on its one input, whatever that is called: `run_graph(path, values)`."""

    def run(path: Path, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        (given,) = onnx.load(path, load_external_data=False).graph.input
        return open_engine(path, device=cpu_device).run({given.name: values})

    return run


@pytest.fixture(scope="session")
def plan(clip: DualEncoder, cpu_device: DeviceProfile) -> BundlePlan:
    embeddings = np.eye(2, DIM, dtype=np.float32)
    letters = LabelSet(names=("a", "b"), embeddings=embeddings, space=clip.space)
    return BundlePlan(
        student=clip,
        calibration=Blobs(24, seed=1),
        test=Blobs(40),
        device=cpu_device,
        origin=Origin(
            name="tiny", teacher="none", student="random", command="pytest", licence="Apache-2.0"
        ),
        workload=QUICK,
        labels={"letters": letters},
        bounds=LOOSE,
        accept_undecided=True,  # of so few pairs
    )


@pytest.fixture(scope="session")
def fp32_plan(plan: BundlePlan) -> BundlePlan:
    """The least that makes a bundle."""
    return replace(plan, precisions=(), workload=None)


@pytest.fixture(scope="session")
def built(plan: BundlePlan, tmp_path_factory: pytest.TempPathFactory) -> BuiltBundle:
    """A bundle in all precisions; read it, do not alter it."""
    return build_bundle(plan, Path(tmp_path_factory.mktemp("built")) / "bundle")


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """Pictures with captions in the subfolders test and calibration, eight in each."""
    for seed, split in enumerate(("test", "calibration")):
        folder = tmp_path / "pairs" / split
        folder.mkdir(parents=True)
        source = Blobs(8, seed)
        for index in range(len(source)):
            source[index].image.save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(str(source.caption(index)))
    return tmp_path / "pairs"
