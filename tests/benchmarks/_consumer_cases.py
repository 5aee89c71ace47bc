"""What every consumer is given: models, pictures, captions, and what EdgeCLIP makes of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _consumer_models import convnext_bert, openai_layout
from numpy.typing import NDArray

from edgeclip.compress.data.sources import EmojiSource
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.export.graph.to_onnx import export_towers
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.device.device_profile import load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.inputs.preprocess import preprocess_batch
from edgeclip.runtime.spec import ImageSpec

TEACHER = Path(__file__).parents[2] / "compress" / "emoji_teacher"
_SIZES = ((240, 240), (240, 180), (150, 240), (64, 64), (48, 48), (37, 29))  # px, wide and high
_AWKWARD = ("RED Apple", "café, 3 stars!", "two  spaces and\ta tab", "", "☕ über 東京", "a-b_c's")


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One model, its inputs in `folder`, and the embeddings that EdgeCLIP's runtime gives.

    `images` and `texts` are float32 [N, dim] by kind of input, `pixels` float32
    [N, 3, size, size] likewise; `torch` is what the model gave before it was exported, by tower.
    """

    folder: Path
    spec: ImageSpec
    ids: list[list[int]]
    pixels: dict[str, FloatArray]
    images: dict[str, FloatArray]
    texts: dict[str, FloatArray]
    torch: dict[str, FloatArray]

    def wanted(self, tower: str, given: str) -> FloatArray:
        """The embeddings that a consumer's are held against."""
        return self.images[given] if tower == "image" else self.texts[given]


def write_cases(root: Path) -> Iterator[Case]:
    """Export each model and write its inputs: `root`/NAME/model, given.json and pictures."""
    makers: dict[str, Callable[[], DualEncoder]] = {
        "emoji-teacher": lambda: DualEncoder.load(TEACHER),
        "openai-layout": openai_layout,
        "convnext-bert": convnext_bert,
    }
    for name, make in makers.items():
        yield _write_case(make(), root / name)


def _write_case(dual: DualEncoder, folder: Path) -> Case:
    model = folder / "model"
    model.mkdir(parents=True)
    paths = export_towers(dual, model)
    dual.save_settings(model)
    spec = dual.image_spec
    images = {
        "own": _pictures(folder, "any", _SIZES),
        "own, no resizing": _pictures(folder, "fit", 3 * ((spec.resize, spec.resize),)),
    }
    captions = {"own": _captions(6), "too long": [" and ".join(_captions(12))]}
    pixels = {
        kind: preprocess_batch([folder / name for name in names], spec)
        for kind, names in images.items()
    }
    ids = {kind: dual.text_tokenizer.encode(some, truncate=True) for kind, some in captions.items()}
    given = {
        "images": images,
        "captions": captions,
        "size": spec.size,
        "pixel_values": pixels["own"].ravel().tolist(),
        "input_ids": ids["own"].tolist(),
    }
    (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
    with torch.inference_mode():
        by_torch = {
            "image": dual.embed_image(torch.from_numpy(pixels["own"])).numpy(),
            "text": dual.embed_text(torch.from_numpy(ids["own"])).numpy(),
        }
    return Case(
        folder=folder,
        spec=spec,
        ids=ids["own"].tolist(),
        pixels=pixels,
        images=_embed(paths.image, "pixel_values", pixels),
        texts=_embed(paths.text, "input_ids", ids),
        torch=by_torch,
    )


def _embed(path: Path, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, FloatArray]:
    """What EdgeCLIP's runtime gives for each kind of input; `same` is what was made of `own`."""
    engine = open_engine(path, device=load_device("this-machine"))
    found = {}
    for kind, values in inputs.items():
        (found[kind],) = engine.run({name: values}).values()
    return {**found, "same": found["own"]}


def _pictures(folder: Path, stem: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Scenes of the given widths and heights, as PNG files."""
    source = EmojiSource("test", len(sizes), size=240)
    names = []
    for index, (width, height) in enumerate(sizes):
        side = max(width, height)
        scene = source.picture(index, size=side)
        left, upper = (side - width) // 2, (side - height) // 2
        names.append(f"{stem}{index}.png")
        scene.crop((left, upper, left + width, upper + height)).save(folder / names[-1])
    return names


def _captions(count: int) -> list[str]:
    source = EmojiSource("test", count, size=64)
    return [*(source.caption(index) for index in range(count)), *_AWKWARD]
