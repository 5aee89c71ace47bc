"""Embed the pictures and captions of a source with ONNX graphs or with torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from edgeclip.compress.data.clusters import ClusterBy, find_clusters
from edgeclip.compress.data.sources import Source, first_without_caption
from edgeclip.compress.teachers.dual_encoder import DualEncoder
from edgeclip.runtime.arrays import FloatArray
from edgeclip.runtime.device.device_profile import THIS_MACHINE, DeviceProfile, load_device
from edgeclip.runtime.engines.engine import open_engine
from edgeclip.runtime.errors import ConfigError
from edgeclip.runtime.inputs.preprocess import crop_batch, normalise
from edgeclip.runtime.spec import OUTPUT_NAMES, ImageSpec, PixelForm, Precision, Tower
from edgeclip.runtime.stats.clusters import Clusters
from edgeclip.runtime.towers.tower_runner import in_batches, tower_feed

TOWERS: tuple[Tower, ...] = get_args(Tower)


@dataclass(frozen=True, slots=True)
class TowerGraph:
    """The ONNX file of a tower; `pixels` is an image tower's input form, None for a text tower."""

    tower: Tower
    precision: Precision
    path: Path
    pixels: PixelForm | None

    @property
    def subject(self) -> str:
        """The name in reports, such as "image int8"."""
        return f"{self.tower} {self.precision}"


T = TypeVar("T")
Embedder = Callable[[NDArray[Any]], FloatArray]
_BATCH = 32


@dataclass(frozen=True, slots=True, eq=False)
class PairEmbeddings:
    """Embeddings of N images and of all their captions: float32 [N, dim] and [M, dim].

    With one caption an image, image i belongs to text i.
    """

    image: FloatArray
    text: FloatArray

    def of(self, tower: Tower) -> FloatArray:
        """Return the embeddings of one tower."""
        return self.image if tower == "image" else self.text


def judging_device(device: DeviceProfile) -> DeviceProfile:
    """Return the profile to judge graphs on: the device if it is a CPU, else this machine.

    This machine then takes the batch sizes of the device, and computes int8 as exactly.
    """
    if device.engine == "onnxruntime-cpu":
        return device
    return replace(
        load_device(THIS_MACHINE),
        vnni=True,
        batch_min=device.batch_min,
        batch_best=device.batch_best,
        batch_max=device.batch_max,
    )


def graph_embedder(graph: TowerGraph, spec: ImageSpec, device: DeviceProfile) -> Embedder:
    """Return a function that embeds with an ONNX file, on the runtime's own engine.

    Raises:
        EngineError: the engine cannot load the file.
    """
    engine = open_engine(graph.path, device=device)
    wanted = OUTPUT_NAMES[graph.tower]

    def run(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return engine.run(tower_feed(values, graph.tower, graph.pixels, spec))

    return lambda values: in_batches(run, values, fixed_batch=device.static_batch)[wanted]


def torch_embedder(dual: DualEncoder, tower: Tower) -> Embedder:
    """Return a function that embeds with torch, in evaluation mode, on the model's device."""
    dual.eval()
    device = next(dual.parameters()).device
    embed = dual.embed_image if tower == "image" else dual.embed_text

    def run(values: NDArray[Any]) -> FloatArray:
        given = normalise(values, dual.image_spec) if tower == "image" else values
        with torch.inference_mode():
            embeddings: FloatArray = embed(torch.from_numpy(given).to(device)).cpu().numpy()
        return embeddings

    return run


def check_captions(source: Source, use: str) -> None:
    """Refuse a source that is empty or lacks captions; `use` names what needs them.

    Raises:
        ConfigError: the source is empty, or a picture has no caption; the message says how to give
            them.
    """
    if len(source) == 0 or not source.has_captions:
        raise ConfigError(
            f"{source.name}: {use} needs pictures with captions; give each one a line in "
            "captions.csv, or a NAME.txt beside it"
        )
    bare = first_without_caption(source)
    if bare is not None:
        raise ConfigError(
            f"{source.name}: {use} needs a caption for every picture, and picture {bare + 1} of "
            f"{len(source)} has none; give it one, or judge on other pictures"
        )


def tower_inputs(
    dual: DualEncoder,
    tower: Tower,
    source: Source,
    *,
    count: int | None = None,
    batch_size: int = _BATCH,
) -> Iterator[NDArray[Any]]:
    """Yield a tower's first `count` inputs (default: all) in batches, in the order of the source.

    They are uint8 crops [N, size, size, 3], or int64 token ids [N, length] of the captions: all
    captions of the first picture, then those of the next. Captions that are too long are cut.

    Raises:
        ConfigError: a pair without a caption, where captions are asked for.
        InputError: a picture that cannot be read.
    """
    every = range(len(source))
    if tower == "image":
        for chosen in _chunks(islice(every, count), batch_size):
            yield crop_batch([source[index].image for index in chosen], dual.image_spec)
        return
    captions = (text for index in every for text in _captions(source, index))
    for texts in _chunks(islice(captions, count), batch_size):
        yield dual.text_tokenizer.encode(texts, truncate=True)


def source_clusters(dual: DualEncoder, test: Source, by: ClusterBy) -> Clusters | None:
    """Return which test pictures belong together, int64 [N]; None if all are independent.

    By embedding, it is the model that finds them nearly the same: see `find_clusters`.

    Raises:
        ConfigError: no folder of pictures, by folder or time; or all pictures belong together.
        InputError: a picture that cannot be read.
    """
    embed = torch_embedder(dual, "image")

    def embeddings() -> FloatArray:
        (found,) = embed_all(tower_inputs(dual, "image", test), [embed])
        return found

    found = find_clusters(
        test,
        by,
        embed=lambda pictures: embed(crop_batch(list(pictures), dual.image_spec)),
        embeddings=embeddings,
        side=dual.image_spec.size,
    )
    if found is not None and len(np.unique(found)) < 2:
        raise ConfigError(
            f"all pictures of {test.name} belong together by {by}, so they are one observation: "
            "give pictures of more, or another --cluster-by"
        )
    return found


def embed_all(inputs: Iterator[NDArray[Any]], embedders: Sequence[Embedder]) -> list[FloatArray]:
    """Run every embedder on every batch; return float32 [N, dim] for each embedder."""
    parts: list[list[FloatArray]] = [[] for _ in embedders]
    for batch in inputs:
        for part, embed in zip(parts, embedders, strict=True):
            part.append(embed(batch))
    return [np.concatenate(part) for part in parts]


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _captions(source: Source, index: int) -> tuple[str, ...]:
    captions = source.captions(index)
    if not captions:
        raise ConfigError(f"{source.name}: judging the text tower needs captions")
    return captions
