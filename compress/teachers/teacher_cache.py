"""The teacher's embeddings of a data set, computed once and kept on disk."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from edgeclip.compress.compute import autocast
from edgeclip.compress.data.sources import Augmentation, Source, augment
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.runtime.bundle.files import atomic_file, read_npz, write_npz
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError, InputError
from edgeclip.runtime.inputs.preprocess import preprocess_batch


def pixels_of(images: Sequence[Image.Image], model: DualEncoder) -> Tensor:
    """RGB pictures -> float32 [N, 3, size, size] on the model's device."""
    return torch.from_numpy(preprocess_batch(images, model.image_spec)).to(model.device)


def ids_of(captions: Sequence[str], model: DualEncoder) -> Tensor:
    """Captions -> int64 [N, longest], cut at the model's context length, on its device."""
    return torch.from_numpy(model.text_tokenizer.encode(captions, truncate=True)).to(model.device)


def captions_of(source: Source, indices: Sequence[int]) -> list[str]:
    """The captions of some pairs.

    Raises:
        ConfigError: a pair has none.
    """
    found = [source.caption(index) for index in indices]
    captions = [caption for caption in found if caption is not None]
    if len(captions) < len(found):
        raise ConfigError(f"{source.name}: this needs a caption for every picture")
    return captions


@contextmanager
def inference(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode, no gradients, and the machine's fast number format."""
    before = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast("auto", model.device):
            yield
    finally:
        model.train(before)


def embed_source(
    model: DualEncoder, source: Source, *, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """All pictures and captions of a source -> two float32 [N, dim], in full precision."""
    image, text = [], []
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(source), batch_size):
            chunk = range(first, min(first + batch_size, len(source)))
            pictures = [source[index].image for index in chunk]
            image.append(model.embed_image(pixels_of(pictures, model)).cpu())
            text.append(model.embed_text(ids_of(captions_of(source, chunk), model)).cpu())
    return torch.cat(image), torch.cat(text)


_SETTINGS = "cache.json"
_KIND = "edgeclip-teacher-cache-1"
_BATCH = 64
Float16 = NDArray[np.float16]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """What a cache holds; two caches are interchangeable if these are equal."""

    space: str
    source: str
    count: int
    views: int
    dim: int
    captions: bool
    augmentation: Augmentation
    logit_scale: float
    shard_size: int = 1024


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """Embeddings of every view and caption of a source, L2-normalised.

    `image` is float16 [count, views, dim]; `text` is float16 [count, dim], or None for
    pictures without captions.
    """

    settings: CacheSettings
    image: Float16
    text: Float16 | None


def build_cache(
    teacher: DualEncoder,
    source: Source,
    folder: Path,
    *,
    views: int | None = None,
    augmentation: Augmentation | None = None,
) -> TeacherCache:
    """Fill `folder` with what is missing of the cache, then open it.

    Args:
        views, augmentation: None takes those of the cache that is there; of a new one, a
            single view and `Augmentation()`.

    Raises:
        ConfigError: `folder` holds a cache of another teacher, source or augmentation, or
            there is nothing to cache.
    """
    there = _read_settings(folder) if (folder / _SETTINGS).exists() else None
    if views is None:
        views = there.views if there else 1
    if augmentation is None:
        augmentation = there.augmentation if there else Augmentation()
    if len(source) < 1 or views < 1:
        raise ConfigError(f"a cache needs pictures and views, got {len(source)} and {views}")
    settings = CacheSettings(
        space=space_fingerprint(teacher),
        source=source.identity,
        count=len(source),
        views=views,
        dim=teacher.spec.dim,
        captions=source.has_captions,
        augmentation=augmentation,
        logit_scale=teacher.spec.logit_scale,
    )
    _claim(folder, settings)
    starts = range(0, settings.count, settings.shard_size)
    total = settings.count * settings.views
    with tqdm(total=total, desc="teacher cache", unit="img", dynamic_ncols=True) as bar:
        for start in starts:
            size = min(settings.shard_size, settings.count - start)
            path = _shard(folder, start // settings.shard_size)
            if not path.exists():
                arrays = _embed_shard(teacher, source, settings, range(start, start + size))
                write_npz(path, _KIND, {}, arrays)
            bar.update(size * settings.views)
    return open_cache(folder)


def open_cache(folder: Path) -> TeacherCache:
    """Read a finished cache.

    Raises:
        ConfigError: not a cache, or shards are missing or damaged.
    """
    settings = _read_settings(folder)
    shards = []
    for number in range(-(-settings.count // settings.shard_size)):
        path = _shard(folder, number)
        if not path.exists():
            raise ConfigError(f"{folder} is unfinished: run the command that made it again")
        try:
            shards.append(read_npz(path, _KIND, frozenset(), _arrays(settings))[1])
        except InputError as error:
            raise ConfigError(
                f"{path} is damaged: delete it, and run the command that made it again"
            ) from error
    image = np.concatenate([shard["image"] for shard in shards])
    text = np.concatenate([shard["text"] for shard in shards]) if settings.captions else None
    if image.shape != (settings.count, settings.views, settings.dim):
        raise ConfigError(f"{folder}: shards of another shape than {_SETTINGS} says; delete it")
    return TeacherCache(settings, image, text)


def _embed_shard(
    teacher: DualEncoder, source: Source, settings: CacheSettings, indices: range
) -> dict[str, NDArray[np.generic]]:
    image = np.empty((len(indices), settings.views, settings.dim), np.float16)
    text = np.empty((len(indices), settings.dim), np.float16)
    with inference(teacher):
        for first in range(0, len(indices), _BATCH):
            rows = slice(first, first + _BATCH)
            chunk = indices[rows]
            pairs = [source[index] for index in chunk]
            for view in range(settings.views):
                pictures = [
                    augment(pair.image, settings.augmentation, index=index, view=view)
                    for pair, index in zip(pairs, chunk, strict=True)
                ]
                image[rows, view] = _half(teacher.embed_image(pixels_of(pictures, teacher)))
            if settings.captions:
                captions = [str(pair.caption) for pair in pairs]
                text[rows] = _half(teacher.embed_text(ids_of(captions, teacher)))
    return {"image": image, "text": text} if settings.captions else {"image": image}


def _half(embeddings: torch.Tensor) -> Float16:
    return embeddings.cpu().numpy().astype(np.float16)


def _arrays(settings: CacheSettings) -> frozenset[str]:
    return frozenset(("image", "text") if settings.captions else ("image",))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def _claim(folder: Path, settings: CacheSettings) -> None:
    """Write the settings of a new cache, or check that those there are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if not path.exists():
        with atomic_file(path) as temporary:
            text = json.dumps(asdict(settings), indent=2) + "\n"
            temporary.write_text(text, encoding="utf-8")
        return
    there, wanted = asdict(_read_settings(folder)), asdict(settings)
    different = [name for name, value in wanted.items() if there[name] != value]
    if different:
        raise ConfigError(
            f"{folder} is a cache with another {', '.join(different)}: choose another "
            f"directory, or delete it"
        )


def _read_settings(folder: Path) -> CacheSettings:
    path = folder / _SETTINGS
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no teacher cache (no {_SETTINGS})") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    return parse(CacheSettings, data, source=str(path))
