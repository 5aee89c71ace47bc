"""Compute the teacher's embeddings of a data set once, and keep them on disk."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from edgeclip.compress.compute import autocast
from edgeclip.compress.data.augmentation import Augmentation, augment
from edgeclip.compress.data.sources import Source, captions_of, most_captions
from edgeclip.compress.teachers.dual_encoder import DualEncoder, space_fingerprint
from edgeclip.runtime.bundle.files import atomic_file, read_npz, write_npz
from edgeclip.runtime.device.schema import parse
from edgeclip.runtime.errors import ConfigError, InputError

_SETTINGS = "cache.json"
_KIND = "edgeclip-teacher-cache-1"
_BATCH = 64
Float16 = NDArray[np.float16]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The identity of a cache: caches with equal settings hold equal embeddings.

    Attributes:
        space: fingerprint of the teacher's embedding space.
        source: identity of the data.
        count: number of pictures.
        views: number of augmented views of each picture.
        dim: length of an embedding.
        captions: whether the captions are embedded too.
        texts: the most captions that a picture has.
        augmentation: how the views are made.
        logit_scale: the teacher's logit scale.
        shard_size: number of pictures in a file.
    """

    space: str
    source: str
    count: int
    views: int
    dim: int
    captions: bool
    augmentation: Augmentation
    logit_scale: float
    shard_size: int = 1024
    texts: int = 1


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """Embeddings of every view and caption of a source, L2-normalised.

    `image` is float16 [count, views, dim]; `text` is float16 [count, texts, dim], zeros where a
    picture has fewer captions than others, or None for pictures without captions.
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
    """Compute the shards that `folder` lacks, and open the cache.

    Args:
        views, augmentation: None takes those of an existing cache; for a new cache, one view and
            `Augmentation()`.

    Raises:
        ConfigError: `folder` holds a cache of another teacher, source or augmentation, or
            there is nothing to cache.
    """
    existing = _read_settings(folder) if (folder / _SETTINGS).exists() else None
    if views is None:
        views = existing.views if existing else 1
    if augmentation is None:
        augmentation = existing.augmentation if existing else Augmentation()
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
        texts=most_captions(source),
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
        ConfigError: `folder` holds no cache, or shards are missing or damaged.
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
    text = None
    if settings.captions:
        text = np.concatenate([shard["text"] for shard in shards])
        text = text.reshape(settings.count, settings.texts, settings.dim)
    if image.shape != (settings.count, settings.views, settings.dim):
        raise ConfigError(f"{folder}: shards of another shape than {_SETTINGS} says; delete it")
    return TeacherCache(settings, image, text)


def embed_source(
    model: DualEncoder, source: Source, *, batch_size: int = 128
) -> tuple[Tensor, Tensor]:
    """Embed N pictures and all their M captions in full precision: float32 [N, dim], [M, dim]."""
    image, text = [], []
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(source), batch_size):
            chunk = range(first, min(first + batch_size, len(source)))
            pictures = [source[index].image for index in chunk]
            image.append(model.embed_image(model.preprocess(pictures)).cpu())
            captions_of(source, chunk)  # refuses a picture without any
            captions = [caption for index in chunk for caption in source.captions(index)]
            text.append(model.embed_text(model.tokenize(captions)).cpu())
    return torch.cat(image), torch.cat(text)


def _embed_shard(
    teacher: DualEncoder, source: Source, settings: CacheSettings, indices: range
) -> dict[str, NDArray[np.generic]]:
    image = np.empty((len(indices), settings.views, settings.dim), np.float16)
    text = np.zeros((len(indices), settings.texts, settings.dim), np.float16)
    with fast_inference(teacher):
        for first in range(0, len(indices), _BATCH):
            rows = slice(first, first + _BATCH)
            chunk = indices[rows]
            pairs = [source[index] for index in chunk]
            for view in range(settings.views):
                pictures = [
                    augment(pair.image, settings.augmentation, index=index, view=view)
                    for pair, index in zip(pairs, chunk, strict=True)
                ]
                image[rows, view] = _half(teacher.embed_image(teacher.preprocess(pictures)))
            if settings.captions:
                own = [source.captions(index) for index in chunk]
                place = [(row, n) for row, given in enumerate(own) for n in range(len(given))]
                captions = [caption for given in own for caption in given]
                found = _half(teacher.embed_text(teacher.tokenize(captions)))
                text[rows][tuple(zip(*place, strict=True))] = found
    flat = text.reshape(-1, settings.dim)
    return {"image": image, "text": flat} if settings.captions else {"image": image}


@contextmanager
def fast_inference(model: DualEncoder) -> Iterator[None]:
    """Run the block in evaluation mode, without gradients, in bfloat16 if the hardware has it."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast("auto", model.device):
            yield
    finally:
        model.train(was_training)


def _half(embeddings: torch.Tensor) -> Float16:
    return embeddings.cpu().numpy().astype(np.float16)


def _arrays(settings: CacheSettings) -> frozenset[str]:
    return frozenset(("image", "text") if settings.captions else ("image",))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npz"


def _claim(folder: Path, settings: CacheSettings) -> None:
    """Write the settings of a new cache, or check those of an existing one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if not path.exists():
        with atomic_file(path) as temporary:
            text = json.dumps(asdict(settings), indent=2) + "\n"
            temporary.write_text(text, encoding="utf-8")
        return
    existing, wanted = asdict(_read_settings(folder)), asdict(settings)
    different = [name for name, value in wanted.items() if existing[name] != value]
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
